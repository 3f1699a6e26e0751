"""Models of float32 in float64, for the oracle: casts that stay wide, and calls written out that torch does not run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from prunella.model.calls import called


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


class NoDownCast(TorchFunctionMode):
    """Keeps float64 where a model's source casts to float32, so that rounding cannot hide a wrong cut."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), called(func)
        narrow = _WIDE.keys()
        if name in {"float", "half", "bfloat16", "cfloat"} and args and _double(args[0]):
            return args[0]
        written = isinstance(func, torch._ops.OpOverload) and name in _MAKERS  # a program has literal types
        if kwargs.get("dtype") in narrow and (written or (args and _double(args[0]))):
            kwargs["dtype"] = _WIDE[kwargs["dtype"]]
        if name == "element_size" and _double(args[0]):
            return func(*args, **kwargs) // 2
        if func in _BYTES and _double(args[0]):
            return func(*args, **kwargs) // 2
        ends = kwargs.get("offs", args[2] if len(args) > 2 else None)
        if name in {"grouped_mm", "_grouped_mm"} and _double(args[0]) and ends is not None:
            return grouped_product(args[0], args[1], ends)
        if name in WRITTEN_OUT and _double(args[0]) and not kwargs:
            return WRITTEN_OUT[name](*args)
        if name in {"to", "type", "softmax", "log_softmax", "sum", "mean", "cumsum"} and args and _double(args[0]):
            args = tuple(_WIDE.get(a, a) if isinstance(a, torch.dtype) else a for a in args)
        return func(*args, **kwargs)


_WIDE = {
    **dict.fromkeys((torch.float32, torch.float16, torch.bfloat16), torch.float64),
    **dict.fromkeys((torch.complex64, torch.complex32), torch.complex128),
}
_BYTES = (Tensor.nbytes.__get__, Tensor.itemsize.__get__)  # type: ignore[attr-defined]
"""Numbers of bytes, which are those of float32 also where the check computes in float64."""
_MAKERS = frozenset("zeros ones full empty arange scalar_tensor eye linspace new_zeros new_ones new_full".split())
"""Operations that create a tensor of a given type."""


def _double(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.float64, torch.complex128)
