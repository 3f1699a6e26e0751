"""Low-rank adapters (LoRA) for the linear layers of a model, and distillation of a pruned language model with them."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunella.errors import RequestError
from prunella.model.masks import masks_of
from prunella.model.unwrap import unwrap
from prunella.recovery.distill import distill_logits
from prunella.recovery.finetune import Curve, OnStep, Training, finetune
from prunella.recovery.lora import Merged, mask_adapters_, merge_adapters_
from prunella.registry.method import recovery

STRAY = 0.01
"""A weight with a smaller fraction of zeros counts as dense: weights that were once quantized have some by chance."""


class LowRank(nn.Module):
    """A linear layer and a low-rank change of it: `y = base(x) + s B A x`. B starts at zero, so y is that of `base`."""

    def __init__(self, base: nn.Linear, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        weight = base.weight
        self.a = nn.Linear(base.in_features, rank, bias=False, device=weight.device, dtype=weight.dtype)
        self.b = nn.Linear(rank, base.out_features, bias=False, device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            drawn = torch.rand(self.a.weight.shape, generator=generator) * 2 - 1
            self.a.weight.copy_(drawn / base.in_features**0.5)
            self.b.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """The output of the layer with its change."""
        out: Tensor = self.base(x) + self.scale * self.b(self.a(x))
        return out


@dataclass(frozen=True)
class Adapters:
    """Which layers get adapters and of what rank. only: patterns of module names. scale: s, alpha / rank elsewhere."""

    rank: int = 8
    scale: float = 2.0
    only: tuple[str, ...] = ("*",)

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise RequestError(f"rank={self.rank} is out of range", "a whole number of at least 1", "rank=8 is usual")


@recovery(source="Hu et al. 2021, arXiv:2106.09685")
def add_adapters_(model: nn.Module, how: Adapters = Adapters(), *, seed: int = 0) -> tuple[str, ...]:
    """Add a low-rank adapter to every `nn.Linear` that `how.only` names, in place, and return their names.

    `y = W x + s B A x` with A `(rank, in)` uniform in `+-1 / sqrt(in)` and B `(out, rank)` zero: the model computes the
    same until it trains. Layers whose weight is shared with another module (tied heads) get none. No parameter changes
    its `requires_grad`. `merge_adapters_` makes plain layers of them. Errors: RequestError if no layer is left.

    seed: of A. Data: none.

    Use: recovery of large models with little memory. Avoid: small models, where all weights can train.
    """
    root, generator = unwrap(model), torch.Generator().manual_seed(seed)
    places: dict[int, int] = {}
    for _, parameter in root.named_parameters(remove_duplicate=False):
        places[id(parameter)] = places.get(id(parameter), 0) + 1
    chosen = [
        (name, module)
        for name, module in root.named_modules()
        if name and isinstance(module, nn.Linear) and places[id(module.weight)] == 1
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in how.only)
    ]
    if not chosen:
        raise RequestError(
            "no layer gets an adapter", f"no linear layer is named {' or '.join(how.only)}", 'only=("*",)'
        )
    for name, layer in chosen:
        parent, _, leaf = name.rpartition(".")
        setattr(root.get_submodule(parent), leaf, LowRank(layer, how.rank, how.scale, generator))
    return tuple(name for name, _ in chosen)


@dataclass(frozen=True)
class Distilled:
    """Result of `distill_lm_`: the loss of every step, and the merged adapters (none if all weights were trained)."""

    curve: Curve
    merged: tuple[Merged, ...] = ()

    def __str__(self) -> str:
        with_what = f"{len(self.merged)} adapters, merged" if self.merged else "all weights"
        return f"{self.curve}; {with_what}"


@recovery(
    source="Ma et al. 2023, arXiv:2305.11627 (LoRA after a cut); Muralidharan et al. 2024, arXiv:2407.14679 (logits)"
)
def distill_lm_(
    small: nn.Module,
    teacher: nn.Module,
    data: Iterable[Any],
    *,
    steps: int,
    lr: float,
    adapters: Adapters | None = Adapters(),
    training: Training = Training(),  # noqa: B008 (frozen)
    on_step: OnStep | None = None,
) -> Distilled:
    """Distill the dense language model into the pruned one on unlabelled text, in place.

    `min mean over tokens of KL(softmax(teacher) || softmax(small))`, trained through low-rank adapters,
    which are merged at the end into plain layers, or through all weights with `adapters=None`. The masks of the model
    hold in both cases, also for the change that an adapter makes. `requires_grad` is restored at the end.
    Data: batches of tokens, no labels, repeated until the steps are done.

    small: any model that takes the teacher's batches and returns logits of the same shape. lr: about 1e-3 with
    adapters, 1e-5 to 1e-4 without. training: optimizer, learning rate schedule, clipping, seed.
    Errors: CheckFailed if the loss is not finite; the model then keeps its last good weights.

    Use: after every structured pruning of a language model, and after `match_stream_` where that applies. Avoid: when
    labels of the task are available: `finetune` learns from both.
    """
    root = unwrap(small)
    loss = distill_logits(teacher, temperature=1.0)
    if adapters is None:
        return Distilled(finetune(root, data, loss, steps=steps, lr=lr, training=training, on_step=on_step))
    merged: list[Merged] = []
    with _only_adapters(root, adapters, training.seed, merged):
        curve = finetune(root, data, loss, steps=steps, lr=lr, training=training, on_step=on_step)
    return Distilled(curve, tuple(merged))


@contextmanager
def _only_adapters(model: nn.Module, how: Adapters, seed: int, merged: list[Merged]) -> Iterator[None]:
    """Inside, only the adapters are trainable; they are merged on exit, also after an error."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    names = add_adapters_(model, how, seed=seed)
    bases = [model.get_submodule(f"{name}.base").get_parameter("weight") for name in names]
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    try:
        if masks_of(model) or any(int((weight == 0).sum()) > STRAY * weight.numel() for weight in bases):
            mask_adapters_(model)
        yield
    finally:
        merged += merge_adapters_(model, allow_loss=True)  # without a mask, changes on chance zeros are lost
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
