"""Proximal operators, which make exact zeros, and an object that applies them after every optimizer step."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prunella.errors import RequestError
from prunella.registry.method import training
from prunella.train.penalty.units import Coupled, Named, Units


@training(source="Tibshirani 1996, doi:10.1111/j.2517-6161.1996.tb02080.x; Daubechies et al. 2004, arXiv:math/0307152")
def soft(weight: Tensor, threshold: float | Tensor) -> Tensor:
    """Soft threshold, the proximal operator of the L1 norm.

    `soft(w, t) = sign(w) max(|w| - t, 0)`, the minimiser over v of `(v - w)^2 / 2 + t |v|`. Any shape.
    Data: none. threshold: from 0 up, in units of the weight: learning rate times strength.
    Caveats: what stays is too small by the threshold; fine-tune without the penalty at the end.

    Use: single weights that have to become exactly zero in training. Avoid: structure: use `group_soft`.
    """
    return weight.sign() * (weight.abs() - threshold).clamp_min(0)


@training(source="Yuan and Lin 2006, doi:10.1111/j.1467-9868.2005.00532.x; Wen et al. 2016, arXiv:1608.03665")
def group_soft(groups: Tensor, threshold: float | Tensor) -> Tensor:
    """Soft threshold of whole groups, the proximal operator of the group lasso.

    `w_g max(1 - t sqrt(p) / ||w_g||, 0)` for each row `w_g` of p weights: zero exactly if `||w_g|| <= t sqrt(p)`.
    groups `(groups, p)`. Data: none. threshold: from 0 up: learning rate times strength.

    Use: groups that have to become zero as a whole. Avoid: zeros inside groups too: use `sparse_group_soft`.
    """
    return groups * shrinkage(groups.square().sum(1), groups.shape[1] ** 0.5 * threshold).unsqueeze(1)


@training(source="Simon et al. 2013, doi:10.1080/10618600.2012.681250")
def sparse_group_soft(groups: Tensor, l1: float, group: float) -> Tensor:
    """Soft threshold of weights, then of groups: the proximal operator of the sparse group lasso.

    `group_soft(soft(w, l1), group)`, which minimises `||v - w||^2 / 2 + l1 |v|_1 + group sqrt(p) ||v||` exactly: in
    this order, not in the other. groups `(groups, p)`. Data: none. l1, group: from 0 up.

    Use: few groups, and few weights in each. Avoid: only one of both is wanted.
    """
    return group_soft(soft(groups, l1), group)


def shrinkage(squares: Tensor, radius: float | Tensor) -> Tensor:
    """`max(1 - radius / norm, 0)` from squared norms; 0 where the norm is 0."""
    norm = squares.sqrt()
    return torch.where(norm > radius, 1 - radius / norm.clamp_min(torch.finfo(norm.dtype).tiny), 0.0)


@training(source="Wen et al. 2016, arXiv:1608.03665; Simon et al. 2013; Parikh and Boyd 2014, doi:10.1561/2400000003")
class Proximal:
    """Proximal gradient descent: after every optimizer step, thresholds make weights or coupled units exactly zero.

    With the learning rate `lr` of each parameter: `w = soft(w, lr * l1)` on every layer's weights, then for every
    coupled unit (producer rows, bias, scale and shift of its normalisation, consumer columns; p weights in all)
    `w_u = w_u max(1 - lr * group * sqrt(p) / ||w_u||, 0)`. Both together are the sparse group lasso. Units that are
    zero are then removed exactly by `plan_zeros` and `shrink`.

        with Proximal(model, optimizer, coupled(model, batch), group=1e-2):
            train(model, optimizer)

    l1, group: from 0 up; with lr * steps of about 10, usual are 1e-4 to 1e-1.
    least: units of every group that are never made zero, at least 1: the largest stay.

    Data: none of its own. A weight is in a unit by its row and in one by its column: groups are treated one after the
    other, a composition of the operators and not that of their sum, but zeros stay zeros. Where the learning rates in a
    unit differ, the largest counts. With Adam the threshold is that of the plain learning rate.

    Use: training or fine-tuning that ends with exactly removable structure. Avoid: an exact budget: it has no target.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        units: Coupled,
        *,
        l1: float = 0.0,
        group: float = 0.0,
        least: int = 1,
    ) -> None:
        if not (l1 >= 0 and group >= 0 and l1 + group > 0 and least >= 1):
            found = f"found l1={l1:g}, group={group:g}, least={least}"
            raise RequestError("Proximal needs a positive strength", found, "for example group=1e-2")
        self.units, self.l1, self.group, self.least = units, l1, group, least
        self._named = units.named(model)
        trained_by(optimizer, self._named)
        self._handle = optimizer.register_step_post_hook(self._after_step)

    def detach(self) -> None:
        """Remove the hook; the weights stay as they are."""
        self._handle.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rate = rates(optimizer, self._named)
        for layer in self.units.layers if self.l1 else ():
            weight = self._named[layer.entity]
            weight.copy_(soft(weight, rate[layer.entity] * self.l1))
        for units in self.units.groups if self.group else ():
            step = max(rate[part.name] for part in units.slices)
            shrink_units_(units, self._named, step * self.group, self.least)


def shrink_units_(units: Units, named: Named, threshold: float, least: int = 1) -> None:
    """The group operator on the coupled units of one group; the `least` largest are left alone if all would go."""
    squares = units.squares(named)
    factor = shrinkage(squares, threshold * units.weights.to(squares).sqrt())
    if int((factor > 0).sum()) < least:
        factor[squares.sort(descending=True, stable=True).indices[:least]] = 1
    units.scale_(named, factor)


def trained_by(optimizer: Optimizer, named: Named) -> None:
    """RequestError unless the optimizer trains all of these parameters."""
    mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
    other = next((name for name, parameter in named.items() if id(parameter) not in mine), None)
    if other:
        raise RequestError(
            f"the optimizer does not train {other}",
            "units become zero as a whole, so that all their weights have to be trained",
            "make the optimizer from model.parameters(), or leave the group out with skip=",
        )


def rates(optimizer: Optimizer, named: Named) -> dict[str, float]:
    """The present learning rate of each parameter."""
    by_id = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
    return {name: by_id[id(parameter)] for name, parameter in named.items()}
