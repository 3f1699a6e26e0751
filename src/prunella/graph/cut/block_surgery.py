"""Removal of residual blocks from their list, and renumbering of the attributes that number or count blocks."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from prunella.errors import RequestError
from prunella.model.hooks import removed_after
from prunella.model.trees import each, set_attribute, tensors

Dropped = Mapping[str, tuple[str, ...]]


def number_(model: nn.Module, dropped: Dropped) -> None:
    """Number the kept blocks of each container as after the removal; `drop_` removes the blocks.

    An attribute is renumbered if its value is `position + constant` in every block that has it (at least two), such as
    `layer_idx`. This must happen before other sizes are cut: a cut size could look like such a number.
    """
    check_dropped(model, dropped)
    for path, removed in _deepest_first(dropped):
        container = model.get_submodule(path)
        _renumber(list(container._modules.values()), _kept(container, removed))


def drop_(model: nn.Module, dropped: Dropped) -> None:
    """Remove blocks from their containers in place: `dropped` is container -> names of the removed children.

    Numbered children are renumbered. Parameters shared with other modules are kept there. A container or a child that
    is not in the model is a `RequestError`.
    """
    check_dropped(model, dropped)
    for path, removed in _deepest_first(dropped):
        container = model.get_submodule(path)
        kept = [item for item in container._modules.items() if item[0] not in removed]
        numbered = _numbered(container)
        container._modules.clear()
        for k, (name, child) in enumerate(kept):
            container._modules[str(k) if numbered else name] = child


def check_dropped(model: nn.Module, dropped: Dropped) -> None:
    """Errors: RequestError unless every container is a list of modules with these children and keeps one."""
    for path, removed in dropped.items():
        container = _module(model, path)
        listed = isinstance(container, nn.ModuleList | nn.Sequential)
        names = set(container._modules) if container is not None and listed else set()
        if not removed or len(set(removed)) < len(removed) or not set(removed) < names:
            raise RequestError(
                f"the plan drops blocks {', '.join(map(repr, removed))} of {path!r}, which the model does not have",
                "the plan was made for another model",
                "make a plan of this model with prunella.plan",
            )


def shorten_(owner: Any, name: str, removed: Sequence[int]) -> None:
    """Remove the positions `removed` from the plain list or tuple `owner.name`."""
    old = getattr(owner, name)
    set_attribute(owner, name, type(old)(value for k, value in enumerate(old) if k not in removed))


def renamed(model: nn.Module, dropped: Dropped) -> dict[str, str]:
    """Name of each kept parameter and buffer of the dense model -> its name after the removal of the blocks.

    A tied tensor in a removed block keeps its other names.
    """
    new_names: dict[str, str] = {}
    for name in [n for n, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())]:
        renamed_to = new_name(model, dropped, name)
        if renamed_to is not None:
            new_names[name] = renamed_to
    return new_names


@contextmanager
def bypassed(model: nn.Module, dropped: Dropped) -> Iterator[None]:
    """Inside, these blocks return their first input tensor as their first output tensor.

    The blocks still run, on a copy of this tensor, so that their other outputs do not change.
    """
    handles = []
    for path, removed in dropped.items():
        for name in removed:
            handles += _bypass(model.get_submodule(f"{path}.{name}"))
    with removed_after(handles):
        yield


def _bypass(block: nn.Module) -> list[Any]:
    block_inputs: list[Tensor] = []

    def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
        block_inputs.append(tensors((args, kwargs))[0])
        return swap((args, kwargs), block_inputs[-1].clone())

    def leave(module: nn.Module, args: Any, output: Any) -> Any:
        return swap(output, block_inputs.pop())

    return [block.register_forward_pre_hook(enter, with_kwargs=True), block.register_forward_hook(leave)]


def swap(tree: Any, new: Tensor) -> Any:
    """The tree with `new` in place of its first tensor."""
    count = itertools.count()
    return each(tree, lambda tensor: tensor if next(count) else new)


def _deepest_first(dropped: Dropped) -> list[tuple[str, tuple[str, ...]]]:
    return sorted(dropped.items(), key=lambda item: -item[0].count("."))


def _module(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path) if path else None
    except AttributeError:
        return None


def _numbered(container: nn.Module) -> bool:
    return list(container._modules) == [str(k) for k in range(len(container._modules))]


def _kept(container: nn.Module, removed: Sequence[str]) -> list[int]:
    return [k for k, name in enumerate(container._modules) if name not in removed]


def _renumber(blocks: Sequence[nn.Module | None], kept: Sequence[int]) -> None:
    """Set the attributes that number the blocks to their new values."""
    values: dict[tuple[str, str], dict[int, int]] = {}
    for k, block in enumerate(blocks):
        for path, module in block.named_modules() if block is not None else ():
            for name, value in vars(module).items():
                if type(value) is int:
                    values.setdefault((path, name), {})[k] = value
    for (path, name), by_block in values.items():
        if len(by_block) > 1 and len({value - k for k, value in by_block.items()}) == 1:
            for new, old in enumerate(kept):
                if old in by_block:
                    part = blocks[old].get_submodule(path)  # type: ignore[union-attr]
                    set_attribute(part, name, by_block[old] + new - old)


def new_name(model: nn.Module, dropped: Dropped, name: str) -> str | None:
    """The name of a module or tensor of the dense model after the removal of the blocks; None if it is removed."""
    for path, removed in _deepest_first(dropped):
        match = re.match(re.escape(path) + r"\.([^.]+)((?:\..*)?)$", name)
        if match is None:
            continue
        if match[1] in removed:
            return None
        container = model.get_submodule(path)
        if _numbered(container):
            kept = [n for n in container._modules if n not in removed]
            name = f"{path}.{kept.index(match[1])}{match[2]}"
    return name
