"""Lookups of rows and positions by index."""

from __future__ import annotations

import torch
from torch import Tensor

from prunella.graph.rules.registry import Context, Returned, barrier, rule
from prunella.graph.solve.labels import WHOLE, Dim, Reason
from prunella.graph.trace.recorder import Trace, TracedValue


@rule("tril", "triu")
def triangle(trace: Trace, ctx: Context) -> Returned:
    """Positions of the last two axes are compared with each other: both axes are frozen."""
    value = ctx.value(0)
    for dim in value.dims[-2:]:
        trace.freeze(dim, f"{ctx.name} compares its positions")
    return TracedValue.plain([*value.dims[:-2], WHOLE, WHOLE])


@rule("gather", "take_along_dim")
def gather(trace: Trace, ctx: Context) -> Returned:
    """Positions by index along one axis, frozen unless the indices follow it; on the others both are equal."""
    value, index, at = ctx.value(0), ctx.value(2), ctx.dim(1, len(ctx.shape(0)))
    if not _numbered(trace, value.dims[at], ctx.args[2]):
        trace.freeze(value.dims[at], "positions are taken by number")
    trace.freeze(index.dims[at], "positions are taken by number")
    dims: list[Dim] = []
    for k, (one, other) in enumerate(zip(value.dims, index.dims, strict=True)):
        if k != at and ctx.shape(0)[k] == ctx.shape(2)[k]:
            dims.append(trace.equal(one, other, "positions are taken by number"))
            continue
        for dim in () if k == at else (one, other):
            trace.freeze(dim, "positions are taken by number")
        dims.append(WHOLE)
    return TracedValue.plain(dims)


def _numbered(trace: Trace, dim: Dim, index: Tensor) -> bool:
    """Whether `index` numbers the positions of an axis coupled to `dim`; if so, the axes are related."""
    numbers = trace.numbered(index)
    if len(dim) != 1 or len(numbers) != 1 or len(dim[0]) != len(numbers[0]):
        return False
    trace.equal(dim, numbers, "")
    trace.ledger.freeze(dim, Reason("positions are taken by number", trace.where(), "route"))
    return True


@rule("embedding")
def embedding(trace: Trace, ctx: Context) -> Returned:
    """Rows of a table by index: the rows are frozen."""
    table, index = ctx.value(0), ctx.value(1)
    given, text = ctx.args[1] in trace.given, "its rows are looked up by number"
    trace.ledger.freeze(table.dims[0], Reason(text, trace.where(), "lookup" if given else ""))
    trace.tables += [(layer, trace.given[ctx.args[1]]) for layer in table.dims[0] if given]
    trace.role(table.axes[1], "out")
    return TracedValue.plain([*index.dims, table.dims[1]])


@rule("_embedding_bag", "_embedding_bag_forward_only")
def embedding_bag(trace: Trace, ctx: Context) -> Returned:
    """Sums, means or maxima of rows of a table: the rows are frozen, the columns are independent."""
    table = ctx.value(0)
    trace.freeze(table.dims[0], "its rows are looked up by number")
    trace.role(table.axes[1], "out")
    return [TracedValue.plain([WHOLE, table.dims[1]]), None, None, None]


@rule("index_select")
def index_select(trace: Trace, ctx: Context) -> Returned:
    """Positions by index: the axis is frozen."""
    value = ctx.value(0)
    at = ctx.dim(1, len(value.dims))
    trace.freeze(value.dims[at], "positions are taken by number")
    return TracedValue.plain([WHOLE if k == at else d for k, d in enumerate(value.dims)])


@rule("index")
def index(trace: Trace, ctx: Context) -> Returned:
    """Advanced indexing: indexed axes are frozen, other axes pass."""
    value, picked = ctx.value(0), list(ctx.args[1])
    at = [k for k, i in enumerate(picked) if i is not None]
    for k in at:
        if not _numbered(trace, value.dims[k], picked[k]):
            trace.freeze(value.dims[k], "positions are taken by number")
        for dim in trace.value(picked[k]).dims:
            trace.freeze(dim, "it is used as an index")
    if any(picked[k].dtype in {torch.bool, torch.uint8} for k in at):
        for dim in value.dims:
            trace.freeze(dim, "it is indexed by a mask")
        return None
    wide = [WHOLE] * max(picked[k].dim() for k in at)
    rest = [d for k, d in enumerate(value.dims) if k not in at]
    first = at[0] if at == [*range(at[0], at[-1] + 1)] else 0
    return TracedValue.plain([*rest[:first], *wide, *rest[first:]])


@rule("index_put", "_index_put_impl", "_unsafe_index_put")
def index_put(trace: Trace, ctx: Context) -> Returned:
    """Rows written by index: the first axes are frozen, the others are coupled to the values."""
    value, values, picked = ctx.value(0), ctx.value(2), list(ctx.args[1])
    count = len(picked)
    wide = any(i is None or i.dtype in {torch.bool, torch.uint8} for i in picked)
    if wide or len(values.dims) < len(value.dims) - count:
        return barrier(trace, ctx)
    for dim in (*value.dims[:count], *(d for i in picked for d in trace.value(i).dims)):
        trace.freeze(dim, "positions are written by number")
    rest = list(value.dims[count:])
    lead = len(values.dims) - len(rest)
    for k, dim in enumerate(rest):
        if ctx.shape(2)[lead + k] == ctx.shape(0)[count + k]:
            rest[k] = trace.equal(dim, values.dims[lead + k], "it is written into a tensor that is not cut")
        else:
            trace.freeze(dim, "one value is written to all of its positions")
    for dim in values.dims[:lead]:
        trace.freeze(dim, "positions are written by number")
    return TracedValue.plain([*[WHOLE] * count, *rest])
