"""Normalization, reductions and pooling."""

from __future__ import annotations

import torch
from torch import Tensor

from prunella.graph.data import Role
from prunella.graph.rules.pointwise import pointwise
from prunella.graph.rules.registry import Context, Returned, Rule, flat, rule, same
from prunella.graph.solve.labels import WHOLE, Reason
from prunella.graph.trace.recorder import Trace, TracedValue

_AFFINE: tuple[Role, ...] = ("scale", "shift")


@rule("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
      "_batch_norm_with_update", "_batch_norm_no_update", "batch_norm")  # fmt: skip
def batch_norm(trace: Trace, ctx: Context) -> Returned:
    """Channels are independent; each is coupled to its scale, shift and statistics."""
    x = ctx.value(0)
    at = min(1, len(x.dims) - 1)
    if not isinstance(ctx.args[3], Tensor) or any(flag is True for flag in ctx.args[5:6]):
        for dim in [d for k, d in enumerate(x.dims) if k != at]:
            trace.freeze(dim, "a batch norm takes its statistics over it")
    roles: tuple[Role, ...] = ("scale", "shift", "stat", "stat")
    for argument, role in zip(ctx.args[1:5], roles, strict=True):
        if isinstance(argument, Tensor) and argument.dim() == 1:
            value = trace.value(argument)
            trace.equal(x.dims[at], value.dims[0], "it enters a batch norm that is not cut")
            trace.role(value.axes[0], role)
    return [TracedValue.plain(x.dims), None, None]


@rule("native_layer_norm", "layer_norm", "rms_norm", "_fused_rms_norm")
def layer_norm(trace: Trace, ctx: Context) -> Returned:
    """Statistics over the last axes, which are frozen; a single axis may take statistics over its kept positions."""
    x, count, text = ctx.value(0), len(ctx.args[1]), "a layer norm takes its statistics over it"
    kept = len(x.dims) - count
    scales = [trace.value(a) for a in ctx.args[2:4] if isinstance(a, Tensor)]
    if count == 1 and trace.along(ctx.args[0], kept, "norm", text):
        dim = x.dims[kept]
        call = trace.call()
        raw = call.kwargs.get("normalized_shape", call.args[1] if len(call.args) > 1 else None)
        trace.link(flat([raw])[0], dim, ctx.shape(0)[kept])
        for value, role in zip(scales, _AFFINE, strict=False):
            dim = trace.equal(dim, value.dims[0], "it enters a layer norm that is not cut")
            trace.role(value.axes[0], role)
        return [TracedValue.plain([*x.dims[:kept], dim]), None, None]
    for dim in (*x.dims[kept:], *(d for value in scales for d in value.dims)):
        trace.freeze(dim, text)
    return [TracedValue.plain([*x.dims[:kept], *[WHOLE] * count]), None, None]


@rule("native_group_norm")
def group_norm(trace: Trace, ctx: Context) -> Returned:
    """Only full groups of channels may be removed, since a part would change the statistics of its group."""
    x, channels, groups = ctx.value(0), int(ctx.args[4]), int(ctx.args[6])
    if groups == 1 and trace.call().name == "group_norm":
        return _one_group(trace, ctx)
    rows, columns = trace.ledger.split(x.dims[1], [groups, channels // groups])
    for dim in (columns, *x.dims[2:]):
        trace.freeze(dim, "a group norm takes its statistics over it")
    call = trace.call()
    raw = call.kwargs.get("num_groups", call.args[1] if len(call.args) > 1 else groups)
    trace.link(raw, rows, groups)
    _affine(trace, ctx)
    return [TracedValue.plain(x.dims), None, None]


def _one_group(trace: Trace, ctx: Context) -> Returned:
    """A single group takes its statistics over the kept channels."""
    x, text = ctx.value(0), "a group norm takes its statistics over it"
    for dim in x.dims[2:]:
        trace.freeze(dim, text)
    trace.along(ctx.args[0], 1, "norm", text)
    _affine(trace, ctx)
    return [TracedValue.plain(x.dims), None, None]


def _affine(trace: Trace, ctx: Context) -> None:
    """Couple the scale and the shift of a group norm to its channels."""
    for argument, role in zip(ctx.args[1:3], _AFFINE, strict=True):
        if isinstance(argument, Tensor):
            value = trace.value(argument)
            trace.equal(ctx.value(0).dims[1], value.dims[0], "it enters a group norm that is not cut")
            trace.role(value.axes[0], role)


@rule("_softmax", "_log_softmax", "cumprod", "sort", "topk", "logcumsumexp", "_safe_softmax", "softmax")
def along(trace: Trace, ctx: Context) -> Returned:
    """Positions along one axis depend on each other: the axis is frozen."""
    value = ctx.value(0)
    number = next(
        int(a) for a in ctx.args[2 if ctx.name == "topk" else 1 :] if isinstance(a, int) and not isinstance(a, bool)
    )
    at, text = number % max(len(value.dims), 1), f"{ctx.name.strip('_')} runs along it"
    soft = ctx.name in _CHOICES and bool(value.dims) and trace.along(ctx.args[0], at, "choice", text)
    if not soft and value.dims:
        trace.freeze(value.dims[at], text)
    if ctx.name in _PICKS:
        trace.numbers[ctx.outputs[1]] = value.dims[at] if soft else WHOLE
    if soft and ctx.name == "topk":
        trace.ledger.min_units += [(layer, int(ctx.args[1])) for layer in value.dims[at]]
    drop_labels = ctx.name in _PICKS or not soft
    dims = [WHOLE if k == at and drop_labels else d for k, d in enumerate(value.dims)]
    return [TracedValue.plain(dims)] * len(ctx.outputs)


_CHOICES = frozenset({"_softmax", "softmax", "_safe_softmax", "topk"})
"""Operations whose results for the kept positions do not change when the others are minus infinity."""
_PICKS = frozenset({"topk", "sort"})


@rule("histc", "bincount")
def histogram(trace: Trace, ctx: Context) -> Returned:
    """Counts of indices: one position for each position of the indexed axis."""
    numbered = trace.numbered(ctx.args[0])
    length = len(ctx.outputs[0])
    if not numbered or len(numbered[0]) != length:
        trace.ledger.freeze(numbered, Reason("its numbers are counted", trace.where()))
        return None
    bounds = dict(zip(("input", "bins", "min", "max"), trace.call().args, strict=False)) | dict(trace.call().kwargs)
    size, last = bounds.get("bins", bounds.get("minlength")), bounds.get("max")
    trace.link(size, numbered, length)
    if last is not None:
        trace.link(last + 1, numbered, length)
    trace.counts[ctx.outputs[0]] = True
    return TracedValue.plain([numbered])


@rule("cumsum")
def running_sum(trace: Trace, ctx: Context) -> Returned:
    """A removed position has count 0 and may be removed from a sum of counts; other sums freeze their axis."""
    if ctx.args[0] not in trace.counts:
        return along(trace, ctx)
    trace.counts[ctx.outputs[0]] = True
    return same(ctx.value(0))


@rule("sum", "mean", "amax", "amin", "max", "min", "prod", "var", "std", "var_mean", "std_mean", "logsumexp", "argmax",
      "argmin", "any", "all", "norm", "linalg_vector_norm", "median", "nansum", "count_nonzero")  # fmt: skip
def reduction(trace: Trace, ctx: Context) -> Returned:
    """Reduced axes are frozen: fewer terms would change the result."""
    if ctx.name in {"max", "min"} and len(ctx.args) > 1 and isinstance(ctx.args[1], Tensor):
        return pointwise(trace, ctx)
    value, ndim = ctx.value(0), len(ctx.shape(0))
    out = ctx.outputs[0].dim()
    axes = next(iter(ctx.args[2 if ctx.name in _NORMS else 1 :]), None)
    if axes is None or isinstance(axes, bool | torch.dtype) or (isinstance(axes, list | tuple) and not axes):
        reduced = set(range(ndim))
    else:
        reduced = {int(k) % ndim for k in flat([axes])}
    zeros = value.zeroed and _zeros_add_nothing(ctx)
    alone = _is_statistic(trace, ctx) and sum(bool(value.dims[k]) for k in reduced) == 1
    for k in () if zeros else reduced:
        text = "a mean is taken over it" if ctx.name == "mean" else f"{ctx.name} is taken over it"
        if alone and value.dims[k]:
            trace.along(ctx.args[0], k, "norm", text)
            if "std" in ctx.name or "var" in ctx.name:  # a single position has no deviation
                trace.ledger.min_units += [(layer, 2) for layer in value.dims[k]]
        else:
            trace.freeze(value.dims[k], text)
    kept = [WHOLE if k in reduced else d for k, d in enumerate(value.dims)]
    dims = kept if out == ndim else [d for k, d in enumerate(kept) if k not in reduced]
    return [TracedValue(tuple(dims), (None,) * len(dims), value.weight, zeros)] * len(ctx.outputs)


_STATISTICS = frozenset("mean var std var_mean std_mean norm linalg_vector_norm".split())


def _is_statistic(trace: Trace, ctx: Context) -> bool:
    """Whether the result is a statistic of a norm: a mean, a deviation, a norm of vectors, or a sum of squares."""
    return ctx.name in _STATISTICS or (ctx.name == "sum" and ctx.args[0] in trace.squares)


def _zeros_add_nothing(ctx: Context) -> bool:
    """Whether zeros do not change the result: true of a sum, and of a norm of positive order."""
    order = 2 if len(ctx.args) < 2 or ctx.args[1] is None else ctx.args[1]
    return ctx.name == "sum" or (ctx.name in _NORMS and isinstance(order, int | float) and order > 0)


_NORMS = frozenset({"norm", "linalg_vector_norm"})


@rule("_weight_norm_interface")
def weight_norm(trace: Trace, ctx: Context) -> Returned:
    """`g * v / |v|`, a norm for each position of one axis, to which `g` is coupled; zeros add nothing to a norm."""
    v, g, at = ctx.value(0), ctx.value(1), ctx.dim(2, len(ctx.shape(0)))
    for k, dim in enumerate(v.dims):
        if k != at and not v.zeroed:
            trace.freeze(dim, "a weight norm takes its norm over it")
    coupled = trace.equal(v.dims[at], g.dims[at], "the scale of its weight norm is not cut")
    dims = [coupled if k == at else dim for k, dim in enumerate(v.dims)]
    return [TracedValue(tuple(dims), v.axes, v.weight and g.weight, v.zeroed), None]


def _spatial(count: int) -> Rule:
    def pool(trace: Trace, ctx: Context) -> Returned:
        """Acts inside each channel along the last axes, which are frozen."""
        value = ctx.value(0)
        kept = len(value.dims) - count
        for dim in value.dims[kept:]:
            trace.freeze(dim, f"{ctx.name} slides along it")
        return [TracedValue.plain([*value.dims[:kept], *[WHOLE] * count])] * len(ctx.outputs)

    return pool


@rule("torchvision.roi_align", "torchvision.roi_pool")
def region(trace: Trace, ctx: Context) -> Returned:
    """Regions of an image, pooled inside each channel: `(N, C, H, W)` and `(K, 5)` to `(K, C, h, w)`."""
    value = ctx.value(0)
    for dim in (*value.dims[2:], value.dims[0], *ctx.value(1).dims):
        trace.freeze(dim, f"{ctx.name} takes regions of it")
    return [TracedValue.plain([WHOLE, value.dims[1], WHOLE, WHOLE])] * len(ctx.outputs)


for _count, _names in {
    1: "max_pool1d avg_pool1d adaptive_avg_pool1d upsample_nearest1d upsample_linear1d reflection_pad1d "
    "replication_pad1d",
    2: "max_pool2d max_pool2d_with_indices avg_pool2d adaptive_avg_pool2d _adaptive_avg_pool2d adaptive_max_pool2d "
    "upsample_nearest2d upsample_bilinear2d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa "
    "reflection_pad2d replication_pad2d mkldnn_max_pool2d",
    3: "max_pool3d_with_indices avg_pool3d adaptive_avg_pool3d _adaptive_avg_pool3d upsample_nearest3d "
    "upsample_trilinear3d",
}.items():
    rule(*_names.split())(_spatial(_count))
