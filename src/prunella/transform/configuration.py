"""`save_pretrained` of a cut model: it writes a configuration that describes the model, or refuses.

Models of transformers write their configuration with the weights, also as a part of another model: of a user's module,
of sentence-transformers, or under the adapters of peft. After a cut the configuration in memory must be that of the
smaller model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from prunella.errors import NotSupported
from prunella.graph.trace.tracked_int import holder, size_of
from prunella.graph.verify import SINGLE, relative_error
from prunella.model.forward import outputs_of
from prunella.model.state import untouched
from prunella.planning.config_search import changed_sizes, shapes_of
from prunella.planning.parts import call_of, inside, merged, readable_parts
from prunella.planning.plan import Plan
from prunella.planning.readable import configuration, configuration_of, part_configuration
from prunella.types import Inputs

WRITER = "save_pretrained"
_BEFORE = "_prunella_configuration"
"""Attribute of a cut model: its configuration before the cut, from which `prunella.load` builds it again."""


def follow_configuration_(small: nn.Module, dense: nn.Module, plan: Plan, inputs: Inputs | None) -> None:
    """Update, in place, the configuration of every part of `small` that has its own `save_pretrained`.

    A part that no configuration describes refuses `save_pretrained`, with advice on what to call instead. A part with
    adapters refuses until they are merged. inputs: the example of the smaller model.
    """
    if any(parameter.is_meta for parameter in small.parameters()):
        return  # without values there is nothing to write
    _take_off_writers_(small)
    cut = {name for name, _ in shapes_of(small).items() ^ shapes_of(dense).items()}
    parts = [path for path in readable_parts(small) if any(inside(name, path) for name in cut)]
    plain, plain_dense = merged(small), merged(dense)
    described: dict[str, bool] = {}
    for path in parts:
        entries = _entries(small, plain.get_submodule(path), plain_dense.get_submodule(path), path, plan, inputs)
        described[path] = entries is not None and _set(small.get_submodule(path), small, entries, inputs)
    for path in _other_writers(small):
        if any(inside(name, path) for name in cut):
            whole = all(any(inside(name, part) for part in parts) for name in cut if inside(name, path))
            held = [part for part in parts if inside(part, path)]
            _guard_(small, path, held, plan, described=whole and all(described[part] for part in held))
    for path in parts:
        part, names = small.get_submodule(path), [*shapes_of(plain.get_submodule(path))]
        if not described[path]:
            _refuse_to_write_(part, plan)
        elif names != [*shapes_of(part)]:
            vars(part)[WRITER] = partial(_write_plain, part, names)


def configuration_before(model: nn.Module) -> Mapping[str, Any] | None:
    """The configuration of a cut model before the cut; None if the cut did not change it."""
    before: Mapping[str, Any] | None = vars(model).get(_BEFORE)
    return before


def _take_off_writers_(model: nn.Module) -> None:
    """Remove what an earlier cut set."""
    for module in model.modules():
        vars(module).pop(_BEFORE, None)
        writer = vars(module).get(WRITER)
        if isinstance(writer, partial) and writer.func in (_refuse, _write_plain, _write_around):
            del vars(module)[WRITER]


def _other_writers(model: nn.Module) -> list[str]:
    """Modules with their own `save_pretrained` that do not lie in a readable part."""
    parts = readable_parts(model)
    paths = [path for path, module in model.named_modules() if callable(getattr(type(module), WRITER, None))]
    return [path for path in paths if not any(path == part or inside(path, part) for part in parts)]


def _entries(
    model: nn.Module, part: nn.Module, before: nn.Module, path: str, plan: Plan, inputs: Inputs | None
) -> dict[str, Any] | None:
    """The configuration of the smaller part, as plain data. part, before: without adapters."""
    call = None if inputs is None else call_of(model, model.get_submodule(path), inputs)
    if call is None:
        return None
    config = part_configuration(before, part, path, plan.changes)
    changes = changed_sizes(shapes_of(before), shapes_of(part), _pairs(before, path, plan))
    return configuration_of(part, before, config, changes, call)


def _pairs(before: nn.Module, path: str, plan: Plan) -> Iterator[tuple[int, int]]:
    """Old and new sizes of attributes of the part, and of the groups."""
    prefix = f"{path}." if path else ""
    for (owner, name), new in plan.attributes.items():
        if owner == path or owner.startswith((prefix, f"{path}:")):
            place = owner.removeprefix(path).removeprefix(".") if path else owner
            try:
                old = size_of(getattr(holder(before, place), name, None))
            except AttributeError:  # of an adapter, which is merged
                continue
            if old is not None and isinstance(new, int):
                yield old, new
    yield from ((row.total, row.kept) for row in plan.rows if row.kind != "block")


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


# -- writers -----------------------------------------------------------------------------------------------------------


def _guard_(model: nn.Module, path: str, parts: list[str], plan: Plan, *, described: bool) -> None:
    """Set the writer of a module around readable parts: of a wrapper that writes them, or of one with adapters."""
    module = model.get_submodule(path)
    if described and parts:
        vars(module)[WRITER] = partial(_write_around, module, [model.get_submodule(part) for part in parts])
    else:
        _refuse_to_write_(module, plan)


def _refuse_to_write_(part: nn.Module, plan: Plan) -> None:
    """Replace `save_pretrained` of the part, and of the modules in it, by a refusal."""
    todo = "save it with prunella.save(model, folder, plan=plan)"
    if merged(part) is not part:
        todo = f"{todo} before the adapters are merged, or merge them before the plan"
    if not (plan.recipe or {}).get("equal_widths"):
        todo += ", or plan with equal_widths=True"
    for module in part.modules():
        if callable(getattr(type(module), WRITER, None)):
            setattr(module, WRITER, partial(_refuse, type(part).__name__, todo))


def _refuse(kind: str, todo: str, *_: Any, **__: Any) -> None:
    raise NotSupported(
        f"save_pretrained would write a {kind} that from_pretrained cannot read",
        "no configuration of its class builds these tensors: widths differ from layer to layer, or it holds other parts"
        " than its class builds (adapters, for example)",
        todo,
    )


def _write_plain(part: nn.Module, names: list[str], /, *args: Any, **kwargs: Any) -> Any:
    """`save_pretrained` of a part that had adapters. names: of its tensors without them."""
    _check_merged(part, names, type(part).__name__)
    return getattr(type(part), WRITER)(part, *args, **kwargs)


def _check_merged(part: nn.Module, names: list[str], kind: str) -> None:
    if set(names) != set(part.state_dict()):
        raise NotSupported(
            f"save_pretrained would write a {kind} that from_pretrained cannot read",
            "the adapters are those of the smaller model, and the model that they name as their base is the dense one",
            "merge them first: model.merge_and_unload().save_pretrained(folder)",
        )


def _write_around(module: nn.Module, parts: list[nn.Module], /, *args: Any, **kwargs: Any) -> Any:
    """`save_pretrained` of a wrapper, which has to call that of every part that was cut. Errors: NotSupported."""
    own = {part: vars(part).get(WRITER) for part in parts}
    for part, writer in own.items():
        if isinstance(writer, partial) and writer.func is _write_plain:
            _check_merged(part, writer.args[1], type(module).__name__)
    missing = {*parts}

    def note(part: nn.Module, *inner: Any, **options: Any) -> Any:
        missing.discard(part)
        return getattr(type(part), WRITER)(part, *inner, **options)

    for part in parts:
        vars(part)[WRITER] = partial(note, part)
    try:
        written = getattr(type(module), WRITER)(module, *args, **kwargs)
    finally:
        for part, writer in own.items():
            vars(part).pop(WRITER)
            if writer is not None:
                vars(part)[WRITER] = writer
    if missing:
        raise NotSupported(
            f"save_pretrained wrote a {type(module).__name__} without the smaller model inside",
            f"it does not call save_pretrained of its {', '.join(sorted(type(part).__name__ for part in missing))}",
            "delete what it wrote, and call save_pretrained of the model inside",
        )
    return written
