"""The cut of a dense model from a manifest. Manifests are untrusted: every name and position is checked."""

from __future__ import annotations

from torch import Tensor, nn

from prunella.errors import BadInput
from prunella.graph.cut.block_surgery import check_dropped
from prunella.graph.cut.changes import Changes
from prunella.graph.cut.surgery import change_
from prunella.graph.nested_sizes import sizes_in
from prunella.graph.solve.tokens import names_token
from prunella.graph.trace.tracked_int import size_of
from prunella.io.cuts import decode_cuts
from prunella.io.json import Fields
from prunella.io.plan_file import read_size
from prunella.model.constants import constants


def cut_as_recorded_(model: nn.Module, manifest: Fields) -> None:
    """Cut the dense model as the plan did, after a check of every name and position."""
    cuts, attributes = _width(manifest)
    dropped, lists = _depth(manifest)
    if not cuts and not attributes and not dropped:
        return
    own = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    own |= constants(model)
    for name, axes in cuts.items():
        for axis, kept in axes.items():
            size = own[name].shape[axis] if name in own and 0 <= axis < own[name].dim() else 0
            if kept.numel() == 0 or int(kept.min()) < 0 or int(kept.max()) >= size:
                raise BadInput(f"axis {axis} of {name!r} cannot be cut as recorded", f"the model has {size} positions")
    for owner, name in attributes:
        old = attribute(model, owner, name)
        private = name.startswith("_") and not sizes_in(old)
        if private or not (names_token(name) or _is_size(old)):
            raise BadInput(f"the size {name!r} of {owner!r} cannot be set", "the rebuilt model keeps no such integer")
    check_dropped(model, dropped)
    for (owner, name), removed in lists.items():
        entries = attribute(model, owner, name)
        if name.startswith("_") or type(entries) not in (list, tuple) or not set(removed) <= set(range(len(entries))):  # type: ignore[arg-type]
            raise BadInput(f"the list {name!r} of {owner!r} cannot be cut", "the rebuilt model keeps no such list")
    change_(model, Changes(cuts, attributes, dropped=dropped, lists=lists))


def _width(manifest: Fields) -> tuple[dict[str, dict[int, Tensor]], dict[tuple[str, str], int | tuple[int, ...]]]:
    """The cuts, and the sizes that follow them."""
    try:
        cuts = decode_cuts(manifest.section("cuts")) if manifest.section("cuts", optional=True).data else {}
        rows = [row.items(3) for row in manifest.list_of("attributes", default=())]
        return cuts, {(owner.text(), name.text()): read_size(value.data) for owner, name, value in rows}
    except (ValueError, TypeError) as error:
        why = error.why if isinstance(error, BadInput) else str(error)
        raise BadInput(manifest.what, f"its cuts cannot be read: {why}", manifest.todo) from error


def _depth(manifest: Fields) -> tuple[dict[str, tuple[str, ...]], dict[tuple[str, str], tuple[int, ...]]]:
    """The removed blocks and the lists that follow them."""
    dropped = {path: names.texts() for path, names in manifest.section("dropped", optional=True).values()}
    rows = [row.items(3) for row in manifest.list_of("lists", default=())]
    return dropped, {(owner.text(), name.text()): removed.integers() for owner, name, removed in rows}


def _is_size(value: object) -> bool:
    """Whether an attribute is an integer, or a container of them."""
    return size_of(value) is not None or bool(sizes_in(value))


def attribute(model: nn.Module, owner: str, name: str) -> object:
    """The attribute of a module, or of its configuration; None if there is none."""
    path, _, part = owner.partition(":")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None
    holder = getattr(module, part, None) if part.isidentifier() else module
    return getattr(holder, name, None)
