"""Sizes that only another method reads: an exporter's path, `extra_repr`, `reset_parameters`.

A run does not show what such an integer means. It follows a cut if that is the only explanation: it equals sizes that
all become the same, in every module of its class it is a size of this module, and no operation of the run reads it.
If sizes of that value change differently, the plan names the integer and does not change it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from prunella.graph.data import Attribute, Extent, UnreadSize
from prunella.graph.nested_sizes import content, sizes_in
from prunella.graph.solve.residual_blocks import inside
from prunella.graph.solve.tokens import names_token
from prunella.graph.trace.recorder import Trace
from prunella.graph.trace.tracked_int import Attr, holder, holders, leaves, space_of
from prunella.graph.verify import relative_error
from prunella.model.forward import outputs_of
from prunella.model.state import untouched

_LEAST = 4
"""Smaller integers are strides, factors and counts far more often than sizes."""
_LONGEST = 32
"""Longer lists are data, not sizes."""
_PROBES = 12
"""Most runs in the search for integers that a run reads; integers not cleared by then count as read."""

ExtentOf = Callable[[Any, int], Extent]


@dataclass(frozen=True)
class _Place:
    """An integer attribute, or one entry (`index`) of a list of them. kind: the class of the owner."""

    kind: type
    owner: str
    name: str
    value: int
    index: int = -1

    @property
    def path(self) -> str:
        """The module that has it, or that has the configuration that has it."""
        return self.owner.partition(":")[0]


def unread_sizes(
    model: nn.Module, record: Trace, extent_of: ExtentOf, taken: Iterable[tuple[str, str]]
) -> list[UnreadSize]:
    """The integers that equal a size that can be cut, with all sizes of this value; not those that the run has read."""
    links = (leaf for link in record.links for leaf in leaves(link.expression))
    choices = (leaf for choice, _ in record.decisions for leaf in leaves(choice))
    read = {leaf for leaf in (*links, *choices) if isinstance(leaf, Attr)} | {attr for attr, _ in record.fixed}
    known = {(attr.owner, attr.name) for attr in read} | set(taken)
    places = [place for place in _places(model) if (place.owner, place.name) not in known]
    sizes = _Sizes(model, record, {place.value for place in places}, extent_of)
    matched = {place: sizes.of(place) for place in places}
    strange = {_kind(place) for place, extents in matched.items() if not extents} | _strange(model)
    return [
        UnreadSize(place.owner, place.name, place.value, tuple(extents), place.index)
        for place, extents in matched.items()
        if _kind(place) not in strange and any(extent.units for extent in extents)
    ]


def same_sizes(model: nn.Module, attributes: Sequence[Attribute]) -> Iterator[Attribute]:
    """The sizes of containers that hold the same names and sizes as one that follows a cut, in the same owner.

    Such as the arguments of a module that it was made with, which a copy of it is made with again.
    """
    known = {(entry.owner, entry.name) for entry in attributes}
    for entry in attributes:
        values = space_of(holder(model, entry.owner))
        own = content(values[entry.name]) if entry.index >= 0 and entry.name in values else ()
        for name, value in values.items() if own else ():
            if (entry.owner, name) not in known and sizes_in(value) and content(value) == own:
                yield replace(entry, name=name)


def never_read(model: nn.Module, inputs: Any, found: Sequence[UnreadSize]) -> tuple[UnreadSize, ...]:
    """The integers that can have another value without a change of the outputs."""
    if not found or any(parameter.is_meta for parameter in model.parameters()):
        return ()
    expected = _outputs(model, inputs, ())
    todo, clear, probes = [tuple(found)], list[UnreadSize](), 0
    while todo and expected is not None and probes < _PROBES:
        part, probes = todo.pop(0), probes + 1
        if _alike(expected, _outputs(model, inputs, part)):
            clear += part
        else:
            names = list(dict.fromkeys(place.name for place in part))
            halves = (set(names[: len(names) // 2]), set(names[len(names) // 2 :])) if len(names) > 1 else ()
            todo += [tuple(place for place in part if place.name in half) for half in halves]
    return tuple(clear)


# -- which integers ------------------------------------------------------------------------------------------------


def _places(model: nn.Module) -> Iterator[_Place]:
    for kind, owner, values in _owners(model):
        for name, value in values.items():
            if not name.startswith("_") and not names_token(name):
                yield from _integers(kind, owner, name, value)


def _owners(model: nn.Module) -> Iterator[tuple[type, str, Mapping[str, Any]]]:
    """Modules of their own source, and their plain configurations; a saved one is that of the file it was read from."""
    for owner, values in holders(model):
        thing = holder(model, owner)
        if not type(thing).__module__.startswith("torch.") and not (":" in owner and hasattr(thing, "save_pretrained")):
            yield type(thing), owner, values


def _integers(kind: type, owner: str, name: str, value: object) -> Iterator[_Place]:
    if type(value) is int and value >= _LEAST:
        yield _Place(kind, owner, name, value)
    entries = sizes_in(value)
    if len(entries) <= _LONGEST:
        yield from (_Place(kind, owner, name, entry, k) for k, entry in enumerate(entries) if entry >= _LEAST)


def _kind(place: _Place) -> tuple[type, str, int]:
    """The identity of an integer: class of its owner, name and position."""
    return place.kind, place.name, place.index


def _strange(model: nn.Module) -> set[tuple[type, str, int]]:
    """Attributes that are too small for a size in some module: they are the number of a layer, not a size."""
    return {
        (kind, name, -1)
        for kind, _, values in _owners(model)
        for name, value in values.items()
        if type(value) is int and value < _LEAST
    }


class _Sizes:
    """All sizes of the model by module and value: axes of parameters, of computed tensors, and lengths of lists."""

    def __init__(self, model: nn.Module, record: Trace, values: set[int], extent_of: ExtentOf) -> None:
        self.extents: dict[int, list[tuple[str, Extent]]] = {value: [] for value in values}
        for name, tensor in record.tensors.items():
            dims = record.axes.get(name, ((),) * tensor.dim())
            for dim, size in zip(dims, tensor.shape, strict=True):
                self._add(size, name.rpartition(".")[0], dim, extent_of)
        for (module, size, _), dim in record.sizes.items():
            self._add(size, module, dim, extent_of)
        for path, part in model.named_modules():
            if isinstance(part, nn.ModuleList | nn.Sequential | nn.ModuleDict):
                self._add(len(part), path, (), extent_of)

    def of(self, place: _Place) -> list[Extent]:
        """The different sizes of this value of the owner and of all that is in it, and of the inputs of the model."""
        found = [e for path, e in self.extents[place.value] if not place.path or not path or inside(path, place.path)]
        different = {(e.fixed, tuple((name, count.tobytes()) for name, count in e.units)): e for e in found}
        return list(different.values())

    def _add(self, size: int, path: str, dim: Any, extent_of: ExtentOf) -> None:
        if int(size) in self.extents:
            self.extents[int(size)].append((path, extent_of(dim, int(size))))


# -- which are read ------------------------------------------------------------------------------------------------


def _outputs(model: nn.Module, inputs: Any, changed: Sequence[UnreadSize]) -> list[Tensor] | None:
    """The outputs with these integers decreased by one; None if the model then does not run."""
    before = {(u.owner, u.name): getattr(holder(model, u.owner), u.name) for u in changed}
    try:
        for u in changed:
            values = vars(holder(model, u.owner))
            values[u.name] = u.placed(values[u.name], u.value - 1)
        with untouched(model), torch.no_grad():
            return outputs_of(model, inputs)
    except Exception:  # a probe: on any error one of these integers is read
        return None
    finally:
        for (owner, name), value in before.items():
            vars(holder(model, owner))[name] = value


def _alike(expected: list[Tensor], found: list[Tensor] | None) -> bool:
    return found is not None and relative_error(expected, found) == 0
