"""What each ATen operation says of the axes of its tensors: one small rule per family of operations.

Movement operations are executed on the labels themselves. Compute operations relate labels. An operation without a
rule is a barrier: every axis that enters it stays, and so does every axis that leaves it.

A rule is `rule(trace, ctx)`; it reads `ctx.args`, relates labels through `trace`, and returns the `Value` of each
output tensor (None: nothing known, all positions stay). Register one for an operation of your own with `@rule`:

    @rule("mylib.scale_channels")
    def scale_channels(trace: Trace, ctx: Context) -> Returned:
        x, gain = ctx.value(0), ctx.value(1)
        return Value.plain([x.dims[0], trace.equal(x.dims[1], gain.dims[0], "scale"), *x.dims[2:]])
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prunella.graph.axes import WHOLE, Dim, Reason, merge, reshape, sources, take
from prunella.graph.provenance import Shape, Tracked, plain
from prunella.graph.structure import Role
from prunella.graph.trace import Axis, Trace, Use, Value, Work

log = logging.getLogger(__name__)
Returned = Value | Sequence[Value | None] | None


@dataclass(frozen=True)
class Context:
    """One operation as it ran."""

    trace: Trace
    name: str
    args: tuple[Any, ...]
    outputs: tuple[Tensor, ...]

    def value(self, k: int) -> Value:
        """Labels of the tensor argument `k`."""
        return self.trace.value(self.args[k])

    def dim(self, k: int, ndim: int, default: int = 0) -> int:
        """The dimension argument `k`, non-negative."""
        raw = self.args[k] if k < len(self.args) else default
        return int(raw) % max(ndim, 1)

    def shape(self, k: int) -> tuple[int, ...]:
        """Shape of the tensor argument `k`."""
        return tuple(self.args[k].shape)


Rule = Callable[[Trace, Context], Returned]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for operations by name: `relu` for `aten.relu` in all forms, `mylib.op` for a custom one."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


def apply_rule(trace: Trace, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    """Find the rule of an operation and note what it says of the outputs."""
    name = _name(func)
    outputs = tuple(_tensors(result))
    ctx = Context(trace, name, _positional(func, args, kwargs), outputs)
    found = RULES.get(name) or (pointwise if torch.Tag.pointwise in func.tags else None)
    try:
        returned = found(trace, ctx) if found else barrier(trace, ctx)
    except Exception as error:
        log.debug("rule of %s failed: %r", name, error)
        returned = barrier(trace, ctx)
    values = [returned] if isinstance(returned, Value) else list(returned or [])
    for k, tensor in enumerate(outputs):
        value = values[k] if k < len(values) else None
        if value is not None and len(value.dims) == tensor.dim():
            trace.values[tensor] = value
        elif tensor not in trace.values:
            trace.values[tensor] = Value.plain([WHOLE] * tensor.dim())


def _name(func: Any) -> str:
    namespace, _, name = func._schema.name.partition("::")
    return name.removesuffix("_") if namespace == "aten" else f"{namespace}.{name}"


def _positional(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """All arguments in the order of the schema, with defaults filled in."""
    found = []
    for k, argument in enumerate(func._schema.arguments):
        default = argument.default_value if argument.has_default_value() else None
        found.append(args[k] if k < len(args) else kwargs.get(argument.name, default))
    return tuple(found)


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    return [t for item in tree for t in _tensors(item)] if isinstance(tree, tuple | list) else []


def _same(value: Value) -> Value:
    return Value(value.dims, value.axes, value.weight)


@rule("_barrier")
def barrier(trace: Trace, ctx: Context) -> Returned:
    """Everything that enters stays."""
    trace.uncounted[ctx.name] = trace.uncounted.get(ctx.name, 0) + 1
    for tensor in _tensors(ctx.args):
        for dim in trace.value(tensor).dims:
            trace.freeze(dim, f"the operation {ctx.name} has no rule")
    return None


# --- pointwise -------------------------------------------------------------------------------------------------------


@rule("_prelu_kernel", "hardswish", "rsub", "masked_fill", "copy", "where", "native_dropout", "log_sigmoid_forward")
def pointwise(trace: Trace, ctx: Context) -> Returned:
    """Same positions in every operand, with broadcasting."""
    operands = [t for t in _tensors(ctx.args) if t.dim()]
    if not ctx.outputs:
        return None
    shape = ctx.outputs[0].shape
    dims: list[Dim] = []
    for k, size in enumerate(shape):
        found = [d for t in operands if (d := _aligned(trace, t, k, len(shape), size)) is not None]
        dim = found[0] if found else WHOLE
        for other in found[1:]:
            dim = trace.equal(dim, other, f"it meets a tensor that is not cut in {ctx.name}")
        dims.append(dim)
    _pointwise_roles(trace, ctx, operands)
    first = trace.value(operands[0]) if operands else Value.plain(dims)
    if len(operands) == 1 and len(first.dims) == len(dims):
        return [_same(first)] * len(ctx.outputs)
    if operands and all(trace.value(t).weight for t in operands):
        return Value(tuple(dims), _shared_axes(trace, operands, len(dims)), True)
    return [Value.plain(dims)] * len(ctx.outputs)


def _aligned(trace: Trace, tensor: Tensor, k: int, ndim: int, size: int) -> Dim | None:
    """The dim of an operand that lines up with output dim `k`, None when it is broadcast."""
    at = k - (ndim - tensor.dim())
    if at < 0 or tensor.shape[at] != size:
        return None
    return trace.value(tensor).dims[at]


def _shared_axes(trace: Trace, operands: Sequence[Tensor], ndim: int) -> tuple[Axis | None, ...]:
    """For a tensor computed from parameters alone: the parameter axis that each dim still is."""
    full = [trace.value(t).axes for t in operands if t.dim() == ndim]
    return tuple(next((axes[k] for axes in full if axes[k]), None) for k in range(ndim))


def _pointwise_roles(trace: Trace, ctx: Context, operands: Sequence[Tensor]) -> None:
    role: Role = "scale" if ctx.name in {"mul", "div"} else "bias" if ctx.name in {"add", "sub"} else "other"
    for tensor in operands:
        value = trace.value(tensor)
        if value.weight and tensor.dim() == 1 and len(operands) > 1:
            trace.role(value.axes[0], role)


@rule("clone", "detach", "alias", "_to_copy", "lift_fresh", "lift_fresh_copy", "contiguous", "zeros_like", "ones_like",
      "empty_like", "full_like", "rand_like", "randn_like", "fill", "zero", "bernoulli", "positive")  # fmt: skip
def identity(trace: Trace, ctx: Context) -> Returned:
    """A tensor of the same axes."""
    return _same(ctx.value(0))


# --- movement --------------------------------------------------------------------------------------------------------


@rule("view", "_unsafe_view", "reshape", "_reshape_alias", "_reshape_copy")
def view(trace: Trace, ctx: Context) -> Returned:
    """Axes are merged and factored; sizes given by the source must follow the cut."""
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
    return Value(tuple(dims), axes, value.weight)


_ADAPTS = frozenset(
    "linear matmul __matmul__ __rmatmul__ bmm baddbmm addmm mm einsum flatten squeeze unsqueeze "
    "scaled_dot_product_attention batch_norm instance_norm group_norm layer_norm conv1d conv2d conv3d conv_transpose1d conv_transpose2d "
    "conv_transpose3d repeat_interleave view_as reshape_as expand_as softmax bilinear interpolate pixel_shuffle "
    "pixel_unshuffle channel_shuffle dot mv tensordot ravel rms_norm max_pool1d max_pool2d max_pool3d avg_pool1d "
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool2d adaptive_max_pool1d cosine_similarity "
    "prelu contiguous transpose permute __getitem__ unfold mean sum chunk split stack cat".split()
)
"""Calls that compute inner sizes from the tensors they are given."""


def _link_sizes(trace: Trace, dims: Sequence[Dim], new: Sequence[int]) -> None:
    call = trace.call()
    raw = _flat(call.args[1:]) + _flat(call.kwargs.values())
    if call.name in {"view", "reshape"} and len(raw) == len(new):
        for size, dim, length in zip(raw, dims, new, strict=True):
            trace.link(size, dim, length)
    elif call.name == "unflatten":
        sizes = list(call.kwargs.get("sizes", call.args[2] if len(call.args) > 2 else []))
        start = plain(call.kwargs.get("dim", call.args[1] if len(call.args) > 1 else 0)) % (len(new) - len(sizes) + 1)
        for k, size in enumerate(sizes):
            trace.link(size, dims[start + k], new[start + k])
    elif call.name not in _ADAPTS:
        for dim in dims:
            trace.freeze(dim, f"{call.name or 'a view'} hides where its sizes come from")


def _flat(items: Any) -> list[Any]:
    found: list[Any] = []
    for item in items:
        found += _flat(item) if isinstance(item, tuple | list | torch.Size) else [item]
    return found


@rule("permute", "t", "transpose", "squeeze", "unsqueeze", "movedim", "swapaxes", "adjoint", "mT")
def rearrange(trace: Trace, ctx: Context) -> Returned:
    """Axes change their places; axes of one position come and go."""
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
        asked = ctx.args[1] if len(ctx.args) > 1 else range(len(shape))
        gone = {int(k) % len(shape) for k in _flat([asked])}
        order = [k for k in range(len(shape)) if k not in gone or shape[k] != 1]
    else:
        order = [*range(len(shape))]
        order.insert(int(ctx.args[1]) % (len(shape) + 1), None)
    dims = tuple(WHOLE if k is None else value.dims[k] for k in order)
    return Value(dims, tuple(None if k is None else value.axes[k] for k in order), value.weight)


@rule("expand")
def expand(trace: Trace, ctx: Context) -> Returned:
    """New positions are copies: they follow the size that asked for them."""
    value, old, new = ctx.value(0), ctx.shape(0), tuple(ctx.outputs[0].shape)
    lead = len(new) - len(old)
    call = trace.call()
    raw = _flat(call.args[1:]) if call.name in {"expand", "broadcast_to"} else []
    other = call.args[1] if call.name == "expand_as" and len(call.args) > 1 else None
    dims: list[Dim] = []
    for k, size in enumerate(new):
        if k >= lead and old[k - lead] == size:
            dim = value.dims[k - lead]
            if len(raw) == len(new):
                trace.link(raw[k], dim, size)
        elif isinstance(other, Tensor):
            dim = trace.value(other).dims[k]
        elif len(raw) == len(new):
            dim = _asked(raw[k])
        else:
            dim = trace.ledger.fresh(size) if call.name in {"matmul", "__matmul__", "einsum"} else WHOLE
        dims.append(dim)
    axes = tuple(value.axes[k - lead] if k >= lead and old[k - lead] == new[k] else None for k in range(len(new)))
    return Value(tuple(dims), axes, value.weight)


def _asked(raw: object) -> Dim:
    """The dim whose size was asked for, when it is the size of another tensor; otherwise all positions stay."""
    if isinstance(raw, Tracked) and isinstance(raw.expression, Shape):
        return raw.expression.dim
    return WHOLE


@rule("zeros", "ones", "empty", "full", "rand", "randn", "new_zeros", "new_ones", "new_empty", "new_full", "arange",
      "scalar_tensor", "eye", "tril_indices", "triu_indices", "linspace", "empty_strided", "new_empty_strided",
      "randint", "randperm")  # fmt: skip
def factory(trace: Trace, ctx: Context) -> Returned:
    """A tensor made here: a dim follows the tensor whose size it was made with."""
    call, shape = trace.call(), ctx.outputs[0].shape
    skip = 1 if call.name.startswith("new_") else 0
    raw = _flat(call.args[skip : skip + (1 if call.args[skip:] and isinstance(call.args[skip], tuple | list) else 99)])
    if len(raw) < len(shape) or call.name in {"arange", "linspace"}:
        return Value.plain([WHOLE] * len(shape))
    return Value.plain([_asked(size) for size in raw[: len(shape)]])


@rule("repeat")
def repeat(trace: Trace, ctx: Context) -> Returned:
    """Each position several times."""
    value, old = ctx.value(0), ctx.shape(0)
    counts = [int(n) for n in ctx.args[1]]
    lead = len(counts) - len(old)
    raw = _flat(trace.call().args[1:]) if trace.call().name == "repeat" else [None] * len(counts)
    dims: list[Dim] = []
    for k, count in enumerate(counts):
        if k < lead or old[k - lead] == 1:
            dims.append(_asked(raw[k]) if len(raw) == len(counts) else WHOLE)
        else:
            dims.append(merge([WHOLE, value.dims[k - lead]], [count, old[k - lead]]))
    return Value.plain(dims)


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
    return Value(tuple(dims), (None,) * ndim, all(v.weight for v in values))


@rule("stack")
def stack(trace: Trace, ctx: Context) -> Returned:
    """A new axis of fixed size; the other axes are equal."""
    values = [trace.value(t) for t in ctx.args[0]]
    ndim = len(values[0].dims)
    text = "it is stacked with a tensor that is not cut"
    dims = [_all_equal(trace, [v.dims[k] for v in values], text) for k in range(ndim)]
    dims.insert(ctx.dim(1, ndim + 1), WHOLE)
    return Value.plain(dims)


def _all_equal(trace: Trace, dims: Sequence[Dim], text: str) -> Dim:
    found = dims[0]
    for dim in dims[1:]:
        found = trace.equal(found, dim, text)
    return found


@rule("slice")
def slice_(trace: Trace, ctx: Context) -> Returned:
    """Some positions; bounds that are typed into the source freeze the axis."""
    value, ndim = ctx.value(0), len(ctx.shape(0))
    at = ctx.dim(1, ndim)
    size, step = ctx.shape(0)[at], int(ctx.args[4] or 1)
    start = _bound(ctx.args[2], size, 0)
    stop = _bound(ctx.args[3], size, size)
    dim = value.dims[at]
    if dim and trace.call().name == "narrow" and (start, stop) == (0, size):
        trace.link(trace.call().kwargs.get("length", trace.call().args[-1]), dim, size)
    if dim and (start, stop, step) != (0, size, 1):
        if step != 1:
            trace.freeze(dim, "it is sliced with a step")
        if trace.call().name == "narrow" and any(type(n) is int and n < 0 for n in trace.call().args[2:3]):
            trace.freeze(dim, "it is narrowed from the end by a number typed into the source")
        for raw, bound, edge in ((ctx.args[2], start, 0), (ctx.args[3], stop, size)):
            if bound != edge:
                _link_bound(trace, dim, int(raw), bound)
        if trace.call().name not in {"__getitem__", "narrow", "__setitem__"}:
            trace.freeze(dim, f"{trace.call().name} slices it")
    dims, axes = list(value.dims), list(value.axes)
    if (start, stop, step) != (0, size, 1):
        dims[at], axes[at] = take(dim, slice(start, stop, step)), None
        dims[at] = dims[at] if len(range(start, stop, step)) > 1 else _only(trace, dims[at])
    return Value(tuple(dims), tuple(axes), value.weight)


def _only(trace: Trace, dim: Dim) -> Dim:
    trace.freeze(dim, "a single position is taken")
    return WHOLE


def _bound(raw: Any, size: int, default: int) -> int:
    if raw is None:
        return default
    value = int(raw)
    return min(max(value + size if value < 0 else value, 0), size)


def _link_bound(trace: Trace, dim: Dim, raw: int, bound: int) -> None:
    """As many positions as before must lie before a bound, or behind it when it is counted from the end."""
    source = _raw_bound(trace, raw)
    if raw >= 0:
        trace.link(source, take(dim, slice(0, bound)), bound)
    elif isinstance(source, Tracked):
        trace.link(-source, take(dim, slice(bound, None)), -raw)
    else:
        trace.freeze(take(dim, slice(bound, None)), f"the bound {raw} is typed into the source")


def _raw_bound(trace: Trace, bound: int) -> int:
    """The Python argument that gave a slice bound: tracked if the source computes it, else the number itself."""
    call = trace.call()
    raw: list[Any] = []
    for item in _flat(call.args[1:]):
        raw += [item.start, item.stop] if isinstance(item, slice) else [item]
    match = [r for r in raw if isinstance(r, Tracked) and plain(r) == bound]
    literal = [r for r in raw if type(r) is int and r == bound]
    return match[0] if match and not literal else bound


@rule("select")
def select(trace: Trace, ctx: Context) -> Returned:
    """One position of an axis, which therefore stays whole."""
    value, ndim = ctx.value(0), len(ctx.shape(0))
    at = ctx.dim(1, ndim)
    trace.freeze(value.dims[at], "one position is selected by number")
    keep = [k for k in range(ndim) if k != at]
    return Value(tuple(value.dims[k] for k in keep), tuple(value.axes[k] for k in keep), value.weight)


@rule("unbind")
def unbind(trace: Trace, ctx: Context) -> Returned:
    """One tensor per position of an axis, which therefore stays whole."""
    value, ndim = ctx.value(0), len(ctx.shape(0))
    at = ctx.dim(1, ndim)
    trace.freeze(value.dims[at], "it is unpacked into separate tensors")
    keep = [k for k in range(ndim) if k != at]
    return [Value.plain([value.dims[k] for k in keep])] * len(ctx.outputs)


@rule("split", "split_with_sizes", "chunk")
def split(trace: Trace, ctx: Context) -> Returned:
    """Equal pieces lose the same positions; unequal ones follow the sizes that the source computes."""
    value, ndim = ctx.value(0), len(ctx.shape(0))
    at = ctx.dim(2, ndim)
    dim, sizes = value.dims[at], [int(t.shape[at]) for t in ctx.outputs]
    pieces: list[Dim] = [WHOLE] * len(sizes)
    if dim:
        pieces = _equal_pieces(trace, dim, sizes) if len(set(sizes)) == 1 else _unequal_pieces(trace, dim, sizes)
    made = []
    for piece in pieces:
        dims, axes = list(value.dims), list(value.axes)
        if len(sizes) > 1:
            dims[at], axes[at] = piece, None
        made.append(Value(tuple(dims), tuple(axes), value.weight))
    return made


def _raw_sizes(trace: Trace, count: int) -> list[Any]:
    """Raw sizes of a split, one per piece; empty when the call gives a number of pieces instead."""
    call = trace.call()
    if call.name not in {"split", "split_with_sizes"}:
        return []
    raw = (
        call.args[1] if len(call.args) > 1 else call.kwargs.get("split_size_or_sections", call.kwargs.get("split_size"))
    )
    return list(raw) if isinstance(raw, tuple | list) else [raw] * count


def _equal_pieces(trace: Trace, dim: Dim, sizes: Sequence[int]) -> list[Dim]:
    if len(sizes) == 1:
        return [dim]
    rows, columns = trace.ledger.split(dim, [len(sizes), sizes[0]])
    trace.ledger.freeze(rows, Reason("every piece of a split stays"))
    raw = _raw_sizes(trace, len(sizes))
    if not raw and trace.call().name not in {"chunk", "glu"}:
        trace.freeze(columns, f"{trace.call().name} hides where its sizes come from")
    for size in raw:
        trace.link(size, columns, sizes[0])
    return [columns if sizes[0] > 1 else WHOLE] * len(sizes)


def _unequal_pieces(trace: Trace, dim: Dim, sizes: Sequence[int]) -> list[Dim]:
    raw = _raw_sizes(trace, len(sizes))
    pieces, start = [], 0
    for k, size in enumerate(sizes):
        piece = take(dim, slice(start, start + size))
        start += size
        if len(raw) == len(sizes) and len({plain(n) for n in raw}) > 1:
            trace.link(raw[k], piece, size)
        else:
            trace.freeze(piece, "it is split into pieces that are not equal")
        pieces.append(piece if size > 1 else _only(trace, piece))
    return pieces


@rule("flip")
def flip(trace: Trace, ctx: Context) -> Returned:
    """Positions in reverse."""
    value, ndim = ctx.value(0), len(ctx.shape(0))
    gone = {int(k) % ndim for k in ctx.args[1]}
    return Value.plain([take(d, slice(None, None, -1)) if k in gone else d for k, d in enumerate(value.dims)])


@rule("constant_pad_nd")
def pad(trace: Trace, ctx: Context) -> Returned:
    """New positions of a constant, which stay, around the old ones."""
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
    return Value.plain(dims)


@rule("pixel_shuffle")
def pixel_shuffle(trace: Trace, ctx: Context) -> Returned:
    """`(N, C * r * r, H, W)` to `(N, C, H * r, W * r)`: r * r neighbours go together."""
    value, shape, factor = ctx.value(0), ctx.shape(0), int(ctx.args[1])
    channels, inner = trace.ledger.split(value.dims[-3], [shape[-3] // factor**2, factor**2])
    trace.freeze(inner, "pixel_shuffle moves it into space")
    return Value.plain([*value.dims[:-3], channels, WHOLE, WHOLE])


@rule("pixel_unshuffle")
def pixel_unshuffle(trace: Trace, ctx: Context) -> Returned:
    """`(N, C, H * r, W * r)` to `(N, C * r * r, H, W)`."""
    value, shape, factor = ctx.value(0), ctx.shape(0), int(ctx.args[1])
    channels = merge([value.dims[-3], WHOLE], [shape[-3], factor**2])
    return Value.plain([*value.dims[:-3], channels, WHOLE, WHOLE])


@rule("glu")
def glu(trace: Trace, ctx: Context) -> Returned:
    """The first half times the sigmoid of the second: both lose the same positions."""
    value, shape = ctx.value(0), ctx.shape(0)
    at = ctx.dim(1, len(shape), -1)
    rows, columns = trace.ledger.split(value.dims[at], [2, shape[at] // 2])
    trace.freeze(rows, "both halves of a gated unit stay")
    return Value.plain([columns if k == at else d for k, d in enumerate(value.dims)])


@rule("channel_shuffle", "native_channel_shuffle")
def channel_shuffle(trace: Trace, ctx: Context) -> Returned:
    """`(g, C / g)` transposed: every part loses the same positions."""
    value, channels, groups = ctx.value(0), ctx.shape(0)[1], int(ctx.args[1])
    sizes = [groups, channels // groups]
    rows, columns = trace.ledger.split(value.dims[1], sizes)
    trace.freeze(rows, "the number of groups of a channel shuffle stays")
    return Value.plain([value.dims[0], merge([columns, WHOLE], sizes[::-1]), *value.dims[2:]])


# --- look-ups --------------------------------------------------------------------------------------------------------


@rule("tril", "triu")
def triangle(trace: Trace, ctx: Context) -> Returned:
    """Positions along the last two axes are compared with each other: both stay."""
    value = ctx.value(0)
    for dim in value.dims[-2:]:
        trace.freeze(dim, f"{ctx.name} compares its positions")
    return Value.plain([*value.dims[:-2], WHOLE, WHOLE])


@rule("gather", "take_along_dim")
def gather(trace: Trace, ctx: Context) -> Returned:
    """Positions by number along one axis; the table and the index stay whole."""
    for k in (0, 2):
        for dim in ctx.value(k).dims:
            trace.freeze(dim, "positions are taken by number")
    return None


@rule("embedding")
def embedding(trace: Trace, ctx: Context) -> Returned:
    """Rows of a table by number: the rows stay."""
    table, index = ctx.value(0), ctx.value(1)
    trace.freeze(table.dims[0], "its rows are looked up by number")
    trace.role(table.axes[1], "out")
    return Value.plain([*index.dims, table.dims[1]])


@rule("index_select")
def index_select(trace: Trace, ctx: Context) -> Returned:
    """Positions by number: the axis stays."""
    value = ctx.value(0)
    at = ctx.dim(1, len(value.dims))
    trace.freeze(value.dims[at], "positions are taken by number")
    return Value.plain([WHOLE if k == at else d for k, d in enumerate(value.dims)])


@rule("index")
def index(trace: Trace, ctx: Context) -> Returned:
    """Advanced indexing: the axes that are indexed stay, the others pass."""
    value, picked = ctx.value(0), list(ctx.args[1])
    at = [k for k, i in enumerate(picked) if i is not None]
    for k in at:
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
    return Value.plain([*rest[:first], *wide, *rest[first:]])


# --- products --------------------------------------------------------------------------------------------------------


def _contract(trace: Trace, ctx: Context, a: Value, b: Value, i: int, j: int) -> None:
    """Sum over dim `i` of `a` and dim `j` of `b`: exact only if removing a position removes its term."""
    trace.equal(a.dims[i], b.dims[j], f"it is multiplied with a tensor that is not cut in {ctx.name}")
    if not (a.weight or b.weight):
        trace.freeze(a.dims[i], "two activations are multiplied and summed over it")


def _use(trace: Trace, a: Value, b: Value, contracted: tuple[int, int], free: int, bias: Value | None) -> Use | None:
    """The layer that a product is, when `b` is a parameter and `a` an activation."""
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
    (m, k), (_, n) = ctx.shape(first), ctx.shape(first + 1)
    _contract(trace, ctx, a, b, 1, 0)
    bias = ctx.value(0) if first else None
    use = _use(trace, a, b, (1, 0), 1, bias) or _use(trace, b, a, (0, 1), 0, bias)
    dims = [a.dims[0], b.dims[1]]
    if bias and bias.dims and ctx.shape(0)[-1] == n:
        trace.equal(dims[1], bias.dims[-1], "its bias is not cut")
    trace.work.append(Work(ctx.name, trace.module(), use, 1.0, ((a.dims[0], m), (a.dims[1], k), (b.dims[1], n))))
    return Value(tuple(dims), (a.axes[0], b.axes[1]), a.weight and b.weight)


@rule("bmm", "baddbmm")
def bmm(trace: Trace, ctx: Context) -> Returned:
    """`(b, m, k) @ (b, k, n)`: batch and inner axes are equal."""
    first = 1 if ctx.name == "baddbmm" else 0
    a, b = ctx.value(first), ctx.value(first + 1)
    (batch, m, k), n = ctx.shape(first), ctx.shape(first + 1)[2]
    outer = trace.equal(a.dims[0], b.dims[0], "it is the batch of a product with a tensor that is not cut")
    trace.ledger.batched += [*a.dims[0], *b.dims[0]]
    _contract(trace, ctx, a, b, 2, 1)
    sizes = ((outer, batch), (a.dims[1], m), (a.dims[2], k), (b.dims[2], n))
    use = (_use(trace, a, b, (2, 1), 2, None) or _use(trace, b, a, (1, 2), 1, None)) if batch == 1 else None
    trace.work.append(Work(ctx.name, trace.module(), use, 1.0, sizes))
    dims = [outer, a.dims[1], b.dims[2]]
    if first:
        for k_out, dim in enumerate(ctx.value(0).dims[-3:]):
            if ctx.shape(0)[k_out] == ctx.outputs[0].shape[k_out]:
                trace.equal(dims[k_out], dim, "it is added to a tensor that is not cut")
    return Value(tuple(dims), (None,) * 3, a.weight and b.weight)


@rule("mv", "dot")
def vector_product(trace: Trace, ctx: Context) -> Returned:
    """`(m, k) @ (k)` or `(k) @ (k)`."""
    a, b = ctx.value(0), ctx.value(1)
    _contract(trace, ctx, a, b, len(a.dims) - 1, 0)
    sizes = tuple(zip(a.dims, ctx.shape(0), strict=True))
    trace.work.append(Work(ctx.name, trace.module(), None, 1.0, sizes))
    return Value.plain(a.dims[:-1])


@rule("convolution", "_convolution", "mkldnn_convolution", "cudnn_convolution")
def convolution(trace: Trace, ctx: Context) -> Returned:
    """Input channels meet the weight's, output channels are the weight's; groups balance."""
    x, w = ctx.value(0), ctx.value(1)
    transposed, groups = bool(ctx.args[6]), int(ctx.args[8])
    shape, out = ctx.shape(1), ctx.outputs[0].shape
    o, i = (1, 0) if transposed else (0, 1)
    batched = len(x.dims) == len(shape)
    channels = x.dims[1 if batched else 0]
    if groups == 1:
        trace.equal(channels, w.dims[i], "it enters a convolution whose weight is not cut")
        outer = w.dims[o]
    else:
        outer = _grouped(trace, channels, w, shape, groups, transposed)
    for dim in (*x.dims[2 if batched else 1 :], *w.dims[2:]):
        trace.freeze(dim, "a convolution slides along it")
    bias = ctx.value(2) if ctx.args[2] is not None else None
    if bias:
        trace.equal(outer, bias.dims[0], "its bias is not cut")
    use = _convolution_use(trace, w, (o, i), groups, transposed, bias)
    space = math.prod(ctx.shape(0)[2:] if transposed else out[2:]) * math.prod(shape[2:])
    batch = x.dims[0] if batched else WHOLE
    sizes = ((batch, out[0] if batched else 1), (w.dims[0], shape[0]), (w.dims[1], shape[1]))
    trace.work.append(Work("convolution", trace.module(), use, float(space), sizes))
    dims = [outer, *[WHOLE] * (len(shape) - 2)]
    return Value.plain([batch, *dims] if batched else dims)


def _grouped(trace: Trace, channels: Dim, w: Value, shape: Sequence[int], groups: int, transposed: bool) -> Dim:
    """Channels factor into `(groups, channels of a group)` on both sides; the groups are shared."""
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


def _convolution_use(trace: Trace, w: Value, at: tuple[int, int], groups: int, transposed: bool,
                     bias: Value | None) -> Use | None:  # fmt: skip
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


# --- normalisation, reductions, pooling ------------------------------------------------------------------------------


@rule("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
      "_batch_norm_with_update", "_batch_norm_no_update", "batch_norm")  # fmt: skip
def batch_norm(trace: Trace, ctx: Context) -> Returned:
    """Each channel by itself: scale, shift and statistics go with it."""
    x = ctx.value(0)
    at = min(1, len(x.dims) - 1)
    roles: tuple[Role, ...] = ("scale", "shift", "stat", "stat")
    for argument, role in zip(ctx.args[1:5], roles, strict=True):
        if isinstance(argument, Tensor) and argument.dim() == 1:
            value = trace.value(argument)
            trace.equal(x.dims[at], value.dims[0], "it enters a batch norm that is not cut")
            trace.role(value.axes[0], role)
    return [Value.plain(x.dims), None, None]


@rule("native_layer_norm", "layer_norm", "rms_norm", "_fused_rms_norm")
def layer_norm(trace: Trace, ctx: Context) -> Returned:
    """The axes it normalises over stay: their statistics would change."""
    x, count = ctx.value(0), len(ctx.args[1])
    kept = len(x.dims) - count
    for dim in x.dims[kept:]:
        trace.freeze(dim, "a layer norm takes its statistics over it")
    for argument in ctx.args[2:4]:
        if isinstance(argument, Tensor):
            for dim in trace.value(argument).dims:
                trace.freeze(dim, "a layer norm takes its statistics over it")
    return [Value.plain([*x.dims[:kept], *[WHOLE] * count]), None, None]


@rule("native_group_norm")
def group_norm(trace: Trace, ctx: Context) -> Returned:
    """Whole groups of channels may go, parts of a group would change its statistics."""
    x, channels, groups = ctx.value(0), int(ctx.args[4]), int(ctx.args[6])
    rows, columns = trace.ledger.split(x.dims[1], [groups, channels // groups])
    trace.freeze(columns, "a group norm takes its statistics over it")
    call = trace.call()
    raw = call.kwargs.get("num_groups", call.args[1] if len(call.args) > 1 else groups)
    trace.link(raw, rows, groups)
    roles: tuple[Role, ...] = ("scale", "shift")
    for argument, role in zip(ctx.args[1:3], roles, strict=True):
        if isinstance(argument, Tensor):
            value = trace.value(argument)
            trace.equal(x.dims[1], value.dims[0], "it enters a group norm that is not cut")
            trace.role(value.axes[0], role)
    return [Value.plain(x.dims), None, None]


@rule("_softmax", "_log_softmax", "cumsum", "cumprod", "sort", "topk", "logcumsumexp", "_safe_softmax", "softmax")
def along(trace: Trace, ctx: Context) -> Returned:
    """Positions along one axis depend on each other: it stays."""
    value = ctx.value(0)
    number = next(
        int(a) for a in ctx.args[2 if ctx.name == "topk" else 1 :] if isinstance(a, int) and not isinstance(a, bool)
    )
    at = number % max(len(value.dims), 1)
    trace.freeze(value.dims[at], f"{ctx.name.strip('_')} runs along it")
    return [Value.plain([WHOLE if k == at else d for k, d in enumerate(value.dims)])] * len(ctx.outputs)


@rule("sum", "mean", "amax", "amin", "max", "min", "prod", "var", "std", "var_mean", "std_mean", "logsumexp", "argmax",
      "argmin", "any", "all", "norm", "linalg_vector_norm", "median", "nansum", "count_nonzero")  # fmt: skip
def reduction(trace: Trace, ctx: Context) -> Returned:
    """The axes that are reduced stay: fewer terms would change the result."""
    if ctx.name in {"max", "min"} and len(ctx.args) > 1 and isinstance(ctx.args[1], Tensor):
        return pointwise(trace, ctx)
    value, ndim = ctx.value(0), len(ctx.shape(0))
    out = ctx.outputs[0].dim()
    asked = ctx.args[2] if ctx.name in {"norm", "linalg_vector_norm"} else (ctx.args[1] if len(ctx.args) > 1 else None)
    if asked is None or isinstance(asked, bool | torch.dtype) or (isinstance(asked, list | tuple) and not asked):
        gone = set(range(ndim))
    else:
        gone = {int(k) % ndim for k in _flat([asked])}
    for k in gone:
        trace.freeze(value.dims[k], f"{ctx.name} sums over it" if ctx.name != "mean" else "a mean is taken over it")
    kept = [WHOLE if k in gone else d for k, d in enumerate(value.dims)]
    dims = kept if out == ndim else [d for k, d in enumerate(kept) if k not in gone]
    return [Value(tuple(dims), (None,) * len(dims), value.weight)] * len(ctx.outputs)


def _spatial(count: int) -> Rule:
    def pool(trace: Trace, ctx: Context) -> Returned:
        """Works inside each channel along the last axes, which stay."""
        value = ctx.value(0)
        kept = len(value.dims) - count
        for dim in value.dims[kept:]:
            trace.freeze(dim, f"{ctx.name} slides along it")
        return [Value.plain([*value.dims[:kept], *[WHOLE] * count])] * len(ctx.outputs)

    return pool


for _count, _names in {
    1: "max_pool1d avg_pool1d adaptive_avg_pool1d upsample_nearest1d upsample_linear1d reflection_pad1d "
    "replication_pad1d",
    2: "max_pool2d max_pool2d_with_indices avg_pool2d adaptive_avg_pool2d _adaptive_avg_pool2d adaptive_max_pool2d "
    "upsample_nearest2d upsample_bilinear2d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa "
    "reflection_pad2d replication_pad2d mkldnn_max_pool2d",
    3: "max_pool3d_with_indices avg_pool3d adaptive_avg_pool3d _adaptive_avg_pool3d upsample_nearest3d "
    "upsample_trilinear3d",
}.items():
    for _operation in _names.split():
        RULES[_operation] = _spatial(_count)
