"""The fine-tuning loop and the test that every competitor gets, and the referee's count of multiply-adds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from images import cifar_input, jitter
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

Prepare = Callable[[Tensor], Tensor]
Guard = Callable[[nn.Module, torch.optim.Optimizer], AbstractContextManager[object]]


def count_macs(model: nn.Module, example: Tensor) -> int:
    """Multiply-adds by torch's own counter (convolutions and matrix products), the same for all competitors."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(example)
    return counter.get_total_flops() // 2


def count_params(model: nn.Module) -> int:
    """Parameters, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def predict(model: nn.Module, pixels: Tensor, prepare: Prepare, *, batch: int = 500) -> Tensor:
    """Logits of all images, in eval mode."""
    model.eval()
    with torch.inference_mode():
        return torch.cat([model(prepare(part)) for part in pixels.split(batch)])


def accuracy(model: nn.Module, pixels: Tensor, labels: Tensor, prepare: Prepare = cifar_input) -> float:
    """Top-1 in percent."""
    return 100 * (predict(model, pixels, prepare).argmax(1) == labels).double().mean().item()


def batches(pixels: Tensor, labels: Tensor, *, steps: int, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """`steps` augmented batches, epochs shuffled by `seed`: the same images in the same order for everyone."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < batch:
            order = torch.cat([order, torch.randperm(len(pixels), generator=generator)])
        chosen, order = order[:batch], order[batch:]
        yield cifar_input(jitter(pixels[chosen], generator)), labels[chosen]


def _free(model: nn.Module, optimizer: torch.optim.Optimizer) -> AbstractContextManager[object]:
    return nullcontext()


def fine_tune(
    model: nn.Module,
    pixels: Tensor,
    labels: Tensor,
    *,
    steps: int,
    batch: int,
    rate: float,
    seed: int,
    guard: Guard = _free,
) -> nn.Module:
    """SGD with Nesterov momentum 0.9, weight decay 5e-4, cosine from `rate` to 0; changes `model`.

    guard: (model, optimizer) -> what holds while it trains, as `prunella.Pruner` does for masks.
    """
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    with guard(model, optimizer):
        for step, (x, y) in enumerate(batches(pixels, labels, steps=steps, batch=batch, seed=seed)):
            for part in optimizer.param_groups:
                part["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval()
