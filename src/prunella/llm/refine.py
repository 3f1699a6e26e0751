"""Refinement: a few gradient steps that bring the outputs of a pruned block closer to those of the dense block."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prunella.errors import CheckFailed, RequestError
from prunella.llm.distributed import SINGLE_PROCESS, ProcessGroup
from prunella.types import Mask


@dataclass(frozen=True)
class Refine:
    """How a block is refined: `epochs` passes over the calibration batches with Adam at `lr`, decaying to 0.

    `min over the weights of |B'(x') - B(x)|^2 / |B(x)|^2`, with x the hidden states of the dense model and x' those of
    the pruned one, so that the block also compensates the error of the blocks before it (for a block whose inputs are
    not the outputs of the previous one, x is x'). All parameters of the block train; pruned weights stay zero. lr:
    about 1e-4 to 3e-3. Source: block reconstruction as in Li et al. 2021 (BRECQ), arXiv:2102.05426.
    """

    epochs: int = 3
    lr: float = 5e-4

    def __post_init__(self) -> None:
        if self.epochs < 1 or not 0 < self.lr < math.inf:
            raise RequestError(f"cannot refine {self.epochs} epochs at lr={self.lr:g}", "both must be positive")


@dataclass(frozen=True)
class Refined:
    """The relative squared error of a block before and after, and its outputs after, None if it was left unchanged."""

    before: float
    after: float
    outputs: Sequence[Tensor] | None = None


def refine_(
    block: nn.Module,
    outputs: Sequence[Callable[[], Tensor]],
    targets: Sequence[Tensor],
    masks: Mapping[nn.Parameter, Mask],
    how: Refine,
    store: Callable[[Iterable[Tensor]], Sequence[Tensor]] = list,
    distributed: ProcessGroup = SINGLE_PROCESS,
) -> Refined:
    """Refine in place; the new weights are kept only if the error falls.

    outputs: one function per batch that runs the block and returns its output. targets: the dense outputs. store: where
    the outputs of the refined block are stored. distributed: each process has a shard of the batches; the gradient of a
    step is computed by the process of that batch and broadcast, so that the result is that of a single process.
    """
    trained = [p for p in block.parameters() if p.is_floating_point()]
    saved = [p.detach().clone() for p in trained]
    scale = sum(distributed.gather_in_order([float(y.float().square().sum()) for y in targets])) or 1.0
    before = _error(outputs, targets, distributed) / scale
    _train_(block, trained, outputs, targets, masks, how, scale, distributed)
    errors: list[float] = []
    stored = store(_measured(outputs, targets, errors))
    after = sum(distributed.gather_in_order(errors)) / scale
    if not after < before:
        with torch.no_grad():
            for p, value in zip(trained, saved, strict=True):
                p.copy_(value)
        if not math.isfinite(before):
            raise CheckFailed("the outputs of a block are not finite", "before it was refined", "check the data")
        return Refined(before, before)
    return Refined(before, after, stored)


def _train_(
    block: nn.Module,
    trained: Sequence[nn.Parameter],
    outputs: Sequence[Callable[[], Tensor]],
    targets: Sequence[Tensor],
    masks: Mapping[nn.Parameter, Mask],
    how: Refine,
    scale: float,
    distributed: ProcessGroup,
) -> None:
    """The steps of Adam, one batch each; gradients are of the squared error relative to `scale`."""
    flags = [(p, p.requires_grad) for p in block.parameters()]
    optimizer, count = torch.optim.Adam(trained, lr=how.lr), distributed.total(len(targets))
    steps = how.epochs * count
    for p in trained:
        p.requires_grad_(True)
    try:
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = how.lr * (1 + math.cos(math.pi * step / steps)) / 2
            place, owner = divmod(step % count, distributed.world_size)
            own = None
            if owner == distributed.rank:
                own = _gradients(outputs[place], targets[place], trained, count / scale)
            for p, gradient in zip(trained, distributed.broadcast_gradients(own, trained, owner), strict=True):
                p.grad = gradient
            optimizer.step()
            _apply_masks_(masks)
    finally:
        for p, flag in flags:
            p.grad = None
            p.requires_grad_(flag)


def _gradients(
    output: Callable[[], Tensor], target: Tensor, trained: Sequence[Tensor], weight: float
) -> tuple[Tensor | None, ...]:
    """Gradients of the squared error of one batch, times `weight`."""
    with torch.enable_grad():
        loss = (output().float() - target.float()).square().sum() * weight
    return torch.autograd.grad(loss, trained, allow_unused=True)


@torch.no_grad()
def _apply_masks_(masks: Mapping[nn.Parameter, Mask]) -> None:
    for parameter, mask in masks.items():
        parameter.masked_fill_(~mask, 0)


def _error(outputs: Sequence[Callable[[], Tensor]], targets: Sequence[Tensor], distributed: ProcessGroup) -> float:
    errors: list[float] = []
    for _ in _measured(outputs, targets, errors):
        pass
    return sum(distributed.gather_in_order(errors))


def _measured(
    outputs: Sequence[Callable[[], Tensor]], targets: Sequence[Tensor], errors: list[float]
) -> Iterator[Tensor]:
    """The outputs in turn; their squared errors are appended to `errors`."""
    for compute, target in zip(outputs, targets, strict=True):
        with torch.no_grad():
            output = compute()
            errors.append(float((output.float() - target.float()).square().sum()))
        yield output
