"""`save_pretrained` of a cut model: it writes a configuration that describes the model, or refuses.

Models of transformers write their configuration with the weights, also as a part of another model (a wrapper of
sentence-transformers or peft). After a cut the configuration in memory must be that of the smaller model.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from prunella.errors import NotSupported
from prunella.graph.trace.tracked_int import holder, size_of
from prunella.graph.verify import SINGLE, relative_error
from prunella.model.forward import forward, outputs_of
from prunella.model.state import untouched
from prunella.planning.config_search import changed_sizes, shallower, shapes_of, with_tokens
from prunella.planning.plan import Plan
from prunella.planning.readable import configuration, configuration_of, reads_itself
from prunella.types import Inputs

WRITER = "save_pretrained"
_BEFORE = "_prunella_configuration"
"""Attribute of a cut model: its configuration before the cut, from which `prunella.load` builds it again."""


def follow_configuration_(small: nn.Module, dense: nn.Module, plan: Plan, inputs: Inputs | None) -> None:
    """Update, in place, the configuration of every part of `small` that has its own `save_pretrained`.

    A part that no configuration describes refuses `save_pretrained`, with advice on what to call instead. inputs: the
    example of the smaller model.
    """
    if any(parameter.is_meta for parameter in small.parameters()):
        return  # without values there is nothing to write
    for path in _writers(small):
        part, before = small.get_submodule(path), dense.get_submodule(path)
        for module in part.modules():
            for name in (WRITER, _BEFORE):  # of an earlier cut
                vars(module).pop(name, None)
        if shapes_of(part) == shapes_of(before):
            continue
        batch = None if inputs is None else _call_of(small, part, inputs)
        entries = None if batch is None else _configuration(part, before, path, plan, batch)
        if entries is None or not _set(part, small, entries, inputs):
            _refuse_to_write_(part)


def configuration_before(model: nn.Module) -> Mapping[str, Any] | None:
    """The configuration of a cut model before the cut; None if the cut did not change it."""
    before: Mapping[str, Any] | None = vars(model).get(_BEFORE)
    return before


def _writers(model: nn.Module) -> list[str]:
    """The outermost parts with their own `save_pretrained`."""
    paths: list[str] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") or not outer for outer in paths)
        if not inside and (reads_itself(module) or callable(getattr(type(module), WRITER, None))):
            paths.append(path)
    return paths


def _configuration(
    part: nn.Module, before: nn.Module, path: str, plan: Plan, batch: Mapping[str, Any]
) -> dict[str, Any] | None:
    """The configuration of the smaller part, as plain data."""
    if not reads_itself(part):
        return None
    own = f"{path}:config"
    sizes = {(":config", name): value for (owner, name), value in plan.attributes.items() if owner == own}
    lists = {(":config", name): removed for (owner, name), removed in plan.changes.lists.items() if owner == own}
    dense: Any = configuration(before)
    config = with_tokens(shallower(dense, sizes, lists), part.config)
    changes = changed_sizes(shapes_of(before), shapes_of(part), _pairs(before, path, plan))
    return configuration_of(part, before, config, changes, batch)


def _pairs(before: nn.Module, path: str, plan: Plan) -> Iterator[tuple[int, int]]:
    """Old and new sizes of attributes of the part, and of the groups."""
    prefix = f"{path}." if path else ""
    for (owner, name), new in plan.attributes.items():
        if owner == path or owner.startswith((prefix, f"{path}:")):
            place = owner.removeprefix(path).removeprefix(".") if path else owner
            old = size_of(getattr(holder(before, place), name, None))
            if old is not None and isinstance(new, int):
                yield old, new
    yield from ((row.total, row.kept) for row in plan.rows if row.kind != "block")


def _call_of(model: nn.Module, part: nn.Module, inputs: Inputs) -> dict[str, Any] | None:
    """The arguments of the part by name, in a pass of the model."""
    calls: list[dict[str, Any]] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = inspect.signature(module.forward).bind(*args, **kwargs)
        named = dict(bound.arguments)
        for name, parameter in bound.signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                named |= named.pop(name, {})
        calls.append(named)

    handle = part.register_forward_pre_hook(note, with_kwargs=True)
    with handle, untouched(model), torch.no_grad():
        forward(model, inputs)
    return calls[0] if calls else None


def _set(part: Any, model: nn.Module, entries: Mapping[str, Any], inputs: Any) -> bool:
    """Write the entries to the configuration in memory; False, without a change, if the model would then differ."""
    before = configuration(part)
    expected = _outputs(model, inputs)
    _assign(part.config, before, entries)
    try:
        same = relative_error(expected, _outputs(model, inputs)) <= SINGLE
    except Exception:  # a probe: a module may read its configuration while it runs and raise anything
        same = False
    if same:
        vars(part)[_BEFORE] = before
    else:
        _assign(part.config, configuration(part), before)
    return same


def _outputs(model: nn.Module, inputs: Any) -> list[torch.Tensor]:
    with untouched(model), torch.no_grad():
        return outputs_of(model, inputs)


def _assign(config: Any, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    for key, value in after.items():
        if isinstance(value, Mapping) and hasattr(getattr(config, key, None), "to_dict"):
            _assign(getattr(config, key), before.get(key, {}), value)
        elif before.get(key) != value:
            setattr(config, key, value)


def _refuse_to_write_(part: nn.Module) -> None:
    """Replace `save_pretrained` of the part, and of the modules in it, by a refusal."""
    for module in part.modules():
        if callable(getattr(type(module), WRITER, None)):
            setattr(module, WRITER, partial(_refuse, type(part).__name__))


def _refuse(kind: str, *_: Any, **__: Any) -> None:
    raise NotSupported(
        f"save_pretrained would write a {kind} that from_pretrained cannot read",
        "no configuration of its class builds these tensors: widths differ from layer to layer, or it holds other parts"
        " than its class builds (adapters, for example)",
        "save it with prunella.save(model, folder, plan=plan), or plan with equal_widths=True",
    )
