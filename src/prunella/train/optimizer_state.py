"""Optimizer state of masked weights: cleared by the shape of each state tensor."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer

from prunella.errors import RequestError
from prunella.types import Mask

ELEMENTWISE = frozenset(
    (
        optim.SGD, optim.Adam, optim.AdamW, optim.NAdam, optim.RAdam, optim.Adamax, optim.Adagrad, optim.Adadelta,
        optim.RMSprop, optim.Rprop, optim.ASGD,
    )
)  # fmt: skip
"""Optimizers in which the step of one weight depends on its own gradient alone."""


def check_optimizer(optimizer: Optimizer) -> None:
    """`RequestError` for an optimizer without state per weight."""
    if isinstance(optimizer, optim.LBFGS):
        raise RequestError(
            "LBFGS cannot train masked weights",
            "it updates all weights along directions that include the masked ones",
            "use an optimizer with state per weight, for example AdamW or SGD",
        )


def mask_gradients(optimizer: Optimizer, masks: Iterable[tuple[nn.Parameter, Mask]]) -> None:
    """Zero the gradients of masked weights before the step of an optimizer that is not element-wise.

    Adafactor averages squared gradients over rows and columns, and Muon orthogonalizes a whole matrix: in both, the
    gradient of a masked weight changes the step of its neighbors. For element-wise optimizers the gradients stay, so
    that growth criteria can read dense gradients after the step.
    """
    if type(optimizer) in ELEMENTWISE:
        return
    with torch.no_grad():
        for parameter, mask in masks:
            if parameter.grad is not None:
                parameter.grad.masked_fill_(~mask, 0)


def clear_state(optimizer: Optimizer, parameter: nn.Parameter, mask: Mask) -> None:
    """Zero the optimizer state of masked weights.

    State of the parameter's shape is cleared where the mask is False. Factored state (one number for a row or a column,
    with axes of length 1) is cleared where the whole row or column is masked.
    """
    if parameter not in optimizer.state:
        return
    with torch.no_grad():
        for key, value in optimizer.state[parameter].items():
            if not isinstance(value, Tensor) or key == "step" or value.dim() != parameter.dim():
                continue
            local_mask = mask.to(value.device)
            if value.shape == parameter.shape:
                value.masked_fill_(~local_mask, 0)
            elif all(a in (1, b) for a, b in zip(value.shape, parameter.shape, strict=True)):
                axes = [axis for axis, size in enumerate(value.shape) if size != parameter.shape[axis]]
                value.masked_fill_(~_any(local_mask, axes), 0)


def _any(mask: Mask, axes: list[int]) -> Mask:
    for axis in axes:
        mask = mask.any(dim=axis, keepdim=True)
    return mask
