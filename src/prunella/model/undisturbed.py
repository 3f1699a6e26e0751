"""A run of a model that leaves nothing behind."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_MACHINERY = frozenset({"_parameters", "_buffers", "_modules", "training"})


_COPIED = frozenset({dict, list, set, OrderedDict})
"""Kinds of attributes whose content is put back; hooks are kept in an `OrderedDict`."""


def _held(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """What a module keeps in plain attributes: each value, and a copy of what a list or dictionary holds."""
    kept = {key: value for key, value in vars(module).items() if key not in _MACHINERY}
    return {key: (value, value.copy() if type(value) in _COPIED else None) for key, value in kept.items()}


def _put_back(now: dict[str, Any], before: dict[str, tuple[Any, Any]]) -> None:
    """Undo what a run wrote into plain attributes, so that no cache of it is left behind."""
    for key in [key for key in now if key not in before and key not in _MACHINERY]:
        del now[key]
    for key, (value, copied) in before.items():
        now[key] = value
        if copied is not None and _differs(value, copied):
            value.clear()
            value.extend(copied) if type(value) is list else value.update(copied)


def _differs(value: Any, copied: Any) -> bool:
    if len(value) != len(copied):
        return True
    if isinstance(value, set):
        return bool(value != copied)
    if isinstance(value, dict):
        return any(key not in value or value[key] is not kept for key, kept in copied.items())
    return any(a is not b for a, b in zip(value, copied, strict=True))


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients inside; training flags, buffers, caches and random state as before afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    held = [(vars(module), _held(module)) for module in model.modules()]
    buffers = [(b, b.detach().clone()) for b in model.buffers() if b.device.type != "meta"]
    random = torch.get_rng_state()
    try:
        model.eval()
        with torch.no_grad():
            yield
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
    finally:
        torch.set_rng_state(random)
        for module, training in flags:
            module.training = training
        for attributes, values in held:
            _put_back(attributes, values)
