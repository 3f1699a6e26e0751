"""`nn.MultiheadAttention`: one rule for the whole call, with packed or separate projections.

A unit is one head: its rows of the three projections, with their biases, and its columns of the output projection. The
class computes as many features as its query has. A head can therefore be removed only together with as many features
of the query as the head has: `prunella.graph.solve.joined` joins both. The features inside a head are kept, since the
scores are divided by the square root of their number.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from prunella.graph.data import ReasonKind
from prunella.graph.rules.registry import call_rule
from prunella.graph.solve.labels import WHOLE, Dim, merge
from prunella.graph.trace.recorder import Link, Trace, TracedValue, Use
from prunella.graph.trace.tracked_int import Shape
from prunella.graph.work import Term

_PARAMETERS = tuple(inspect.signature(F.multi_head_attention_forward).parameters)
_QUERY = "nn.MultiheadAttention computes as many features as its query has, so its heads cannot be removed alone"
_MEETS = "it enters an attention whose weight is not cut"


@dataclass(frozen=True)
class _Inner:
    """The labels of the projected features, and those of the heads that they form."""

    dim: Dim
    heads: Dim
    size: int

    @property
    def packed(self) -> Dim:
        """Queries, keys and values one after the other."""
        return merge([WHOLE, self.dim], [3, self.size])


@call_rule("multi_head_attention_forward")
def multi_head_attention(trace: Trace, name: str, args: Sequence[Any], result: Any) -> None:
    """`(L, N, E)`, `(S, N, K)` and `(S, N, V)` to `(L, N, out)` and the weights of the attention."""
    call = dict(zip(_PARAMETERS, args, strict=True))
    if call["static_k"] is not None or call["static_v"] is not None:
        raise ValueError("keys or values are given")
    inner = _new_heads(trace, call)
    batch = _positions(trace, call, inner)
    _projections(trace, call, inner)
    _count(trace, name, call, inner)
    output, weights = result
    lead = [WHOLE, batch][: output.dim() - 1]
    trace.values[output] = TracedValue.plain([*lead, trace.value(call["out_proj_weight"]).dims[0]])
    trace.computed(output)
    if weights is not None:
        _give_weights(trace, weights, [batch][: output.dim() - 2], inner, mean=call["average_attn_weights"])


def _new_heads(trace: Trace, call: Mapping[str, Any]) -> _Inner:
    """Labels for the projected features; in the source of the class their number is that of the query."""
    query, heads = call["query"], int(call["num_heads"])
    size, width = int(query.shape[-1]), trace.value(query).dims[-1]
    dim = trace.ledger.fresh(size)
    rows, inside = trace.ledger.split(dim, [heads, size // heads])
    trace.freeze(inside, "the scores of a head are divided by the square root of its size")
    trace.ledger.batched += rows
    if width:
        shape = Shape(trace.ledger.single(width), size)
        trace.links.append(Link(shape, trace.ledger.single(dim), size, trace.where(), _QUERY))
    else:
        trace.freeze(dim, _QUERY, ReasonKind.SOURCE)
    raw = dict(zip(_PARAMETERS, trace.call().args, strict=False)) | dict(trace.call().kwargs)
    trace.link(raw["embed_dim_to_check"], width, size)
    trace.link(raw["num_heads"], rows, heads)
    return _Inner(dim, rows, size)


def _positions(trace: Trace, call: Mapping[str, Any], inner: _Inner) -> Dim:
    """Freeze the sequence positions, which the scores compare, and the masks. Returns the labels of the batch."""
    batch = WHOLE
    for number, key in enumerate(("query", "key", "value")):
        dims = trace.value(call[key]).dims
        trace.freeze(dims[0], "an attention compares its positions")
        if len(dims) == 3:
            batch = trace.equal(batch, dims[1], "it is attended with a batch that is not cut") if number else dims[1]
    for mask in (call["attn_mask"], call["key_padding_mask"]):
        for dim in trace.value(mask).dims if mask is not None else ():
            trace.freeze(dim, "an attention is masked by it")
    if call["attn_mask"] is not None and call["attn_mask"].dim() == 3:
        trace.freeze(inner.dim, "each head has a mask of its own")
    return batch


def _projections(trace: Trace, call: Mapping[str, Any], inner: _Inner) -> None:
    """Couple rows of the input projections and columns of the output projection to the projected features."""
    if call["use_separate_proj_weight"]:
        entering = {key: call[f"{key[0]}_proj_weight"] for key in ("query", "key", "value")}
    else:
        entering = dict.fromkeys(("query", "key", "value"), call["in_proj_weight"])
    for key, weight in entering.items():
        value = trace.value(weight)
        trace.equal(value.dims[0], inner.dim if call["use_separate_proj_weight"] else inner.packed, _QUERY)
        trace.equal(trace.value(call[key]).dims[-1], value.dims[1], _MEETS)
        _roles(trace, value)
    out = trace.value(call["out_proj_weight"])
    trace.equal(out.dims[1], inner.dim, _QUERY)
    _roles(trace, out)
    biases = {"in_proj_bias": inner.packed, "bias_k": inner.dim, "bias_v": inner.dim, "out_proj_bias": out.dims[0]}
    for key, dim in biases.items():
        if call[key] is not None:
            trace.equal(trace.value(call[key]).dims[-1], dim, _QUERY)
            trace.role(trace.value(call[key]).axes[-1], "bias")


def _roles(trace: Trace, value: TracedValue) -> None:
    trace.role(value.axes[0], "out")
    trace.role(value.axes[1], "in")


def _count(trace: Trace, name: str, call: Mapping[str, Any], inner: _Inner) -> None:
    """Count the projections of queries, keys and values, and the products of every query with every key and value."""
    for key, weight, entity, bias in _entering(trace, call, inner):
        x = call[key]
        trace.use = _use(trace, entity, bias)
        trace.count(name, [Term(1, (*_steps(x), (weight, 0), (weight, 1)))], [x, entity])
    query, keys = call["query"], int(call["key"].shape[0])
    keys += (call["bias_k"] is not None) + bool(call["add_zero_attn"])
    computed = query.new_empty(inner.size)
    trace.values[computed] = TracedValue.plain([inner.dim])
    trace.count(name, [Term(keys, (*_steps(query), (computed, 0)))] * 2, [query])
    out = call["out_proj_weight"]
    trace.use = _use(trace, out, call["out_proj_bias"])
    trace.count(name, [Term(1, (*_steps(query), (out, 0), (out, 1)))], [query, out])


def _entering(
    trace: Trace, call: Mapping[str, Any], inner: _Inner
) -> Iterator[tuple[str, Tensor, Tensor, Tensor | None]]:
    """Input, its weight, the parameter that contains this weight, and the bias."""
    bias = call["in_proj_bias"]
    if call["use_separate_proj_weight"]:
        yield from ((key, w, w, bias) for key in ("query", "key", "value") for w in (call[f"{key[0]}_proj_weight"],))
        return
    packed = call["in_proj_weight"]
    if call["query"] is call["key"] is call["value"]:
        yield "query", packed, packed, bias
        return
    for key, part in zip(("query", "key", "value"), packed.chunk(3), strict=True):
        trace.values[part] = TracedValue((inner.dim, trace.value(packed).dims[1]), (None, None), True)
        yield key, part, packed, bias


def _steps(x: Tensor) -> tuple[tuple[Tensor, int], ...]:
    return tuple((x, axis) for axis in range(x.dim() - 1))


def _use(trace: Trace, weight: Tensor, bias: Tensor | None) -> Use | None:
    outer, inner = trace.value(weight).axes
    if outer is None or inner is None or outer[0] != inner[0]:
        return None
    axis = trace.value(bias).axes[-1] if bias is not None else None
    return Use(outer[0], outer[1], inner[1], 1, "linear", axis[0] if axis else None, trace.module())


def _give_weights(trace: Trace, weights: Tensor, batch: Sequence[Dim], inner: _Inner, *, mean: bool) -> None:
    """Record the attention weights of each head, or their mean over the heads; a read of the mean freezes the heads."""
    trace.values[weights] = TracedValue.plain([*batch, *([] if mean else [inner.heads]), WHOLE, WHOLE])
    if mean:
        trace.averages[weights] = inner.dim
