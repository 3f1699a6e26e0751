"""Calls that torch does not run in float64, written out for the oracle."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def grouped_product(tokens: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """`grouped_mm`."""
    products = tokens.new_zeros(len(tokens), weights.shape[2])
    start = 0
    for expert, end in enumerate(ends.tolist()):
        products[start:end] = tokens[start:end] @ weights[expert]
        start = end
    return products


def _observed(
    x: Tensor,
    observer_on: Tensor,
    fake_quant_on: Tensor,
    low: Tensor,
    high: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    rate: float,
    least: int,
    most: int,
    axis: int,
    by_position: bool = False,
    symmetric: bool = False,
) -> Tensor:
    """Fake quantization by a moving range of the observed values: per position of `axis`, or per tensor."""
    if observer_on.item():
        others = [k for k in range(x.dim()) if k != axis] if by_position else list(range(x.dim()))
        for bound, extreme in ((low, x.amin(others)), (high, x.amax(others))):
            fresh = bound.shape != extreme.shape or not bool(torch.isfinite(bound).all())
            old = extreme if fresh else bound.clone()
            bound.resize_(extreme.shape).copy_(old + rate * (extreme - old))
        start, end = low.clamp_max(0), high.clamp_min(0)
        if symmetric:
            end = torch.maximum(-start, end)
            start = -end
        step = ((end - start) / (most - least)).clamp_min(torch.finfo(torch.float32).eps)
        scale.resize_(step.shape).copy_(step)
        zero_point.resize_(step.shape).copy_((least - start / step).round().clamp(least, most))
    if not fake_quant_on.item():
        return x
    return (
        _by_position(x, scale, zero_point, axis, least, most)
        if by_position
        else _all(x, scale, zero_point, least, most)
    )


def _by_position(x: Tensor, scale: Tensor, zero_point: Tensor, axis: int, least: int, most: int) -> Tensor:
    shape = [-1 if k == axis % x.dim() else 1 for k in range(x.dim())]
    return _all(x, scale.reshape(shape), zero_point.reshape(shape), least, most)


def _all(x: Tensor, scale: Any, zero_point: Any, least: int, most: int) -> Tensor:
    rounded = ((x / scale).round() + zero_point).clamp(least, most)
    values: Tensor = (rounded - zero_point) * scale
    return values


WRITTEN_OUT: Mapping[str, Callable[..., Tensor]] = {
    "fused_moving_avg_obs_fake_quant": _observed,
    "fake_quantize_per_tensor_affine": _all,
    "fake_quantize_per_channel_affine": _by_position,
}
