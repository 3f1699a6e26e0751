"""Low-rank adapters (LoRA) for the linear layers of a model, and distillation of a pruned language model with them."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunella.errors import CheckFailed, RequestError
from prunella.model.masks import masks_of
from prunella.model.state import restored_on_error
from prunella.model.unwrap import unwrap
from prunella.recovery.distill import distill_logits
from prunella.recovery.finetune import LossCurve, OnStep, Training, finetune
from prunella.recovery.lora import Merged, mask_adapters_, merge_adapters_
from prunella.registry.method import recovery

STRAY = 0.01
"""A weight with a smaller fraction of zeros counts as dense: quantized weights have a few zeros by chance."""


class LowRankAdapter(nn.Module):
    """A linear layer with a low-rank change: `y = base(x) + s B A x`. B starts at zero, so that `y = base(x)`."""

    def __init__(self, base: nn.Linear, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        weight = base.weight
        self.a = nn.Linear(base.in_features, rank, bias=False, device=weight.device, dtype=weight.dtype)
        self.b = nn.Linear(rank, base.out_features, bias=False, device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            uniform = torch.rand(self.a.weight.shape, generator=generator, device="cpu") * 2 - 1
            self.a.weight.copy_(uniform / base.in_features**0.5)
            self.b.weight.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """The output of the layer with its low-rank change."""
        out: Tensor = self.base(x) + self.scale * self.b(self.a(x))
        return out


@dataclass(frozen=True)
class Adapters:
    """The rank of adapters and their layers. only: patterns of module names. scale: s, or alpha / rank elsewhere."""

    rank: int = 8
    scale: float = 2.0
    only: tuple[str, ...] = ("*",)

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise RequestError(f"rank={self.rank} is out of range", "a whole number of at least 1", "rank=8 is usual")


@recovery(source="Hu et al. 2021, arXiv:2106.09685")
def add_adapters_(model: nn.Module, how: Adapters = Adapters(), *, seed: int = 0) -> tuple[str, ...]:
    """Add a low-rank adapter to every `nn.Linear` that `how.only` names, in place, and return the layers' names.

    `y = W x + s B A x` with A `(rank, in)` uniform in `+-1 / sqrt(in)` and B `(out, rank)` zero: the output does not
    change before training. Layers whose weight is shared with another module (tied heads) get no adapter. No parameter
    changes its `requires_grad`. `merge_adapters_` turns the layers into plain ones. Errors: RequestError if no layer is
    left.

    seed: of A. Data: none.

    Use: recovery of large models with little memory. Avoid: small models, where all weights can be trained.
    """
    root, generator = unwrap(model), torch.Generator().manual_seed(seed)
    owners: dict[int, int] = {}
    for _, parameter in root.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    layers = [
        (name, module)
        for name, module in root.named_modules()
        if name and isinstance(module, nn.Linear) and owners[id(module.weight)] == 1
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in how.only)
    ]
    if not layers:
        raise RequestError(
            "no layer gets an adapter", f"no linear layer matches {' or '.join(how.only)}", 'only=("*",)'
        )
    for name, layer in layers:
        parent, _, leaf = name.rpartition(".")
        setattr(root.get_submodule(parent), leaf, LowRankAdapter(layer, how.rank, how.scale, generator))
    return tuple(name for name, _ in layers)


@dataclass(frozen=True)
class Distilled:
    """The result of `distill_lm_`: the loss of every step, and the merged adapters (none with adapters=None)."""

    curve: LossCurve
    merged: tuple[Merged, ...] = ()

    def __str__(self) -> str:
        trained = f"{len(self.merged)} adapters, merged" if self.merged else "all weights"
        return f"{self.curve}; {trained}"


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
    """Distill the dense language model into the pruned one on unlabeled text, in place.

    `min mean over tokens of KL(softmax(teacher) || softmax(small))`, by training low-rank adapters, which are merged
    into plain layers at the end, or all weights with `adapters=None`. In both cases the masks of the model stay in
    force, for the change of an adapter too. `requires_grad` is restored at the end.
    Data: batches of tokens, no labels, repeated until the steps are done.

    small: any model that takes the teacher's batches and returns logits of the same shape. lr: about 1e-3 with
    adapters, 1e-5 to 1e-4 without. training: optimizer, learning rate schedule, clipping, seed.
    Errors: CheckFailed if the loss is not finite; the model then keeps its last good weights. After any other
    error the model is as before.
    on_step: called after each step with its number, loss and learning rate.

    Use: after every structured pruning of a language model, and after `match_stream_` where that applies. Avoid: tasks
    with labels: `finetune` learns from both.
    """
    root = unwrap(small)
    loss = distill_logits(teacher, temperature=1.0)
    if adapters is None:
        return Distilled(finetune(root, data, loss, steps=steps, lr=lr, training=training, on_step=on_step))
    merged: list[Merged] = []
    guard = restored_on_error(root, but=(CheckFailed,))
    with guard, _only_adapters(root, adapters, training.seed, merged):
        curve = finetune(root, data, loss, steps=steps, lr=lr, training=training, on_step=on_step)
    return Distilled(curve, tuple(merged))


@contextmanager
def _only_adapters(model: nn.Module, how: Adapters, seed: int, merged: list[Merged]) -> Iterator[None]:
    """Inside, only the adapters are trainable; on exit they are merged, after an error too."""
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
        merged += merge_adapters_(model, allow_loss=True)  # without a mask, changes at accidental zeros are lost
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
