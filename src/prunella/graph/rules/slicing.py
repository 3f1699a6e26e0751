"""Slices, splits, paddings and shuffles of an axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from prunella.graph.data import ReasonKind
from prunella.graph.rules.registry import Context, Returned, flat, rule
from prunella.graph.solve.labels import WHOLE, Dim, Reason, merge, take
from prunella.graph.trace.recorder import Trace, TracedValue
from prunella.graph.trace.tracked_int import Tracked, plain


@rule("slice")
def slice_(trace: Trace, ctx: Context) -> Returned:
    """A range of positions; literal bounds in the source freeze the axis."""
    value, ndim = ctx.value(0), len(ctx.shape(0))
    at = ctx.dim(1, ndim)
    size, step = ctx.shape(0)[at], int(ctx.args[4] or 1)
    start = _bound(ctx.args[2], size, 0)
    stop = _bound(ctx.args[3], size, size)
    dim = value.dims[at]
    if dim and trace.call().name == "narrow":
        _link_narrow(trace, dim, start, stop)
    elif dim and (start, stop, step) != (0, size, 1):
        if step != 1:
            return _every(trace, value, at, size, (start, stop, step))
        for raw, bound, edge in ((ctx.args[2], start, 0), (ctx.args[3], stop, size)):
            if bound != edge:
                _link_bound(trace, dim, int(raw), bound)
        if trace.call().name not in {"__getitem__", "__setitem__", "slice"}:
            trace.freeze(dim, f"{trace.call().name} slices it")
    dims, axes = list(value.dims), list(value.axes)
    if (start, stop, step) != (0, size, 1):
        dims[at], axes[at] = take(dim, slice(start, stop, step)), None
        dims[at] = dims[at] if len(range(start, stop, step)) > 1 else _only(trace, dims[at])
    return TracedValue(tuple(dims), tuple(axes), value.weight)


def _every(trace: Trace, value: TracedValue, at: int, size: int, bounds: tuple[int, int, int]) -> TracedValue:
    """Every `step`-th position: only full blocks of `step` positions may be removed, which preserves the step."""
    start, stop, step = bounds
    dims, axes = list(value.dims), list(value.axes)
    axes[at] = None
    if size % step or start >= step or stop != size:
        trace.freeze(dims[at], "it is sliced with a step")
        dims[at] = take(dims[at], slice(start, stop, step))
    else:
        dims[at], inside = trace.ledger.split(dims[at], [size // step, step])
        trace.freeze(inside, "it is sliced with a step")
    return TracedValue(tuple(dims), tuple(axes), value.weight)


def _only(trace: Trace, dim: Dim) -> Dim:
    trace.freeze(dim, "a single position is taken")
    return WHOLE


def _bound(raw: Any, size: int, default: int) -> int:
    if raw is None:
        return default
    value = int(raw)
    return min(max(value + size if value < 0 else value, 0), size)


def _link_narrow(trace: Trace, dim: Dim, start: int, stop: int) -> None:
    """`narrow(dim, start, length)`: the numbers of positions before the start and in the slice follow the source."""
    call = trace.call()
    raw = dict(zip(("input", "dim", "start", "length"), call.args, strict=False)) | dict(call.kwargs)
    if isinstance(raw["start"], int) and plain(raw["start"]) < 0:
        trace.freeze(dim, "it is narrowed from the end")
    trace.link(raw["start"], take(dim, slice(0, start)), start)
    trace.link(raw["length"], take(dim, slice(start, stop)), stop - start)


def _link_bound(trace: Trace, dim: Dim, raw: int, bound: int) -> None:
    """The number of positions before a bound, or after a bound counted from the end, must follow the source."""
    source = _raw_bound(trace, raw)
    if raw >= 0:
        trace.link(source, take(dim, slice(0, bound)), bound)
    elif isinstance(source, Tracked):
        trace.link(-source, take(dim, slice(bound, None)), -raw)
    else:
        trace.freeze(take(dim, slice(bound, None)), f"the bound {raw} is typed into the source", ReasonKind.SOURCE)


def _raw_bound(trace: Trace, bound: int) -> int:
    """The Python argument behind a slice bound: tracked if the source computes it, else the number itself."""
    call = trace.call()
    raw: list[Any] = list(call.args[2:4]) if call.name == "slice" else []
    for item in flat(call.args[1:]):
        raw += [item.start, item.stop] if isinstance(item, slice) else []
    match = [r for r in raw if isinstance(r, Tracked) and plain(r) == bound]
    literal = [r for r in raw if type(r) is int and r == bound]
    return match[0] if match and not literal else bound


@rule("select")
def select(trace: Trace, ctx: Context) -> Returned:
    """One position of an axis, which is therefore frozen."""
    value, ndim = ctx.value(0), len(ctx.shape(0))
    at = ctx.dim(1, ndim)
    trace.freeze(value.dims[at], "one position is selected by number")
    keep = [k for k in range(ndim) if k != at]
    return TracedValue(tuple(value.dims[k] for k in keep), tuple(value.axes[k] for k in keep), value.weight)


@rule("unbind")
def unbind(trace: Trace, ctx: Context) -> Returned:
    """One tensor per position of an axis, which is therefore frozen."""
    value, ndim = ctx.value(0), len(ctx.shape(0))
    at = ctx.dim(1, ndim)
    trace.freeze(value.dims[at], "it is unpacked into separate tensors")
    keep = [k for k in range(ndim) if k != at]
    return [TracedValue.plain([value.dims[k] for k in keep])] * len(ctx.outputs)


@rule("split", "split_with_sizes", "chunk")
def split(trace: Trace, ctx: Context) -> Returned:
    """Equal slices lose the same positions; the sizes of unequal slices follow the source."""
    value, ndim = ctx.value(0), len(ctx.shape(0))
    at = ctx.dim(2, ndim)
    dim, sizes = value.dims[at], [int(t.shape[at]) for t in ctx.outputs]
    slices: list[Dim] = [WHOLE] * len(sizes)
    if dim:
        slices = _equal_slices(trace, dim, sizes) if len(set(sizes)) == 1 else _unequal_slices(trace, dim, sizes)
    values = []
    for slice_dim in slices:
        dims, axes = list(value.dims), list(value.axes)
        if len(sizes) > 1:
            dims[at], axes[at] = slice_dim, None
        values.append(TracedValue(tuple(dims), tuple(axes), value.weight))
    return values


def _raw_sizes(trace: Trace, count: int) -> list[Any]:
    """Raw sizes of a split, one per slice; empty if the call gives a number of slices instead."""
    call = trace.call()
    if call.name not in {"split", "split_with_sizes"}:
        return []
    raw = (
        call.args[1] if len(call.args) > 1 else call.kwargs.get("split_size_or_sections", call.kwargs.get("split_size"))
    )
    return list(raw) if isinstance(raw, tuple | list) else [raw] * count


def _equal_slices(trace: Trace, dim: Dim, sizes: Sequence[int]) -> list[Dim]:
    if len(sizes) == 1:
        return [dim]
    rows, columns = trace.ledger.split(dim, [len(sizes), sizes[0]])
    raw = _raw_sizes(trace, len(sizes))
    if not raw and trace.call().name not in {"chunk", "glu"}:
        trace.freeze(columns, f"{trace.call().name} hides where its sizes come from", ReasonKind.SOURCE)
    for size in raw:
        trace.link(size, columns, sizes[0])
    trace.ledger.freeze(rows, Reason("every piece of a split is kept"))
    return [columns if sizes[0] > 1 else WHOLE] * len(sizes)


def _unequal_slices(trace: Trace, dim: Dim, sizes: Sequence[int]) -> list[Dim]:
    raw = _raw_sizes(trace, len(sizes))
    slices, start = [], 0
    for k, size in enumerate(sizes):
        slice_dim = take(dim, slice(start, start + size))
        start += size
        if len(raw) == len(sizes) and len({plain(n) for n in raw}) > 1:
            trace.link(raw[k], slice_dim, size)
        else:
            trace.freeze(slice_dim, "it is split into pieces that are not equal")
        slices.append(slice_dim if size > 1 else _only(trace, slice_dim))
    return slices


@rule("flip")
def flip(trace: Trace, ctx: Context) -> Returned:
    """Positions in reverse."""
    value, ndim = ctx.value(0), len(ctx.shape(0))
    flipped = {int(k) % ndim for k in ctx.args[1]}
    return TracedValue.plain([take(d, slice(None, None, -1)) if k in flipped else d for k, d in enumerate(value.dims)])


@rule("constant_pad_nd")
def pad(trace: Trace, ctx: Context) -> Returned:
    """Constant positions, which are frozen, around the old ones."""
    value, shape, amounts = ctx.value(0), ctx.shape(0), [int(n) for n in ctx.args[1]]
    dims = list(value.dims)
    for k in range(len(amounts) // 2):
        at, before, after = len(shape) - 1 - k, amounts[2 * k], amounts[2 * k + 1]
        if not dims[at] or not (before or after):
            continue
        if before < 0 or after < 0:
            trace.freeze(dims[at], "it is cropped by a negative padding")
            dims[at] = WHOLE
        else:
            dims[at] = trace.ledger.concatenate([WHOLE, dims[at], WHOLE], [before, shape[at], after])
    return TracedValue.plain(dims)


@rule("pixel_shuffle")
def pixel_shuffle(trace: Trace, ctx: Context) -> Returned:
    """`(N, C * r * r, H, W)` to `(N, C, H * r, W * r)`: r * r neighbors form one unit."""
    value, shape, factor = ctx.value(0), ctx.shape(0), int(ctx.args[1])
    channels, inner = trace.ledger.split(value.dims[-3], [shape[-3] // factor**2, factor**2])
    trace.freeze(inner, "pixel_shuffle moves it into space")
    return TracedValue.plain([*value.dims[:-3], channels, WHOLE, WHOLE])


@rule("pixel_unshuffle")
def pixel_unshuffle(trace: Trace, ctx: Context) -> Returned:
    """`(N, C, H * r, W * r)` to `(N, C * r * r, H, W)`."""
    value, shape, factor = ctx.value(0), ctx.shape(0), int(ctx.args[1])
    channels = merge([value.dims[-3], WHOLE], [shape[-3], factor**2])
    return TracedValue.plain([*value.dims[:-3], channels, WHOLE, WHOLE])


@rule("im2col")
def patches(trace: Trace, ctx: Context) -> Returned:
    """`(N, C, H, W)` to `(N, C * kernel, L)`: the positions of a kernel in one channel form one unit."""
    value, size = ctx.value(0), math.prod(ctx.args[1])
    for dim in value.dims[-2:]:
        trace.freeze(dim, "patches are taken along it")
    return TracedValue.plain([*value.dims[:-3], merge([value.dims[-3], WHOLE], [ctx.shape(0)[-3], size]), WHOLE])


@rule("col2im")
def from_patches(trace: Trace, ctx: Context) -> Returned:
    """`(N, C * kernel, L)` to `(N, C, H, W)`: the sums of the patches of each channel."""
    value, size = ctx.value(0), math.prod(ctx.args[2])
    channels, inner = trace.ledger.split(value.dims[-2], [ctx.shape(0)[-2] // size, size])
    trace.freeze(inner, "the positions of its patches go into space")
    trace.freeze(value.dims[-1], "its patches go into space")
    return TracedValue.plain([*value.dims[:-2], channels, WHOLE, WHOLE])


@rule("glu")
def glu(trace: Trace, ctx: Context) -> Returned:
    """The first half times the sigmoid of the second: both lose the same positions."""
    value, shape = ctx.value(0), ctx.shape(0)
    at = ctx.dim(1, len(shape), -1)
    rows, columns = trace.ledger.split(value.dims[at], [2, shape[at] // 2])
    trace.freeze(rows, "both halves of a gated unit are kept")
    return TracedValue.plain([columns if k == at else d for k, d in enumerate(value.dims)])


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(trace: Trace, ctx: Context) -> Returned:
    """`(g, C / g)` transposed: every part loses the same positions."""
    value, channels, groups = ctx.value(0), ctx.shape(0)[1], int(ctx.args[1])
    sizes = [groups, channels // groups]
    rows, columns = trace.ledger.split(value.dims[1], sizes)
    trace.freeze(rows, "the number of groups of a channel shuffle is kept")
    return TracedValue.plain([value.dims[0], merge([columns, WHOLE], sizes[::-1]), *value.dims[2:]])


@rule("roll")
def roll(trace: Trace, ctx: Context) -> Returned:
    """Positions move along some axes, which are frozen; without axes they move along all."""
    value, ndim = ctx.value(0), len(ctx.shape(0))
    named = flat([ctx.args[2]])
    moved = {int(k) % ndim for k in named} if named else set(range(ndim))
    for k in moved:
        trace.freeze(value.dims[k], "roll moves positions along it")
    return TracedValue.plain([WHOLE if k in moved else dim for k, dim in enumerate(value.dims)])


@rule("index_add", "index_copy", "index_reduce")
def index_add(trace: Trace, ctx: Context) -> Returned:
    """Slices of a source go to numbered positions of one axis, which is frozen; the other axes are equal."""
    value, source, ndim = ctx.value(0), ctx.value(3), len(ctx.shape(0))
    at, text = ctx.dim(1, ndim), f"it meets a tensor that is not cut in {ctx.name}"
    for dim in (value.dims[at], source.dims[at], *ctx.value(2).dims):
        trace.freeze(dim, f"{ctx.name} numbers its positions")
    pairs = enumerate(zip(value.dims, source.dims, strict=True))
    return TracedValue.plain([WHOLE if k == at else trace.equal(one, other, text) for k, (one, other) in pairs])
