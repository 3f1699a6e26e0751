"""The smaller model on a second batch, on a second size, and in training, by the oracle of `judge`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import judge
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

EXACT, SINGLE = 1e-9, 1e-4
ROUNDED = 1e-7
"""Some sources keep a part in float32, whose last digit may turn: that is told, and no error."""
Answer = tuple[str, str]


def examine(dense: nn.Module, small: nn.Module, inputs: Any) -> tuple[Answer, ...]:
    """`exact`, `not taken` by the dense model, or how far the two models are from each other."""
    return (
        ("second batch", _compared(dense, small, tree_map(_more_samples, inputs))),
        ("second size", _compared(dense, small, tree_map(_longer, inputs))),
        ("gradients", _answer(lambda: _gradients(dense, small, inputs))),
        ("training step", _answer(lambda: _step(dense, small, inputs))),
    )


def _answer(run: Callable[[], str]) -> str:
    try:
        return run()
    except Exception as error:
        return f"differs: {type(error).__name__}: {error}"[:200]


def _compared(dense: nn.Module, small: nn.Module, inputs: Any) -> str:
    try:
        outputs = judge.run(judge.clone(dense), inputs)
    except Exception:
        return "not taken"
    if not all(bool(torch.isfinite(t).all()) for t in outputs):
        return "not taken"
    wide = judge.runs_wide(dense, inputs)
    gap = judge.error(dense, small, inputs, wide=wide)
    if EXACT < gap <= ROUNDED:
        return f"rounded to {gap:.0e}"
    return "exact" if gap <= (EXACT if wide else SINGLE) else f"differs by {gap:.1e}"


def _more_samples(tensor: Any) -> Any:
    """Three samples, or five where there are more, with other values."""
    if not isinstance(tensor, Tensor):
        return tensor
    count = 3 if tensor.shape[0] <= 2 else 5
    rows = tensor[torch.arange(count) % tensor.shape[0]]
    return (rows.roll(1, -1) if rows.dim() > 1 else rows) * (0.7 if tensor.is_floating_point() else 1)


def _longer(tensor: Any) -> Any:
    """An image, a volume or a sound half as large again, a sequence half as long."""
    if not isinstance(tensor, Tensor) or tensor.dim() < 2:
        return tensor
    axes = range(2, tensor.dim()) if tensor.dim() > 3 else [tensor.dim() - 2 if tensor.dim() == 3 else 1]
    for axis in axes:
        size = tensor.shape[axis]
        new = size * 3 // 2 if tensor.dim() > 3 else max(1, size // 2)
        tensor = tensor.index_select(axis, torch.arange(new) % size)
    return tensor


def _gradients(dense: nn.Module, small: nn.Module, inputs: Any) -> str:
    """Of the masked model at the positions that are kept, and of the smaller one, in float64 and evaluation mode."""
    if not judge.runs_wide(dense, inputs):
        return "not in float64"
    cuts = judge.removed(dense, small)
    pair = [judge.clone(model).double().eval() for model in (judge.masked(dense, cuts), small)]
    try:
        loss = _loss(pair[0], judge.double(inputs))
        loss.backward()
    except Exception:
        return "not taken"
    if not torch.isfinite(loss):
        return "not finite"
    _loss(pair[1], judge.double(inputs)).backward()
    wanted = dict(pair[0].named_parameters())
    worst, scale = 0.0, 1e-30
    for name, parameter in pair[1].named_parameters():
        if parameter.grad is not None and wanted[name].grad is not None:
            whole = judge.take(wanted[name].grad, cuts.get(name, {}))
            worst = max(worst, float((parameter.grad - whole).abs().max())) if whole.numel() else worst
            scale = max(scale, float(whole.abs().max())) if whole.numel() else scale
    return "exact" if worst <= 1e-7 * scale else f"differs by {worst / scale:.1e}"


def _step(dense: nn.Module, small: nn.Module, inputs: Any) -> str:
    """One step of gradient descent in training mode, where the dense model takes it."""
    try:
        _descend(judge.clone(dense), inputs)
    except Exception:
        return "not taken"
    _descend(judge.clone(small), inputs)
    return "exact"


def _descend(model: nn.Module, inputs: Any) -> None:
    torch.manual_seed(0)
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    loss = _loss(model, inputs)
    loss.backward()
    optimizer.step()
    if not torch.isfinite(loss):
        raise ValueError("the loss is not finite")


def _loss(model: nn.Module, inputs: Any) -> Tensor:
    """The mean of all outputs of numbers, by random weights: a norm at the end gives a square no gradient."""
    torch.manual_seed(0)
    output = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    floating = [t for t in judge.tensors(output) if t.is_floating_point() and t.requires_grad]
    generator = torch.Generator().manual_seed(0)
    parts = [(t * torch.randn(t.shape, generator=generator).to(t.dtype)).mean() for t in floating]
    return torch.stack(parts).mean()
