"""Objectives for a search: agreement with the dense model, without labels, and AMC's reward."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

from prunella.errors import RequestError
from prunella.model.batches import listed
from prunella.model.forward import Outputs, first_tensor, forward
from prunella.model.state import mode


def agreement(
    dense: nn.Module, data: Iterable[Any], *, logits: bool = False, outputs: Outputs = forward
) -> Callable[[nn.Module], float]:
    """An evaluation without labels: the agreement between the outputs of a model and those of `dense`, at most 0.

    `-sum ||y - y_dense||^2 / sum ||y_dense||^2`; with logits=True `-mean KL(softmax(y_dense) || softmax(y))` over the
    last dimension. The outputs of `dense` are computed once and kept. outputs: a function of (model, batch); the first
    tensor of its result is compared.
    """
    cached = listed(data)
    with mode(dense, training=False), torch.no_grad():
        expected = [first_tensor(outputs(dense, batch)).detach() for batch in cached]

    def evaluate(model: nn.Module) -> float:
        with torch.no_grad():
            actual = [first_tensor(outputs(model, batch)) for batch in cached]
        pairs = list(zip(actual, expected, strict=True))
        if logits:
            rows = sum(y.numel() // y.shape[-1] for y in expected)
            return 0.0 - sum(_kl(y, output) for output, y in pairs) / rows
        scale = sum(float(y.double().square().sum()) for y in expected)
        return 0.0 - sum(float((output.double() - y.double()).square().sum()) for output, y in pairs) / max(
            scale, 1e-300
        )

    return evaluate


def _kl(expected: Tensor, actual: Tensor) -> float:
    return float(
        kl_div(log_softmax(actual.double(), -1), log_softmax(expected.double(), -1), log_target=True, reduction="sum")
    )


def amc_reward(error: float, flops: float) -> float:
    """AMC's reward for a search without a fixed budget: `-error * log(flops)` (He et al. 2018, arXiv:1802.03494).

    error: of the cut model, a fraction. flops: its operations, above 1. Less of either is better. With a small error
    the operations have little effect: accuracy comes first.
    Errors: RequestError for numbers out of range.

    Example:

        >>> import prunella as pr
        >>> round(pr.search.amc_reward(error=0.1, flops=1e9), 3)
        -2.072
    """
    if not error >= 0 or not flops > 1:
        raise RequestError(f"amc_reward cannot use error={error:g}, flops={flops:g}", "error >= 0 and flops > 1")
    return -error * math.log(flops)
