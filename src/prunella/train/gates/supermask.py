"""Supermasks: a good subnetwork of random weights; only scores are trained, never a weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from prunella.errors import RequestError
from prunella.model.masks import reapply_, record_
from prunella.model.unwrap import unwrap
from prunella.registry.method import training
from prunella.selection import keep_top
from prunella.train.gates.gate import put_on, take_off, weights
from prunella.types import Mask

M = TypeVar("M", bound=nn.Module)


class _Straight(torch.autograd.Function):
    """The mask of the top scores; its gradient goes to all scores unchanged."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, kept: int) -> Tensor:
        return keep_top(scores.flatten(), kept).view_as(scores).to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class EdgePopup(nn.Module):
    """The parametrization that `supermask_` puts on a weight: `w * [s is among the top round(k n)]`."""

    def __init__(self, weight: Tensor, density: float, generator: torch.Generator, trained: tuple[str, ...]) -> None:
        super().__init__()
        self.trained = trained
        self.kept = round(density * weight.numel())
        bound = 1 / math.sqrt(weight[0].numel())
        scores = torch.empty(weight.shape, device="cpu").uniform_(-bound, bound, generator=generator)
        self.scores = nn.Parameter(scores.to(weight.device, weight.dtype))

    def forward(self, weight: Tensor) -> Tensor:
        """The masked weight."""
        masked: Tensor = weight * _Straight.apply(self.scores, self.kept)  # type: ignore[no-untyped-call]
        return masked

    def mask(self) -> Mask:
        """Exactly `kept` weights: the highest scores, ties to the lowest index."""
        return keep_top(self.scores.detach().flatten(), self.kept).view_as(self.scores)


@training(source="Ramanujan et al. 2020, arXiv:1911.13299; Zhou et al. 2019, arXiv:1905.01067 (`constant`)")
def supermask_(
    model: M, density: float, *, only: Sequence[str] = ("*",), constant: bool = False, seed: int = 0
) -> list[nn.Parameter]:
    """Freeze every parameter of the model and put trainable scores on its weights; return the scores.

    `w' = w * [s in the top round(k n) of its layer]`, and by the straight-through rule `dL/ds = dL/dw' * w`. Train the
    scores by an optimizer of their own, then call `finalize_supermask`. Data: a loss, while training.

        scores = supermask_(model, 0.5)
        optimizer = torch.optim.SGD(scores, lr=0.1, momentum=0.9)
        ...
        finalize_supermask(model)                     # the same weights, masked; state-dict keys as before

    density: k in (0, 1], the same in every layer. only: patterns of names of parameters; parameters with at least two
    dimensions are masked. constant: first replace every weight by its sign times the standard deviation of its layer,
    which works better. seed: of the initial scores.
    Errors: RequestError for a density out of range.

    Use: studying what a random network can already do; storing a network as a seed and bits. Avoid: accuracy for its
    cost: a supermask needs a wider network than training does.
    """
    if not 0 < density <= 1:
        raise RequestError(f"density={density:g} is out of range", "it is in (0, 1]", "for example density=0.5")
    root = unwrap(model)
    chosen = weights(root, only)
    generator = torch.Generator().manual_seed(seed)
    trained = tuple(name for name, parameter in root.named_parameters() if parameter.requires_grad)
    root.requires_grad_(False)
    if constant:
        with torch.no_grad():
            for _, parameter in chosen:
                parameter.copy_(torch.where(parameter < 0, -1.0, 1.0) * parameter.std())
    popups = put_on(root, [name for name, _ in chosen], lambda p: EdgePopup(p, density, generator, trained))
    return [popup.scores for popup in popups]


def finalize_supermask(model: M) -> M:
    """Turn the scores of `supermask_` into masks, and return the model without parametrizations.

    Kept weights keep their bits, the others are zero and masked (`masks_of`, `Pruner`). Parameters that were trainable
    before `supermask_` are trainable again. RequestError if the model has no supermask.
    """
    root = unwrap(model)
    popups = dict(take_off(root, EdgePopup))
    if not popups:
        raise RequestError("the model has no supermask", "", "call prunella.lottery.supermask_(model, density) first")
    trained = {name for popup in popups.values() for name in popup.trained}
    for name, parameter in root.named_parameters():
        parameter.requires_grad_(name in trained)
    record_(root, {parameter: popup.mask() for parameter, popup in popups.items()})
    return reapply_(model)
