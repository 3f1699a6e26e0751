"""Surgery on depth: blocks leave their list, and what numbers or counts the blocks follows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from prunella.errors import RequestError
from prunella.model.forward import tensors

Dropped = Mapping[str, tuple[str, ...]]


def number_(model: nn.Module, dropped: Dropped) -> None:
    """Number the blocks of each container as if those that go were gone already; `drop_` takes them out.

    An integer attribute follows that is `position + constant` in every block that has it (two at least), as
    `layer_idx`. This comes before any other size is changed, lest cut sizes look like numbers.
    """
    check_dropped(model, dropped)
    for path, gone in _deepest_first(dropped):
        container = model.get_submodule(path)
        _renumber(list(container._modules.values()), _kept(container, gone))


def drop_(model: nn.Module, dropped: Dropped) -> None:
    """Take blocks out of their containers in place: `dropped` is container -> names of its children that go.

    Numbered children are numbered again. Parameters shared with other places stay there. A container or a child that
    is not in the model is a `RequestError`.
    """
    check_dropped(model, dropped)
    for path, gone in _deepest_first(dropped):
        container = model.get_submodule(path)
        stays = [item for item in container._modules.items() if item[0] not in gone]
        numbered = _numbered(container)
        container._modules.clear()
        for k, (name, child) in enumerate(stays):
            container._modules[str(k) if numbered else name] = child


def check_dropped(model: nn.Module, dropped: Dropped) -> None:
    """Errors: RequestError unless every container is a list of modules that has these children, and one stays."""
    for path, gone in dropped.items():
        container = _module(model, path)
        listed = isinstance(container, nn.ModuleList | nn.Sequential)
        names = set(container._modules) if container is not None and listed else set()
        if not gone or len(set(gone)) < len(gone) or not set(gone) < names:
            raise RequestError(
                f"the plan drops blocks {', '.join(map(repr, gone))} of {path!r}, which the model does not have",
                "the plan was made for another model",
                "make a plan of this model with prunella.plan",
            )


def shorten_(owner: Any, name: str, gone: Sequence[int]) -> None:
    """Leave the positions `gone` out of the plain list or tuple `owner.name`."""
    old = getattr(owner, name)
    setattr(owner, name, type(old)(value for k, value in enumerate(old) if k not in gone))


def renamed(model: nn.Module, dropped: Dropped) -> dict[str, str]:
    """Name of each parameter and buffer of the dense model -> its name when the blocks are gone; lost ones are absent.

    A tied tensor that loses one of its places keeps the others.
    """
    new: dict[str, str] = {}
    for name in [n for n, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())]:
        found = new_name(model, dropped, name)
        if found is not None:
            new[name] = found
    return new


@contextmanager
def bypassed(model: nn.Module, dropped: Dropped) -> Iterator[None]:
    """Inside, the first tensor that these blocks return is the first that they were given.

    They run nevertheless, on a copy, so that all else that they return is as ever.
    """
    handles = []
    for path, gone in dropped.items():
        for name in gone:
            handles += _bypass(model.get_submodule(f"{path}.{name}"))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _bypass(block: nn.Module) -> list[Any]:
    given: list[Tensor] = []

    def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
        given.append(tensors((args, kwargs))[0])
        return swap((args, kwargs), given[-1].clone())

    def leave(module: nn.Module, args: Any, output: Any) -> Any:
        return swap(output, given.pop())

    return [block.register_forward_pre_hook(enter, with_kwargs=True), block.register_forward_hook(leave)]


def swap(tree: Any, new: Tensor) -> Any:
    """The tree with `new` in place of its first tensor."""
    if isinstance(tree, Tensor):
        return new
    if isinstance(tree, Mapping):
        key = next(k for k, value in tree.items() if tensors(value))
        made: Any = {**tree, key: swap(tree[key], new)}
        return made if type(tree) is dict else type(tree)(**made)
    k = next(k for k, value in enumerate(tree) if tensors(value))
    items = [*tree[:k], swap(tree[k], new), *tree[k + 1 :]]
    return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)


def _deepest_first(dropped: Dropped) -> list[tuple[str, tuple[str, ...]]]:
    return sorted(dropped.items(), key=lambda item: -item[0].count("."))


def _module(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path) if path else None
    except AttributeError:
        return None


def _numbered(container: nn.Module) -> bool:
    return list(container._modules) == [str(k) for k in range(len(container._modules))]


def _kept(container: nn.Module, gone: Sequence[str]) -> list[int]:
    return [k for k, name in enumerate(container._modules) if name not in gone]


def _renumber(blocks: Sequence[nn.Module | None], kept: Sequence[int]) -> None:
    """Give integers that number the blocks their new values."""
    values: dict[tuple[str, str], dict[int, int]] = {}
    for k, block in enumerate(blocks):
        for path, module in block.named_modules() if block is not None else ():
            for name, value in vars(module).items():
                if type(value) is int:
                    values.setdefault((path, name), {})[k] = value
    for (path, name), found in values.items():
        if len(found) > 1 and len({value - k for k, value in found.items()}) == 1:
            for new, old in enumerate(kept):
                if old in found:
                    setattr(blocks[old].get_submodule(path), name, found[old] + new - old)  # type: ignore[union-attr]


def new_name(model: nn.Module, dropped: Dropped, name: str) -> str | None:
    """What a module or tensor of the dense model is called when the blocks are gone; None if it goes with them."""
    for path, gone in _deepest_first(dropped):
        match = re.match(re.escape(path) + r"\.([^.]+)((?:\..*)?)$", name)
        if match is None:
            continue
        if match[1] in gone:
            return None
        container = model.get_submodule(path)
        if _numbered(container):
            stays = [n for n in container._modules if n not in gone]
            name = f"{path}.{stays.index(match[1])}{match[2]}"
    return name
