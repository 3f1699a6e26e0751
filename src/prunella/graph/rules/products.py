"""Matrix products and convolutions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from prunella.graph.rules.registry import Context, Returned, barrier, rule
from prunella.graph.solve.labels import WHOLE, Dim, Reason, merge
from prunella.graph.trace.recorder import Trace, TracedValue, Use


def _contract(trace: Trace, ctx: Context, a: TracedValue, b: TracedValue, i: int, j: int) -> None:
    """Sum over dim `i` of `a` and dim `j` of `b`: a cut is exact only if it removes the position's term."""
    trace.equal(a.dims[i], b.dims[j], f"it is multiplied with a tensor that is not cut in {ctx.name}")
    if not (a.weight or b.weight):
        trace.freeze(a.dims[i], "two activations are multiplied and summed over it")


def _use(
    trace: Trace, a: TracedValue, b: TracedValue, contracted: tuple[int, int], free: int, bias: TracedValue | None
) -> Use | None:
    """The layer of a product, if `b` is a parameter and `a` an activation."""
    inner, outer = b.axes[contracted[1]], b.axes[free]
    if a.weight or not b.weight or inner is None or outer is None or inner[0] != outer[0]:
        return None
    trace.role(outer, "out")
    trace.role(inner, "in")
    name = bias.axes[-1][0] if bias and bias.weight and bias.axes and bias.axes[-1] else None
    if bias and name:
        trace.role(bias.axes[-1], "bias")
    return Use(outer[0], outer[1], inner[1], 1, "linear", name, trace.module())


@rule("mm", "addmm")
def mm(trace: Trace, ctx: Context) -> Returned:
    """`(m, k) @ (k, n)`: the inner axes are equal."""
    first = 1 if ctx.name == "addmm" else 0
    a, b = ctx.value(first), ctx.value(first + 1)
    n = ctx.shape(first + 1)[1]
    _contract(trace, ctx, a, b, 1, 0)
    bias = ctx.value(0) if first else None
    use = _use(trace, a, b, (1, 0), 1, bias) or _use(trace, b, a, (0, 1), 0, bias)
    dims = [a.dims[0], b.dims[1]]
    if bias and bias.dims and ctx.shape(0)[-1] == n:
        trace.equal(dims[1], bias.dims[-1], "its bias is not cut")
    trace.use = use
    zeroed = a.zeroed and b.zeroed and not first
    return TracedValue(tuple(dims), (a.axes[0], b.axes[1]), a.weight and b.weight, zeroed)


@rule("bmm", "baddbmm")
def bmm(trace: Trace, ctx: Context) -> Returned:
    """`(b, m, k) @ (b, k, n)`: batch and inner axes are equal."""
    first = 1 if ctx.name == "baddbmm" else 0
    a, b = ctx.value(first), ctx.value(first + 1)
    batch = ctx.shape(first)[0]
    outer = trace.equal(a.dims[0], b.dims[0], "it is the batch of a product with a tensor that is not cut")
    trace.ledger.batched += [*a.dims[0], *b.dims[0]]
    _contract(trace, ctx, a, b, 2, 1)
    use = None
    if batch == 1 or _stack(b):
        use = _use(trace, a, b, (2, 1), 2, None)
    if use is None and (batch == 1 or _stack(a)):
        use = _use(trace, b, a, (1, 2), 1, None)
    trace.use = use
    dims = [outer, a.dims[1], b.dims[2]]
    if first:
        for k_out, dim in enumerate(ctx.value(0).dims[-3:]):
            if ctx.shape(0)[k_out] == ctx.outputs[0].shape[k_out]:
                trace.equal(dims[k_out], dim, "it is added to a tensor that is not cut")
    return TracedValue(tuple(dims), (None,) * 3, a.weight and b.weight)


def _stack(value: TracedValue) -> bool:
    """Whether all three axes are those of one parameter: a stack of matrices."""
    entities = {axis[0] for axis in value.axes if axis is not None}
    return value.weight and len(entities) == 1 and None not in value.axes


@rule("_grouped_mm", "transformers.grouped_mm_fallback")
def grouped_mm(trace: Trace, ctx: Context) -> Returned:
    """`(tokens, k)` by the matrix `(k, n)` of each token's expert, from `(experts, k, n)`; rows align to 16 bytes."""
    a, b = ctx.value(0), ctx.value(1)
    if len(a.dims) != 2 or len(b.dims) != 3:
        return barrier(trace, ctx)
    _send(trace, ctx, b.dims[0])
    trace.role(b.axes[0], "out")
    _contract(trace, ctx, a, b, 1, 1)
    use = _use(trace, a, b, (1, 1), 2, None)
    if ctx.name == "_grouped_mm":
        for dim in (b.dims[1], b.dims[2]):
            trace.multiple(dim, 16 // ctx.args[1].element_size())
    trace.use = use
    return TracedValue.plain([WHOLE, b.dims[2]])


def _send(trace: Trace, ctx: Context, experts: Dim) -> None:
    """Tokens are sent to experts by index: both are frozen, unless the indices follow the experts."""
    text, ends = "tokens are sent to its positions by number", ctx.args[2]
    if isinstance(ends, Tensor) and ends in trace.counts:
        trace.equal(experts, trace.value(ends).dims[0], text)
        trace.ledger.freeze(experts, Reason(text, trace.where(), "route"))
    else:
        trace.freeze(experts, text)


@rule("mv", "dot", "vdot")
def vector_product(trace: Trace, ctx: Context) -> Returned:
    """`(m, k) @ (k)` or `(k) @ (k)`."""
    a, b = ctx.value(0), ctx.value(1)
    _contract(trace, ctx, a, b, len(a.dims) - 1, 0)
    if a.weight != b.weight:
        trace.role(a.axes[-1] if a.weight else b.axes[0], "in")
        if a.weight and len(a.dims) == 2:
            trace.role(a.axes[0], "out")
    return TracedValue(a.dims[:-1], (None,) * (len(a.dims) - 1), a.weight and b.weight)


@rule("convolution", "_convolution", "mkldnn_convolution", "cudnn_convolution")
def convolution(trace: Trace, ctx: Context) -> Returned:
    """Input and output channels are coupled to those of the weight; groups lose equal numbers of channels."""
    x, w = ctx.value(0), ctx.value(1)
    transposed, groups = bool(ctx.args[6]), int(ctx.args[8])
    shape = ctx.shape(1)
    o, i = (1, 0) if transposed else (0, 1)
    batched = len(x.dims) == len(shape)
    channels = x.dims[1 if batched else 0]
    if groups == 1:
        trace.equal(channels, w.dims[i], "it enters a convolution whose weight is not cut")
        outer = w.dims[o]
    else:
        outer = _grouped(trace, channels, w, shape, groups, transposed)
    space = [dim if _pointwise(ctx, k) else WHOLE for k, dim in enumerate(x.dims[2 if batched else 1 :])]
    slid = [dim for dim, kept in zip(x.dims[-len(space) :], space, strict=True) if kept is WHOLE]
    for dim in (*slid, *w.dims[2:]):
        trace.freeze(dim, "a convolution slides along it")
    bias = ctx.value(2) if ctx.args[2] is not None else None
    if bias:
        trace.equal(outer, bias.dims[0], "its bias is not cut")
    trace.use = _convolution_use(trace, w, (o, i), groups, transposed, bias)
    dims = [outer, *space]
    return TracedValue.plain([x.dims[0], *dims] if batched else dims)


def _pointwise(ctx: Context, axis: int) -> bool:
    """Whether every position of this axis of the image enters one position of the output, the same."""
    if ctx.name not in {"convolution", "_convolution"}:  # the others have their arguments in another order
        return False
    stride, padding, extra = (ctx.args[k] for k in (3, 4, 7))
    step, around = (entry[axis if len(entry) > 1 else 0] for entry in (stride, padding))
    return bool(ctx.shape(1)[2 + axis] == 1 and step == 1 and around == 0 and not any(extra))


def _grouped(trace: Trace, channels: Dim, w: TracedValue, shape: Sequence[int], groups: int, transposed: bool) -> Dim:
    """Channels factor into `(groups, channels per group)` on both sides; both sides share the groups."""
    inner = shape[0] // groups if transposed else shape[1]
    rows, columns = trace.ledger.split(channels, [groups, inner])
    if transposed:
        trace.equal(channels, w.dims[0], "it enters a convolution whose weight is not cut")
        outer = merge([rows, w.dims[1]], [groups, shape[1]])
    else:
        out_rows, _ = trace.ledger.split(w.dims[0], [groups, shape[0] // groups])
        rows = trace.equal(rows, out_rows, "it enters a grouped convolution whose weight is not cut")
        trace.equal(columns, w.dims[1], "it enters a grouped convolution whose weight is not cut")
        outer = w.dims[0]
    call = trace.call()
    raw = call.kwargs.get("groups", call.args[-1] if len(call.args) > 6 else groups)
    if "transpose" in call.name and "groups" not in call.kwargs:
        raw = call.args[6] if len(call.args) > 6 else groups
    trace.link(raw, rows, groups)
    return outer


def _convolution_use(trace: Trace, w: TracedValue, at: tuple[int, int], groups: int, transposed: bool,
                     bias: TracedValue | None) -> Use | None:  # fmt: skip
    outer, inner = w.axes[at[0]], w.axes[at[1]]
    if not w.weight or outer is None or inner is None or outer[0] != inner[0]:
        return None
    trace.role(outer, "out")
    trace.role(inner, "in")
    name = bias.axes[0][0] if bias and bias.weight and bias.axes[0] else None
    if bias and name:
        trace.role(bias.axes[0], "bias")
    op = "conv_transpose" if transposed else "conv"
    return Use(outer[0], outer[1], inner[1], groups, op, name, trace.module())
