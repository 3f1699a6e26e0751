"""A few gradient steps for one block toward the outputs of the dense one, masks held."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunella.errors import CheckFailed, RequestError
from prunella.llm.distributed import ALONE, Processes
from prunella.types import Mask


@dataclass(frozen=True)
class Refine:
    """How a block is refined: `epochs` passes over the calibration batches with Adam at `lr`, decaying to 0.

    `min over the weights of |B'(x') - B(x)|^2 / |B(x)|^2`, with x the dense stream and x' the pruned one, so that the
    block also makes up for what the blocks before it lost (where a block is not fed by the one before, x is x'). Every
    parameter of the block moves; what the masks remove stays zero. lr: about 1e-4 to 3e-3. Source: block
    reconstruction as in Li et al. 2021 (BRECQ), arXiv:2102.05426.
    """

    epochs: int = 3
    lr: float = 5e-4

    def __post_init__(self) -> None:
        if self.epochs < 1 or not 0 < self.lr < math.inf:
            raise RequestError(f"cannot refine {self.epochs} epochs at lr={self.lr:g}", "both must be positive")


@dataclass(frozen=True)
class Refined:
    """The relative squared error of a block before and after, and its outputs after, None if it stays as it was."""

    before: float
    after: float
    outputs: Sequence[Tensor] | None = None


def refine_(
    block: nn.Module,
    outputs: Sequence[Callable[[], Tensor]],
    wanted: Sequence[Tensor],
    masks: Mapping[nn.Parameter, Mask],
    how: Refine,
    keep: Callable[[Iterable[Tensor]], Sequence[Tensor]] = list,
    processes: Processes = ALONE,
) -> Refined:
    """Refine in place; the new weights are kept only if the error fell.

    outputs: one function a batch that runs the block and gives its output. wanted: the dense outputs. keep: where the
    outputs of the refined block go. processes: each has the batches of its share; the gradient of a step comes from
    the process that has the batch whose turn it is, and all take the step, so that the result is that of one process.
    """
    trained = [p for p in block.parameters() if p.is_floating_point()]
    asked = [(p, p.requires_grad) for p in block.parameters()]
    saved = [p.detach().clone() for p in trained]
    scale = sum(processes.in_order([float(w.float().square().sum()) for w in wanted])) or 1.0
    before = _error(outputs, wanted, processes) / scale
    optimizer, count = torch.optim.Adam(trained, lr=how.lr), processes.total(len(wanted))
    steps = how.epochs * count
    for p in trained:
        p.requires_grad_(True)
    try:
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = how.lr * (1 + math.cos(math.pi * step / steps)) / 2
            place, owner = divmod(step % count, processes.count)
            mine = (
                _gradients(outputs[place], wanted[place], trained, count / scale) if owner == processes.rank else None
            )
            for p, grad in zip(trained, processes.gradients(mine, trained, owner), strict=True):
                p.grad = grad
            optimizer.step()
            _hold(masks)
    finally:
        for p, flag in asked:
            p.grad = None
            p.requires_grad_(flag)
    errors: list[float] = []
    made = keep(_told(outputs, wanted, errors))
    after = sum(processes.in_order(errors)) / scale
    if not after < before:
        with torch.no_grad():
            for p, value in zip(trained, saved, strict=True):
                p.copy_(value)
        if not math.isfinite(before):
            raise CheckFailed("the outputs of a block are not finite", "before it was refined", "check the data")
        return Refined(before, before)
    return Refined(before, after, made)


def _gradients(
    output: Callable[[], Tensor], goal: Tensor, trained: Sequence[Tensor], weight: float
) -> tuple[Tensor | None, ...]:
    """Of the squared error of one batch, times a weight."""
    with torch.enable_grad():
        loss = (output().float() - goal.float()).square().sum() * weight
    return torch.autograd.grad(loss, trained, allow_unused=True)


@torch.no_grad()
def _hold(masks: Mapping[nn.Parameter, Mask]) -> None:
    for parameter, mask in masks.items():
        parameter.masked_fill_(~mask, 0)


def _error(outputs: Sequence[Callable[[], Tensor]], wanted: Sequence[Tensor], processes: Processes) -> float:
    errors: list[float] = []
    for _ in _told(outputs, wanted, errors):
        pass
    return sum(processes.in_order(errors))


def _told(outputs: Sequence[Callable[[], Tensor]], wanted: Sequence[Tensor], errors: list[float]) -> Iterator[Tensor]:
    """The outputs in turn; their squared errors go to `errors`."""
    for output, goal in zip(outputs, wanted, strict=True):
        with torch.no_grad():
            found = output()
            errors.append(float((found.float() - goal.float()).square().sum()))
        yield found
