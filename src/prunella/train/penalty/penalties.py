"""Penalties for a loss function: functions of the model that make weights or coupled units small."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from prunella.errors import NotSupported, RequestError
from prunella.registry.method import training
from prunella.train.penalty.units import CoupledUnits, Units, parameters
from prunella.types import Loss

Penalty = Callable[[nn.Module], Tensor]
"""A function of the model: one number to add to the loss."""


def penalized(loss: Loss, penalty: Penalty, strength: float = 1.0) -> Loss:
    """`loss(model, batch) + strength * penalty(model)`, for `finetune`, `distill` or your own loop.

    Errors: RequestError for a negative strength.

    Example:

        >>> import torch, prunella as pr
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(6, 4)
        >>> size = lambda model: model[0].weight.abs().sum()
        >>> loss = pr.train.penalized(lambda model, batch: model(batch).square().mean(), size, 0.1)
        >>> loss(model, x).item() > 0
        True
    """
    if not strength >= 0:
        raise RequestError(f"strength={strength:g} is out of range", "it takes numbers from 0 up", "for example 1e-4")

    def total(model: nn.Module, batch: Any) -> Tensor:
        return loss(model, batch) + strength * penalty(model)

    return total


@training(source="Liu et al. 2017, arXiv:1708.06519")
def slimming(units: CoupledUnits) -> Penalty:
    """Network slimming: the L1 norm of the scales of the normalizations that act on prunable channels.

    `sum |gamma|`, each scale once. Returns a function of the model; the paper adds 1e-4 or 1e-5 of it to the loss.
    Data: none of its own. Then plan with the recipe `network_slimming`, shrink, and fine-tune.
    Caveats: the penalty makes small scales, not zeros, and a channel with scale 0 still outputs the constant shift.
    units: from `coupled_units`. Errors: NotSupported without scales.

    Use: networks with batch norm after every convolution. Avoid: networks without, and norms whose scale the next layer
    cancels.
    """
    names = dict.fromkeys(part.name for group in units.groups for part in group.slices if part.role == "scale")
    if not names:
        raise NotSupported(
            "slimming has no scales to penalize", "no normalization with a scale acts on these units", "use group_lasso"
        )

    def penalty(model: nn.Module) -> Tensor:
        return torch.stack([scale.abs().sum() for scale in parameters(model, names).values()]).sum()

    return penalty


@training(source="Yuan and Lin 2006, doi:10.1111/j.1467-9868.2005.00532.x; Wen et al. 2016, arXiv:1608.03665")
def group_lasso(units: CoupledUnits) -> Penalty:
    """Group lasso on the coupled units of the model: the norm of all weights that are removed with a unit.

    `sum over units of sqrt(p_u) ||w_u||`, with p_u the number of weights of the unit. Returns a function of the model.
    Data: none of its own. A weight counts in the unit of its row and in the unit of its column.
    Caveats: gradient descent on the penalty makes small units, not zeros; `Proximal` makes zeros.

    Example:

        >>> import torch, prunella as pr
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(6, 4)
        >>> units = pr.train.coupled_units(model, x)
        >>> penalty = pr.train.group_lasso(units)
        >>> penalty(model).item() > 0
        True

    Use: before pruning by `group_norm`, to leave few large units. Avoid: exact zeros in training: use `Proximal`.
    """
    _check_groups(units)

    def penalty(model: nn.Module) -> Tensor:
        named = units.named(model)
        return torch.stack([(_norms(g.squares(named)) * g.weights.sqrt().to(_first_weight(g, named))).sum()
                            for g in units.groups]).sum()  # fmt: skip

    return penalty


@training(source="Fang et al. 2023, arXiv:2301.12900")
def group_sparsity(units: CoupledUnits, *, alpha: float = 4.0) -> Penalty:
    """Squares of the coupled units, with more weight on small units: sparsity training before structured pruning.

    `sum over units of gamma_u I_u`, with `I_u = sum of w^2` over the unit and, constant in the gradient,
    `gamma_u = 2^(alpha (I_max - I_u) / (I_max - I_min))` within each group: from 1 for the largest unit of the group
    to `2^alpha` for the smallest. Returns a function of the model. Data: none of its own.

    alpha: from 0 up; 0 is plain weight decay on the units, 4 the paper's value.
    Errors: RequestError for a negative alpha, NotSupported without coupled units.

    Example:

        >>> import torch, prunella as pr
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> x = torch.randn(6, 4)
        >>> units = pr.train.coupled_units(model, x)
        >>> penalty = pr.train.group_sparsity(units)
        >>> penalty(model).item() > 0
        True

    Use: before one-shot pruning by `group_norm`, where coupled layers have to agree. Avoid: weights that must not
    change.
    """
    if not alpha >= 0:
        raise RequestError(f"alpha={alpha:g} is out of range", "it takes numbers from 0 up", "4 is usual")
    _check_groups(units)

    def penalty(model: nn.Module) -> Tensor:
        named = units.named(model)
        sums = [group.squares(named) for group in units.groups]
        return torch.stack([(strengths(squares.detach(), alpha) * squares).sum() for squares in sums]).sum()

    return penalty


def strengths(importance: Tensor, alpha: float) -> Tensor:
    """`2^(alpha (max - I) / (max - min))` for each unit; 1 if all units are equal."""
    spread = importance.max() - importance.min()
    part = (importance.max() - importance) / spread.clamp_min(torch.finfo(importance.dtype).tiny)
    return torch.exp2(alpha * part)


def _norms(squares: Tensor) -> Tensor:
    """Norms whose gradient at 0 is 0."""
    return squares.clamp_min(torch.finfo(squares.dtype).tiny).sqrt()


def _first_weight(group: Units, named: dict[str, nn.Parameter]) -> Tensor:
    return named[group.slices[0].name]


def _check_groups(units: CoupledUnits) -> None:
    if not units.groups:
        why = "no channel and no head can be pruned"
        raise NotSupported("there are no coupled units to penalize", why, "plan(...) reports the reasons")
