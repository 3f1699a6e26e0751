"""Look at a model without leaving a trace."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn


@contextmanager
def untouched(model: nn.Module, seed: int) -> Iterator[None]:
    """Run the body with `model` in eval mode and every random generator at `seed`; then put all back, bit for bit.

    Kept: training flags, buffers (running statistics, also where the model replaces them), `requires_grad` and `.grad`
    of parameters, the state of torch's, numpy's and Python's global generators. Seeding makes a shuffling loader give
    the same batches each time.
    """
    flags = [(module, module.training) for module in model.modules()]
    buffers = [(m, n, b, b.detach().clone()) for m in model.modules() for n, b in m._buffers.items() if b is not None]
    grads = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    dice = _dice()
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        # The fused transformer layers hide the weights they multiply by.
        torch.backends.mha.set_fastpath_enabled(False)
        model.eval()
        _seed(seed)
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        _throw(dice)
        for module, training in flags:
            module.training = training
        for parameter, asked, grad in grads:
            parameter.requires_grad_(asked)
            parameter.grad = grad
        for module, name, buffer, value in buffers:
            _put_back(module, name, buffer, value)


def _put_back(module: nn.Module, name: str, buffer: Tensor, value: Tensor) -> None:
    module._buffers[name] = buffer
    with torch.no_grad():
        buffer.copy_(value)


_Dice = tuple[Tensor, list[Tensor], object, object]


def _dice() -> _Dice:
    cuda = torch.cuda.get_rng_state_all() if _cuda() else []
    return torch.get_rng_state(), cuda, np.random.get_state(), random.getstate()


def _throw(dice: _Dice) -> None:
    torch.set_rng_state(dice[0])
    if dice[1]:
        torch.cuda.set_rng_state_all(dice[1])
    np.random.set_state(dice[2])  # type: ignore[arg-type]
    random.setstate(dice[3])  # type: ignore[arg-type]


def _cuda() -> bool:
    """Whether CUDA is in use already; asking its generators would start it."""
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    if _cuda():
        torch.cuda.manual_seed_all(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
