"""Sums of rows by number, sparse products, Fourier transforms: one axis is mixed, the others pass.

Message passing in graphs sums the features of the neighbors of a node. Nodes are addressed by number and are kept; each
feature is summed independently.
"""

from __future__ import annotations

from torch import Tensor

from prunella.graph.rules.registry import Context, Returned, barrier, rule
from prunella.graph.solve.labels import WHOLE, Dim
from prunella.graph.trace.recorder import Trace, TracedValue


@rule("scatter", "scatter_add", "scatter_reduce")
def scatter(trace: Trace, ctx: Context) -> Returned:
    """Values go to numbered positions of one axis, which is frozen; on the others the operands are equal."""
    value, at = ctx.value(0), ctx.dim(1, len(ctx.shape(0)))
    others = [ctx.args[k] for k in (2, 3) if isinstance(ctx.args[k], Tensor)]
    dims = list(value.dims)
    for tensor in others:
        for k, dim in enumerate(trace.value(tensor).dims):
            dims[k] = _met(trace, ctx, dims[k], dim, at=k == at, same=tensor.shape[k] == ctx.shape(0)[k])
    return TracedValue.plain([WHOLE if k == at else dim for k, dim in enumerate(dims)])


def _met(trace: Trace, ctx: Context, dim: Dim, other: Dim, *, at: bool, same: bool) -> Dim:
    """One axis of two operands: positions by number, or the same positions of both."""
    if same and not at:
        return trace.equal(dim, other, f"it meets a tensor that is not cut in {ctx.name}")
    for labels in (dim, other):
        trace.freeze(labels, f"{ctx.name} numbers its positions" if at else f"{ctx.name} leaves a part of it out")
    return WHOLE


@rule("segment_reduce")
def segments(trace: Trace, ctx: Context) -> Returned:
    """Sums of runs of positions along one axis, which is frozen."""
    value, at = ctx.value(0), ctx.dim(5, len(ctx.shape(0)))
    trace.freeze(value.dims[at], "its segments are reduced")
    return TracedValue.plain([WHOLE if k == at else dim for k, dim in enumerate(value.dims)])


@rule("_sparse_addmm")
def sparse_product(trace: Trace, ctx: Context) -> Returned:
    """A sparse matrix, such as that of a graph, by a dense one: rows are mixed, columns pass."""
    columns = ctx.value(2).dims[1]
    for dim in (*ctx.value(1).dims, ctx.value(2).dims[0]):
        trace.freeze(dim, "it is multiplied with a sparse tensor")
    if any(ctx.value(0).dims):
        columns = trace.equal(columns, ctx.value(0).dims[-1], "it is added to a tensor that is not cut")
    return TracedValue.plain([WHOLE, columns])


@rule("_fft_r2c", "_fft_c2c", "_fft_c2r")
def fourier(trace: Trace, ctx: Context) -> Returned:
    """A transform along some axes, which are frozen; the others pass."""
    value = ctx.value(0)
    mixed = {int(k) % len(value.dims) for k in ctx.args[1]}
    for k in mixed:
        trace.freeze(value.dims[k], f"the operation {ctx.name} has no rule for the axis that it transforms")
    return TracedValue.plain([WHOLE if k in mixed else dim for k, dim in enumerate(value.dims)])


@rule("view_as_real", "view_as_complex")
def parts_of_complex(trace: Trace, ctx: Context) -> Returned:
    """Real and imaginary parts as a last axis of two positions."""
    value = ctx.value(0)
    if ctx.name == "view_as_real":
        return TracedValue((*value.dims, WHOLE), (*value.axes, None), value.weight)
    trace.freeze(value.dims[-1], "it holds the real and the imaginary part")
    return TracedValue(value.dims[:-1], value.axes[:-1], value.weight)


@rule("as_strided")
def restrided(trace: Trace, ctx: Context) -> Returned:
    """The same elements in another memory format, as pooling writes for channels_last; anything else is a barrier."""
    shape, steps, offset = tuple(ctx.args[1]), tuple(ctx.args[2]), ctx.args[3]
    source = ctx.args[0]
    long = [k for k, size in enumerate(shape) if size > 1]
    alike = shape == tuple(source.shape) and all(steps[k] == source.stride(k) for k in long)
    if not alike or offset not in (None, source.storage_offset()):
        return barrier(trace, ctx)
    return ctx.value(0)
