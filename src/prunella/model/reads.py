"""The table of operations that read a weight: operation -> the products of the operation, with weight, input and form.

Statistics, recovery, layer solvers and metrics share this table and therefore support the same operations. The table
covers calls of Python (`torch.einsum`) and their operations below autograd (`aten.bmm`). `unreadable` gives the reason
for operations that read a weight in a way that no matrix describes.
"""

from __future__ import annotations

import inspect
import itertools
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from operator import itemgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prunella.model.forms import Contraction, Convolution
from prunella.model.product import NotReadable, Product, product_of

UNREADABLE = {
    "embedding": "it looks up rows by index",
    "embedding_bag": "it looks up rows by index",
    "bilinear": "it multiplies two inputs with the weight at once",
    "_trilinear": "it multiplies two inputs with the weight at once",
    **dict.fromkeys(
        ("lstm", "gru", "rnn_tanh", "rnn_relu", "_cudnn_rnn"),
        "its steps run inside one call, which hides them",
    ),
    **dict.fromkeys(
        ("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell", "_thnn_fused_lstm_cell", "_thnn_fused_gru_cell"),
        "its gates run inside one call, which hides them",
    ),
    "_native_multi_head_attention": "its layers run inside one call, which hides them",
    "_transformer_encoder_layer_fwd": "its layers run inside one call, which hides them",
    **dict.fromkeys(
        ("chain_matmul", "linalg_multi_dot", "multi_dot"), "it chooses the order of several products itself"
    ),
    "conv_tbc": "its axes differ from those of all other convolutions",
    "cdist": "it computes distances instead of products",
}
"""Reasons for operations that take a weight and are not in the table."""


def unreadable(operation: str) -> str:
    """Why the weights of an operation cannot be read; empty if they can, or if the operation reads none."""
    return UNREADABLE.get(operation, "")


def products(name: str, args: Sequence[Any], kwargs: Any = None) -> Iterator[Product]:
    """The products of a call by the name of its operation; none if the operation is not in the table.

    Errors: NotReadable for arguments that the table does not cover.
    """
    row = READS.get(name)
    if row is not None:
        args, others = _in_order(name, args, kwargs or {})
        yield from row(*args, **others)


_OPERANDS = {
    "mm": ("input", "mat2"),
    "bmm": ("input", "mat2"),
    "mv": ("input", "vec"),
    "addmm": ("input", "mat1", "mat2"),
    "addmv": ("input", "mat", "vec"),
    "baddbmm": ("input", "batch1", "batch2"),
    "addbmm": ("input", "batch1", "batch2"),
}
"""Names that torch gives to the operands, for calls that pass them by name."""


def _in_order(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Operands by position, and the other arguments by name."""
    others = dict(kwargs)
    operands = [others.pop(key) for key in _OPERANDS.get(name, ())[len(args) :] if key in others]
    return (*args, *operands), others


# -- products -----------------------------------------------------------------------------------------------------


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Iterator[Product]:
    lead = _letters(input.dim() - 1)
    yield product_of(input, weight, Contraction(f"{lead}i", "oi", f"{lead}o"), bias)


def _pair(a: Tensor, b: Tensor, bias: Tensor | None = None, scale: float = 1) -> Iterator[Product]:
    """Two matrices, or a batch of pairs: either may be the weight, the other is its input."""
    lead = "b" * (a.dim() - 2)
    right = Contraction(f"{lead}ti", f"{lead}io", f"{lead}to")
    left = Contraction(f"{lead}it", f"{lead}oi", f"{lead}ot")
    rows = bias is not None and (bias.dim() < 2 or bias.shape[-2] == 1)
    yield Product(
        b, lambda: a if scale == 1 else a * scale, right, product_of(a, b, right, bias if rows else None).bias
    )
    yield Product(a, lambda: b if scale == 1 else b * scale, left)


def _added(input: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1, **_: Any) -> Iterator[Product]:
    return _pair(a, b, input if beta == 1 else None, alpha)


def _two(a: Tensor, b: Tensor, *_: Any, **__: Any) -> Iterator[Product]:
    return _pair(a, b)


def _vector(matrix: Tensor, vector: Tensor, scale: float = 1) -> Iterator[Product]:
    yield Product(matrix, lambda: vector if scale == 1 else vector * scale, Contraction("i", "oi", "o"))
    yield Product(vector, lambda: matrix if scale == 1 else matrix * scale, Contraction("ti", "i", "t"))


def _mv(matrix: Tensor, vector: Tensor, **_: Any) -> Iterator[Product]:
    return _vector(matrix, vector)


def _addmv(
    _: Tensor, matrix: Tensor, vector: Tensor, *, beta: float = 1, alpha: float = 1, **__: Any
) -> Iterator[Product]:
    return _vector(matrix, vector, alpha)


def _addbmm(_: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1, **__: Any) -> Iterator[Product]:
    return _einsum_of("bti,bio->to", (a, b) if alpha == 1 else (a * alpha, b))


def _matmul(input: Tensor, other: Tensor, **_: Any) -> Iterator[Product]:
    lead = _letters(max(input.dim(), other.dim(), 2) - 2)
    left, right = ("" if t.dim() < 2 else lead[len(lead) + 2 - t.dim() :] for t in (input, other))
    t, o = "t" if input.dim() > 1 else "", "o" if other.dim() > 1 else ""
    return _einsum_of(f"{left}{t}i,{right}i{o}->{lead}{t}{o}", (input, other))


def _rmatmul(input: Tensor, other: Tensor) -> Iterator[Product]:
    return _matmul(other, input)


def _inner(input: Tensor, other: Tensor) -> Iterator[Product]:
    a, b = _letters(input.dim() - 1), _letters(input.dim() + other.dim() - 2)[input.dim() - 1 :]
    return _einsum_of(f"{a}z,{b}z->{a}{b}", (input, other))


def _tensordot(a: Tensor, b: Tensor, dims: Any = 2, *_: Any, **__: Any) -> Iterator[Product]:
    if isinstance(dims, Tensor):
        raise NotReadable("its axes are given by a tensor")
    if isinstance(dims, int):
        dims = list(range(a.dim() - dims, a.dim())), list(range(dims))
    first, names = _letters(a.dim()), _letters(a.dim() + b.dim())
    second = list(names[a.dim() :])
    for i, j in zip(*([d] if isinstance(d, int) else d for d in dims), strict=True):
        second[j] = first[i]
    kept = [x for x in first if x not in second] + [x for x in second if x not in first]
    return _einsum_of(f"{first},{''.join(second)}->{''.join(kept)}", (a, b))


def _einsum(equation: Any, *operands: Any, **_: Any) -> Iterator[Product]:
    if operands and isinstance(operands[0], list | tuple):  # below autograd a path may follow
        operands = tuple(operands[0])
    if not isinstance(equation, str) or not all(isinstance(t, Tensor) for t in operands):
        raise NotReadable("its axes are given by lists of numbers")
    return _einsum_of(_spelled(equation, operands), operands)


def _spelled(equation: str, operands: Sequence[Tensor]) -> str:
    """The equation with explicit letters instead of dots, and with an explicit output."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    unused_letters = "".join(a for a in string.ascii_letters if a not in equation)
    parts = inputs.split(",")
    pairs = zip(parts, operands, strict=True)
    dot_counts = [t.dim() - len(part.replace("...", "")) if "..." in part else 0 for part, t in pairs]
    dots = unused_letters[: max(dot_counts)]
    if not arrow:
        letters = inputs.replace(",", "").replace(".", "")
        output = "..." + "".join(sorted(a for a in set(letters) if letters.count(a) == 1))
    parts = [part.replace("...", dots[len(dots) - n :]) for part, n in zip(parts, dot_counts, strict=True)]
    return f"{','.join(parts)}->{output.replace('...', dots)}"


def _einsum_of(equation: str, operands: Sequence[Tensor]) -> Iterator[Product]:
    """One product for each operand as the weight; the other operands together are its input."""
    inputs, _, output = equation.partition("->")
    parts = inputs.split(",")
    sizes: dict[str, int] = {}
    for part, tensor in zip(parts, operands, strict=True):
        for letter, size in zip(part, tensor.shape, strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1)) if size else 0
    for k, (weight, letters) in enumerate(zip(operands, parts, strict=True)):
        others = [(part, t) for j, (part, t) in enumerate(zip(parts, operands, strict=True)) if j != k]
        if len(set(letters)) < len(letters) or not others:
            continue
        thin = [n for n, a in enumerate(letters) if weight.shape[n] == 1 and sizes[a] > 1]
        for n in reversed(thin):
            weight, letters = weight.squeeze(n), letters[:n] + letters[n + 1 :]
        theirs = "".join(dict.fromkeys(a for part, _ in others for a in part if a in letters or a in output))
        if all(a in theirs or a in output for a in letters):
            yield Product(weight, _joined(others, theirs, sizes), Contraction(theirs, letters, output))


def _joined(rest: Sequence[tuple[str, Tensor]], axes: str, sizes: dict[str, int]) -> Callable[[], Tensor]:
    """The product of the other operands, with the axes shared with the weight."""

    def make() -> Tensor:
        if len(rest) == 1 and rest[0][0] == axes:
            joined = rest[0][1]
        else:
            joined = torch.einsum(f"{','.join(part for part, _ in rest)}->{axes}", *(t for _, t in rest))
        return joined.expand([sizes[a] for a in axes])

    return make


def _grouped(a: Tensor, b: Tensor, offs: Tensor | None = None, *_: Any, **__: Any) -> Iterator[Product]:
    """Rows of `a` between two offsets, times one matrix of `b` each."""
    if a.dim() != 2 or b.dim() != 3 or offs is None:
        raise NotReadable("its weight is not a stack of matrices")
    for number, (start, end) in enumerate(itertools.pairwise([0, *offs.tolist()])):
        rows = slice(start, end)
        yield Product(b[number], partial(a.__getitem__, rows), Contraction("ti", "io", "to"), None, itemgetter(rows))


# -- convolutions -------------------------------------------------------------------------------------------------


def _conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Iterator[Product]:
    n = weight.dim() - 2
    spread = _tuple(dilation, n)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(spread, weight.shape[2:], strict=True)]
        pads = tuple((t // 2, t - t // 2) for t in total)
    else:
        pads = tuple((p, p) for p in _tuple(0 if padding == "valid" else padding, n))
    yield _batched(input, weight, Convolution(_tuple(stride, n), pads, spread, groups), bias)


def _conv_transpose(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Iterator[Product]:
    n = weight.dim() - 2
    pads = tuple((p, p) for p in _tuple(padding, n))
    form = Convolution(_tuple(stride, n), pads, _tuple(dilation, n), groups, True, _tuple(output_padding, n))
    yield _batched(input, weight, form, bias)


def _convolution(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    *_: Any,
) -> Iterator[Product]:
    if transposed:
        return _conv_transpose(input, weight, bias, stride, padding, output_padding, groups, dilation)
    return _conv(input, weight, bias, stride, padding, dilation, groups)


def _batched(x: Tensor, weight: Tensor, form: Convolution, bias: Tensor | None) -> Product:
    """A single sample is a batch of one."""
    single = x.dim() < weight.dim()
    product = product_of(x.unsqueeze(0) if single else x, weight, form, bias)
    return Product(weight, product.given, form, product.bias, lambda y: y.unsqueeze(0)) if single else product


def _tuple(value: Any, n: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * n if len(values) == 1 else values


# -- recurrent layers ---------------------------------------------------------------------------------------------


def _recurrent_layer(*args: Any, **_: Any) -> Iterator[Product]:
    """One layer in one direction, below autograd: one weight for its input, another for the previous step's output."""
    x, entering, repeated, start, reverse, steps = (args[k] for k in (0, 1, 2, 5, 7, 8))
    if steps:
        raise NotReadable("its sequences are packed")
    form = Contraction("tbi", "oi", "tbo")
    yield Product(entering, lambda: x, form)
    yield Product(repeated, partial(_before, args, start, bool(reverse)), form)


def _before(args: Sequence[Any], start: Tensor, reverse: bool) -> Tensor:
    """The input of every step from the previous step: the outputs of the layer, and its first state."""
    outputs: Tensor = torch.ops.aten.mkldnn_rnn_layer(*args)[0]
    first = start.reshape(1, *outputs.shape[1:])
    return torch.cat([outputs[1:], first] if reverse else [first, outputs[:-1]])


# -- attention ----------------------------------------------------------------------------------------------------


def _attention(*args: Any, **kwargs: Any) -> Iterator[Product]:
    """`F.multi_head_attention_forward`: the projections of queries, keys, values and outputs."""
    bound = _ATTENTION.bind(*args, **kwargs)
    bound.apply_defaults()
    at = bound.arguments
    inputs, bias = [at["query"], at["key"], at["value"]], at["in_proj_bias"]
    if at["use_separate_proj_weight"]:
        weights = [at[f"{name}_proj_weight"] for name in "qkv"]
        biases = [None] * 3 if bias is None else bias.chunk(3)
    elif inputs[0] is inputs[1] and inputs[1] is inputs[2]:
        inputs, weights, biases = inputs[:1], [at["in_proj_weight"]], [bias]
    else:
        weights, biases = at["in_proj_weight"].chunk(3), [None] * 3 if bias is None else bias.chunk(3)
    for x, weight, own in zip(inputs, weights, biases, strict=True):
        for product in _linear(x, weight, own):
            yield replace(product, output=partial(_projected, x, weight, own))
    out_weight, letters = at["out_proj_weight"], _letters(inputs[0].dim() - 1)

    def mixed() -> Tensor:
        plain = {
            "out_proj_weight": torch.eye(len(out_weight), dtype=out_weight.dtype, device=out_weight.device),
            "out_proj_bias": None,
        }
        heads: Tensor = F.multi_head_attention_forward(**{**at, **plain, "need_weights": False})[0]
        return heads

    form = Contraction(f"{letters}i", "oi", f"{letters}o")
    yield Product(out_weight, mixed, form, at["out_proj_bias"], itemgetter(0))


def _projected(x: Tensor, weight: Tensor, bias: Tensor | None, _: Any) -> Tensor:
    """The output of a projection, which the call does not return."""
    return F.linear(x, weight, bias)


_ATTENTION = inspect.signature(F.multi_head_attention_forward)


def _letters(count: int) -> str:
    """Names of axes, none of which is i, o, t or z."""
    return "".join(a for a in string.ascii_letters if a not in "iotz")[:count]


READS: dict[str, Callable[..., Iterable[Product]]] = {
    "linear": _linear,
    "addmm": _added,
    "baddbmm": _added,
    "mm": _two,
    "bmm": _two,
    "mv": _mv,
    "addmv": _addmv,
    "addbmm": _addbmm,
    "matmul": _matmul,
    "rmatmul": _rmatmul,
    "inner": _inner,
    "tensordot": _tensordot,
    "einsum": _einsum,
    "grouped_mm": _grouped,
    "mkldnn_rnn_layer": _recurrent_layer,
    "multi_head_attention_forward": _attention,
    "convolution": _convolution,
    **{f"conv{n}d": _conv for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": _conv_transpose for n in (1, 2, 3)},
}
"""Every operation that reads a weight as matrices."""
