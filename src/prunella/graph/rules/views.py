"""Views: axes are merged, factored, permuted, expanded, joined."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prunella.graph.data import ReasonKind
from prunella.graph.rules.registry import Context, Returned, barrier, flat, rule
from prunella.graph.solve.labels import WHOLE, Dim, merge, reshape, sources
from prunella.graph.trace.recorder import Trace, TracedValue
from prunella.graph.trace.tracked_int import Attr, Shape, Tracked, leaves, plain


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "_reshape_copy")
def view(trace: Trace, ctx: Context) -> Returned:
    """Axes are merged and factored; sizes in the source must follow the cut."""
    if isinstance(ctx.args[1], torch.dtype):
        return barrier(trace, ctx)
    value, old, new = ctx.value(0), ctx.shape(0), tuple(ctx.outputs[0].shape)
    if old == new:
        dims, axes = list(value.dims), value.axes
    else:
        dims, axes = (
            reshape(trace.ledger, value.dims, old, new),
            tuple(None if k is None else value.axes[k] for k in sources(old, new)),
        )
    _link_sizes(trace, dims, new)
    return TracedValue(tuple(dims), axes, value.weight, value.zeroed)


_ADAPTS = frozenset(
    "linear matmul __matmul__ __rmatmul__ bmm baddbmm addmm mm einsum flatten squeeze unsqueeze "
    "scaled_dot_product_attention batch_norm instance_norm group_norm layer_norm conv1d conv2d conv3d "
    "conv_transpose1d conv_transpose2d conv_transpose3d repeat_interleave view_as reshape_as expand_as softmax "
    "bilinear interpolate pixel_shuffle "
    "pixel_unshuffle channel_shuffle dot mv tensordot ravel rms_norm max_pool1d max_pool2d max_pool3d avg_pool1d "
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool2d adaptive_max_pool1d cosine_similarity "
    "prelu contiguous transpose permute __getitem__ unfold mean sum chunk split stack cat _weight_norm "
    "norm_except_dim".split()
)
"""Calls that compute inner sizes from their tensor arguments."""


def _link_sizes(trace: Trace, dims: Sequence[Dim], new: Sequence[int]) -> None:
    call = trace.call()
    raw = flat(call.args[1:]) + flat(call.kwargs.values())
    if call.name in {"view", "reshape", "_unsafe_view"} and len(raw) == len(new):
        for size, dim, length in zip(raw, dims, new, strict=True):
            trace.link(size, dim, length)
    elif call.name == "unflatten":
        sizes = list(call.kwargs.get("sizes", call.args[2] if len(call.args) > 2 else []))
        start = plain(call.kwargs.get("dim", call.args[1] if len(call.args) > 1 else 0)) % (len(new) - len(sizes) + 1)
        for k, size in enumerate(sizes):
            trace.link(size, dims[start + k], new[start + k])
    elif call.name not in _ADAPTS:
        for dim in dims:
            trace.freeze(dim, f"{call.name or 'a view'} hides where its sizes come from", ReasonKind.SOURCE)


@rule("permute", "t", "transpose", "squeeze", "unsqueeze", "movedim", "swapaxes", "adjoint", "mT")
def rearrange(trace: Trace, ctx: Context) -> Returned:
    """Axes are permuted; axes of one position are inserted or removed."""
    value, shape = ctx.value(0), ctx.shape(0)
    order: list[int | None]
    if ctx.name == "permute":
        order = [int(k) % len(shape) for k in ctx.args[1]]
    elif ctx.name == "t":
        order = [*range(len(shape))][::-1]
    elif ctx.name == "transpose":
        order = [*range(len(shape))]
        a, b = ctx.dim(1, len(shape)), ctx.dim(2, len(shape))
        order[a], order[b] = order[b], order[a]
    elif ctx.name == "squeeze":
        squeezed = ctx.args[1] if len(ctx.args) > 1 else list(range(len(shape)))
        removed = {int(k) % len(shape) for k in flat([squeezed])}
        order = [k for k in range(len(shape)) if k not in removed or shape[k] != 1]
    else:
        order = [*range(len(shape))]
        order.insert(int(ctx.args[1]) % (len(shape) + 1), None)
    dims = tuple(WHOLE if k is None else value.dims[k] for k in order)
    return TracedValue(dims, tuple(None if k is None else value.axes[k] for k in order), value.weight, value.zeroed)


@rule("expand")
def expand(trace: Trace, ctx: Context) -> Returned:
    """New positions are copies: their number follows the requested size."""
    value, old, new = ctx.value(0), ctx.shape(0), tuple(ctx.outputs[0].shape)
    lead = len(new) - len(old)
    call = trace.call()
    raw = flat(call.args[1:]) if call.name in {"expand", "broadcast_to"} else []
    other = next(iter(call.args[_LIKE[call.name] :]), None) if call.name in _LIKE else None
    dims: list[Dim] = []
    for k, size in enumerate(new):
        if k >= lead and old[k - lead] == size:
            dim = value.dims[k - lead]
            if len(raw) == len(new):
                trace.link(raw[k], dim, size)
        elif isinstance(other, Tensor):
            dim = trace.value(other).dims[k]
        elif len(raw) == len(new):
            dim = _requested(raw[k]) or (WHOLE if any(value.dims) else _follows(trace, raw[k], size))
        else:
            dim = trace.ledger.fresh(size) if call.name in {"matmul", "__matmul__", "einsum"} else WHOLE
        dims.append(dim)
    axes = tuple(value.axes[k - lead] if k >= lead and old[k - lead] == new[k] else None for k in range(len(new)))
    return TracedValue(tuple(dims), axes, value.weight)


_LIKE = {"expand_as": 1, "normalize": 0}
"""Calls that expand a tensor to the shape of one of their arguments -> its number."""


def _requested(raw: object) -> Dim:
    """The dim of the requested size, if it is the size of another tensor; otherwise all positions are frozen."""
    if isinstance(raw, Tracked) and isinstance(raw.expression, Shape):
        return raw.expression.dim
    return WHOLE


def _follows(trace: Trace, raw: object, size: int) -> Dim:
    """An axis of identical positions, with a size that the source computes from sizes that may change."""
    if not isinstance(raw, Tracked) or not any(isinstance(leaf, Attr) for leaf in leaves(raw.expression)):
        return WHOLE
    dim = trace.ledger.fresh(size)
    trace.link(raw, dim, size)
    return dim


@rule("zeros", "ones", "empty", "full", "rand", "randn", "new_zeros", "new_ones", "new_empty", "new_full", "arange",
      "scalar_tensor", "eye", "tril_indices", "triu_indices", "linspace", "empty_strided", "new_empty_strided",
      "randint", "randperm")  # fmt: skip
def factory(trace: Trace, ctx: Context) -> Returned:
    """A new tensor: each dim follows the tensor whose size it was created with."""
    call, shape = trace.call(), ctx.outputs[0].shape
    skip = 1 if call.name.startswith("new_") else 0
    raw = flat(call.args[skip : skip + (1 if call.args[skip:] and isinstance(call.args[skip], tuple | list) else 99)])
    if len(raw) < len(shape) or call.name in {"arange", "linspace"}:
        return TracedValue.plain([WHOLE] * len(shape))
    constant = ctx.name.removeprefix("new_") in {"zeros", "ones", "full"}
    follows = [
        _requested(raw[k]) or (_follows(trace, raw[k], size) if constant else WHOLE) for k, size in enumerate(shape)
    ]
    return TracedValue.plain(follows)


@rule("repeat")
def repeat(trace: Trace, ctx: Context) -> Returned:
    """Each position several times."""
    value, old = ctx.value(0), ctx.shape(0)
    counts = [int(n) for n in ctx.args[1]]
    lead = len(counts) - len(old)
    raw = flat(trace.call().args[1:]) if trace.call().name == "repeat" else [None] * len(counts)
    dims: list[Dim] = []
    for k, count in enumerate(counts):
        if k < lead or old[k - lead] == 1:
            dims.append(_requested(raw[k]) or _follows(trace, raw[k], count) if len(raw) == len(counts) else WHOLE)
        else:
            dims.append(merge([WHOLE, value.dims[k - lead]], [count, old[k - lead]]))
    return TracedValue.plain(dims)


@rule("cat")
def cat(trace: Trace, ctx: Context) -> Returned:
    """One axis after the other; the other axes are equal."""
    parts = [t for t in ctx.args[0] if t.dim() and not (t.dim() == 1 and t.shape[0] == 0)]
    values = [trace.value(t) for t in parts]
    ndim = parts[0].dim()
    along = ctx.dim(1, ndim)
    dims: list[Dim] = []
    for k in range(ndim):
        if k == along:
            dims.append(trace.ledger.concatenate([v.dims[k] for v in values], [int(t.shape[k]) for t in parts]))
        else:
            dims.append(_all_equal(trace, [v.dims[k] for v in values], "it is joined with a tensor that is not cut"))
    return TracedValue(tuple(dims), (None,) * ndim, all(v.weight for v in values))


@rule("stack")
def stack(trace: Trace, ctx: Context) -> Returned:
    """A new axis of fixed size; the other axes are equal."""
    values = [trace.value(t) for t in ctx.args[0]]
    ndim = len(values[0].dims)
    text = "it is stacked with a tensor that is not cut"
    dims = [_all_equal(trace, [v.dims[k] for v in values], text) for k in range(ndim)]
    dims.insert(ctx.dim(1, ndim + 1), WHOLE)
    return TracedValue.plain(dims)


def _all_equal(trace: Trace, dims: Sequence[Dim], text: str) -> Dim:
    common = dims[0]
    for dim in dims[1:]:
        common = trace.equal(common, dim, text)
    return common
