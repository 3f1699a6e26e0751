"""Tensors that a module keeps in plain attributes, such as a table of positions: neither parameters nor buffers."""

from __future__ import annotations

import dis
from collections.abc import Iterator
from functools import cache
from types import CodeType, FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

_MAKERS = frozenset({"__init__", "__post_init__", "__setstate__"})
"""Methods that make a module: what they alone set does not change from run to run."""


def constants(model: nn.Module) -> dict[str, Tensor]:
    """Name -> tensor, under every name of a module. Not what another method sets, which may be a cache."""
    return {
        f"{path}.{key}" if path else key: tensor
        for path, module in model.named_modules(remove_duplicate=False)
        for key, tensor in constants_of(module)
    }


def constants_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Those of one module of a user's own class."""
    if type(module).__module__.startswith("torch."):
        return
    for key, value in vars(module).items():
        if type(value) is Tensor and not value.requires_grad and value.is_leaf and key not in _set_in_methods(module):
            yield key, value


def _set_in_methods(module: nn.Module) -> frozenset[str]:
    own = module.__dict__.get("forward")
    replaced = _stored(own.__code__) if isinstance(own, FunctionType | MethodType) else frozenset()
    return _set_by(type(module).__mro__) | replaced


@cache
def _set_by(kinds: tuple[type, ...]) -> frozenset[str]:
    """The attributes that methods of a class and its bases set once the module is made."""
    bases = [base for base in kinds if not base.__module__.startswith("torch.")]
    named: list[tuple[str, Any]] = [entry for base in bases for entry in vars(base).items()]
    methods = [value for name, value in named if isinstance(value, FunctionType) and name not in _MAKERS]
    return frozenset().union(*(_stored(method.__code__) for method in methods))


def _stored(code: CodeType) -> frozenset[str]:
    names = {entry.argval for entry in dis.get_instructions(code) if entry.opname == "STORE_ATTR"}
    inner = [_stored(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return frozenset(names).union(*inner)
