"""Pointwise operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from prunella.graph.data import Role
from prunella.graph.rules.registry import Context, Returned, rule, same
from prunella.graph.solve.labels import WHOLE, Dim
from prunella.graph.trace.recorder import Axis, Trace, TracedValue
from prunella.graph.work import tensors_in


@rule("_prelu_kernel", "hardswish", "rsub", "masked_fill", "copy", "where", "native_dropout", "log_sigmoid_forward",
      "normal", "poisson", "binomial")  # fmt: skip
def pointwise(trace: Trace, ctx: Context) -> Returned:
    """Same positions in every operand, with broadcasting."""
    operands = [t for t in tensors_in(ctx.args) if t.dim()]
    if not ctx.outputs:
        return None
    shape = ctx.outputs[0].shape
    dims: list[Dim] = []
    for k, size in enumerate(shape):
        aligned = [d for t in operands if (d := _aligned(trace, t, k, len(shape), size)) is not None]
        dim = aligned[0] if aligned else WHOLE
        for other in aligned[1:]:
            dim = trace.equal(dim, other, f"it meets a tensor that is not cut in {ctx.name}")
        dims.append(dim)
    _pointwise_roles(trace, ctx, operands)
    if (ctx.name == "pow" and ctx.args[1] == 2) or (ctx.name == "mul" and ctx.args[0] is ctx.args[1]):
        trace.squares[ctx.outputs[0]] = True
    first = trace.value(operands[0]) if operands else TracedValue.plain(dims)
    zeroed = _stays_zero(trace, ctx, operands)
    if len(operands) == 1 and len(first.dims) == len(dims):
        return [replace(first, zeroed=zeroed)] * len(ctx.outputs)
    if operands and all(trace.value(t).weight for t in operands):
        return TracedValue(tuple(dims), _shared_axes(trace, operands, len(dims)), True, zeroed)
    return [TracedValue.plain(dims)] * len(ctx.outputs)


def _stays_zero(trace: Trace, ctx: Context, operands: Sequence[Tensor]) -> bool:
    """Whether zeros at removed positions of the full-shape operands give zeros in the result."""
    zeroed = [trace.value(t).zeroed and t.shape == ctx.outputs[0].shape for t in operands]
    if ctx.name == "pow":
        return bool(zeroed) and zeroed[0] and isinstance(ctx.args[1], int | float) and ctx.args[1] > 0
    if ctx.name in {"add", "sub"}:
        return len(zeroed) == 2 and all(zeroed)
    if ctx.name == "mul" or ctx.name in _ZERO_TO_ZERO:
        return any(zeroed)
    return ctx.name == "div" and bool(operands) and ctx.args[0] is operands[0] and zeroed[0]


_ZERO_TO_ZERO = frozenset("neg abs tanh relu sqrt sign sin round".split())


def _aligned(trace: Trace, tensor: Tensor, k: int, ndim: int, size: int) -> Dim | None:
    """The dim of an operand aligned with output dim `k`; None if broadcast."""
    at = k - (ndim - tensor.dim())
    if at < 0 or tensor.shape[at] != size:
        return None
    return trace.value(tensor).dims[at]


def _shared_axes(trace: Trace, operands: Sequence[Tensor], ndim: int) -> tuple[Axis | None, ...]:
    """For a tensor computed from parameters alone: the parameter axis of each dim."""
    full = [trace.value(t).axes for t in operands if t.dim() == ndim]
    return tuple(next((axes[k] for axes in full if axes[k]), None) for k in range(ndim))


def _pointwise_roles(trace: Trace, ctx: Context, operands: Sequence[Tensor]) -> None:
    role: Role = "scale" if ctx.name in {"mul", "div"} else "bias" if ctx.name in {"add", "sub"} else "other"
    for tensor in operands:
        value = trace.value(tensor)
        if value.weight and tensor.dim() == 1 and len(operands) > 1:
            trace.role(value.axes[0], role)


@rule("_fused_moving_avg_obs_fq_helper", "fake_quantize_per_tensor_affine_cachemask",
      "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams", "fake_quantize_per_channel_affine_cachemask",
      "_fake_quantize_learnable_per_tensor_affine", "_fake_quantize_learnable_per_channel_affine")  # fmt: skip
def fake_quantization(trace: Trace, ctx: Context) -> Returned:
    """The same positions, rounded; zeros remain zeros. Ranges and scales per position are coupled to the positions."""
    value = ctx.value(0)
    by_position = "per_channel" in ctx.name or (ctx.name == "_fused_moving_avg_obs_fq_helper" and ctx.args[11])
    if by_position:
        dims = list(value.dims)
        at = int(ctx.args[10 if len(ctx.args) > 10 else 3]) % len(dims)
        for tensor in [t for t in tensors_in(ctx.args[1:]) if t.shape == (ctx.shape(0)[at],)]:
            dims[at] = trace.equal(dims[at], trace.value(tensor).dims[0], _UNSIZED)
        value = replace(value, dims=tuple(dims))
    return [value] * len(ctx.outputs)


_UNSIZED = "the ranges of its quantization are not buffers of its size before the first run"


@rule("clone", "detach", "alias", "_to_copy", "lift_fresh", "lift_fresh_copy", "contiguous", "positive")
def identity(trace: Trace, ctx: Context) -> Returned:
    """The same numbers."""
    return same(ctx.value(0))


@rule("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "fill", "zero", "bernoulli",
      "randint_like", "uniform", "exponential", "geometric", "log_normal", "cauchy", "random")  # fmt: skip
def like(trace: Trace, ctx: Context) -> Returned:
    """Other numbers in a tensor with the same axes."""
    return replace(ctx.value(0), zeroed=False)
