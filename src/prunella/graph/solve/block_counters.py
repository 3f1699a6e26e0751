"""Attributes that count the blocks of a stack: integers and plain lists of modules and configurations, with a proof.

No attribute is identified by its name. Attributes of a configuration count if a module built from the changed
configuration on the meta device equals, in tensors and plain attributes, the module without its first block. Any other
integer counts if the model, run with the integer minus one, skips the last block. A plain list of the parent of the
container counts by its length.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import combinations, product
from typing import Any

import numpy as np
import torch
from torch import nn

from prunella.graph.cut.block_surgery import drop_, number_, shorten_
from prunella.graph.data import Attribute, Extent, Graph, Group
from prunella.graph.solve.residual_blocks import inside
from prunella.graph.trace.tracked_int import holder, holders
from prunella.model.forward import forward
from prunella.model.rng import seeded
from prunella.model.state import untouched

Place = tuple[str, str]
"""(owner, name) of an attribute."""
_MOST = 6
"""Largest number of integers of one configuration, equal to the number of blocks, that are tried."""


def counted(model: nn.Module, graph: Graph, inputs: Any) -> Graph:
    """The graph with the attributes and lists that follow its stacks."""
    attributes, lists = list(graph.attributes), dict(graph.lists)
    for stack in [stack for stack in graph.stacks if _length(model, stack) > 1]:
        taken = {(a.owner, a.name) for a in attributes}
        ints, entries = _counters(model, stack, inputs)
        attributes += [_attribute(model, stack, place) for place in ints if place not in taken]
        lists[stack.name] = tuple(entries)
    return replace(graph, attributes=tuple(attributes), lists={k: v for k, v in lists.items() if v})


def _counters(model: nn.Module, stack: Group, inputs: Any) -> tuple[list[Place], list[Place]]:
    ints, lists = list[Place](), list[Place]()
    for owner, values in holders(model):
        path, _, config = owner.partition(":")
        if path and not inside(stack.name, path):
            continue
        candidates = list(_integers(values, _length(model, stack)))
        candidate_lists = list(_lists(values, _length(model, stack)))
        proven = (
            _proven(model.get_submodule(path), config, stack, path, candidates, candidate_lists) if config else None
        )
        if proven is None:
            proven = tuple(n for n in candidates if _shortens(model, owner, n, stack, inputs)), ()
            if not config and path == stack.name.rpartition(".")[0]:
                proven = proven[0], tuple(candidate_lists)
        ints += [(owner, name) for name in proven[0]]
        lists += [(owner, name) for name in proven[1]]
    return ints, lists


def _attribute(model: nn.Module, stack: Group, place: Place) -> Attribute:
    count = _length(model, stack)
    extent = Extent(count - stack.size, ((stack.name, np.ones(stack.size, dtype=np.int64)),))
    return Attribute(*place, count, extent)


def _length(model: nn.Module, stack: Group) -> int:
    return len(model.get_submodule(stack.name)._modules)


def _integers(values: Mapping[str, Any], count: int) -> Iterator[str]:
    """Integers equal to the number of blocks."""
    yield from (name for name, value in values.items() if type(value) is int and value == count and name[:1] != "_")


def _lists(values: Mapping[str, Any], count: int) -> Iterator[str]:
    """Plain lists with one entry per block."""
    for name, value in values.items():
        if name[:1] != "_" and type(value) in (list, tuple) and len(value) == count > 1:
            yield from (name,) if all(isinstance(entry, bool | int | float | str | None) for entry in value) else ()


# -- by building again -------------------------------------------------------------------------------------------


def _proven(
    module: nn.Module, config: str, stack: Group, path: str, ints: list[str], lists: list[str]
) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """The smallest change of the configuration that gives the module without its first block; None if there is none."""
    container = stack.name[len(path) + 1 :] if path else stack.name
    old = getattr(module, config)
    base = _built(module, old) if ints and len(ints) <= _MOST else None
    if base is None or base.state_dict().keys() != module.state_dict().keys():
        return None
    names = list(base.get_submodule(container)._modules)
    first = stack.paths[0].rpartition(".")[2]
    number_(base, {container: (first,)})
    drop_(base, {container: (first,)})
    expected = _picture(base)
    for int_names, list_names in product(_subsets(ints), _subsets(lists)):
        changed = _changed(old, int_names, list_names, len(names), names.index(first))
        rebuilt = _built(module, changed) if changed is not None else None
        if rebuilt is not None and _picture(rebuilt) == expected:
            return int_names, list_names
    return None


def _changed(old: Any, ints: Iterable[str], lists: Iterable[str], count: int, removed: int) -> Any:
    """The configuration with one block fewer in these attributes; None if the configuration refuses the change."""
    changed = copy.deepcopy(old)
    try:
        for name in ints:
            setattr(changed, name, count - 1)
        for name in lists:
            shorten_(changed, name, (removed,))
    except Exception:  # a configuration may check its values and raise anything
        return None
    return changed


def _subsets(names: list[str]) -> Iterable[tuple[str, ...]]:
    return (subset for size in range(min(len(names), 2) + 1) for subset in combinations(names, size))


def _built(module: nn.Module, config: Any) -> nn.Module | None:
    """A new module of this class from this configuration, on the meta device; None if it cannot be built this way."""
    kind: Any = type(config)
    try:
        with seeded(None), torch.device("meta"):
            if hasattr(config, "to_dict") and hasattr(kind, "from_dict"):
                kind.from_dict(config.to_dict())  # its own checks
            build: Any = type(module)
            module_built = build(copy.deepcopy(config))
        return module_built if isinstance(module_built, nn.Module) else None
    except Exception:  # a probe: on any error the configuration does not build the module
        return None


def _picture(module: nn.Module) -> dict[str, Any]:
    """Shapes of all tensors and values of all plain attributes, by name."""
    state: dict[str, Any] = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            if isinstance(value, bool | int | float | str) and name[:1] != "_":
                state[f"{path}:{name}"] = value
    return state


# -- by running --------------------------------------------------------------------------------------------------


def _shortens(model: nn.Module, owner: str, name: str, stack: Group, inputs: Any) -> bool:
    """Whether the model, run with this integer minus one, skips exactly the last block."""
    place, children = holder(model, owner), list(model.get_submodule(stack.name)._modules.values())
    ran: list[int] = []
    handles = [
        child.register_forward_pre_hook(lambda *_, k=k: ran.append(k)) for k, child in enumerate(children) if child
    ]
    old = getattr(place, name)
    try:
        with untouched(model), torch.no_grad():
            setattr(place, name, old - 1)
            try:
                forward(model, inputs)
            finally:
                setattr(place, name, old)
    except Exception:  # a probe: if the model does not run, the integer counts something else
        return False
    finally:
        for handle in handles:
            handle.remove()
    return ran == list(range(len(children) - 1))
