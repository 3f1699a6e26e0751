"""Weights that a module holds past `nn.Module`: in a tuple, a list or a dict, hidden from `parameters()`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from typing import Any

from torch import Tensor, nn

from prunella.model.unread import is_elsewhere

_MACHINERY = frozenset({"_parameters", "_buffers", "_modules"})
_DEPTH = 4
"""Levels of containers that are searched."""
_MOST = 1000
"""Largest container that is searched."""


def unregistered(model: nn.Module) -> dict[str, Tensor]:
    """`net.held[0].weight` -> the weight, of modules and parameters in plain containers of the model's modules.

    A module that is registered elsewhere in the model does not count.
    """
    found: dict[str, Tensor] = {}
    known = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    for path, module in model.named_modules():
        if type(module).__module__.startswith("torch."):
            continue
        for name, value in vars(module).items():
            if name not in _MACHINERY and not name.endswith("_hooks"):
                for label, tensor in _held(value, f"{path}.{name}" if path else name, _DEPTH):
                    if id(tensor) not in known:
                        known.add(id(tensor))
                        found[label] = tensor
    return found


def _held(value: Any, label: str, depth: int) -> Iterator[tuple[str, Tensor]]:
    if is_elsewhere(value):  # a dead proxy refuses `isinstance`
        return
    if isinstance(value, nn.Module):
        for name, parameter in value.named_parameters():
            yield f"{label}.{name}", parameter
    elif isinstance(value, nn.Parameter):
        yield label, value
    elif depth and isinstance(value, tuple | list | Mapping | Set) and 0 < len(value) <= _MOST:
        keyed = isinstance(value, Mapping)
        for key, item in value.items() if keyed else enumerate(value):  # type: ignore[union-attr]
            yield from _held(item, f"{label}[{key!r}]", depth - 1)
