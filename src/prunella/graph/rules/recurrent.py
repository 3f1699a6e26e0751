"""Recurrent layers and cells: one rule for the whole call, whatever kernels run below it.

A unit is one hidden unit: its row in every gate of `weight_ih`, of `weight_hh` and of the biases, its column in
`weight_hh` and in the next layer, and its entry in the states. All layers and directions of a call have one number of
hidden units, and their states are one tensor: unit `j` of each of them goes together. With projections the outputs of
the projection are units of their own. A unit without weights stays at zero if its state starts there; from another
state it does not, but then nothing reads it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from prunella.graph.rules.registry import Context, Returned, call_rule, rule
from prunella.graph.solve.labels import WHOLE, Dim, merge
from prunella.graph.trace.recorder import Trace, TracedValue, Use
from prunella.graph.work import Term, tensors_in

_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
_PADDED = ("input", "hx", "params", "biased", "layers", "dropout", "train", "both", "batch_first")
_PACKED = ("input", "batch_sizes", "hx", "params", "biased", "layers", "dropout", "train", "both")
_CELL = ("input", "hx", "w_ih", "w_hh", "b_ih", "b_hh")


@dataclass(frozen=True)
class _Units:
    """Labels of the hidden units, and of the layer's output at each step: the same units, or their projection."""

    hidden: Dim
    given: Dim
    gates: int


@dataclass(frozen=True)
class _Weights:
    """The parameters of one layer in one direction."""

    entering: Tensor
    repeated: Tensor
    biases: tuple[Tensor | None, Tensor | None] = (None, None)
    projection: Tensor | None = None

    @property
    def matrices(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """All matrices, each with its bias."""
        yield from zip((self.entering, self.repeated), self.biases, strict=True)
        if self.projection is not None:
            yield self.projection, None

    @property
    def outputs(self) -> int:
        """The number of outputs."""
        return int(self.repeated.shape[1])


@call_rule(*_GATES)
def recurrent_layer(trace: Trace, name: str, args: Sequence[Any], result: Any) -> None:
    """`(time, batch, in)`, or a packed sequence `(steps, in)`, to the outputs and the last states."""
    packed = len(args) > 3 and isinstance(args[3], list | tuple)
    call = dict(zip(_PACKED if packed else _PADDED, args, strict=True))
    x, directions = call["input"], 2 if call["both"] else 1
    weights = list(_split(call["params"], bool(call["biased"]), int(call["layers"]) * directions))
    units = _new_units(trace, weights[0], _GATES[name])
    features = trace.value(x).dims[-1]
    for start in range(0, len(weights), directions):
        for part in weights[start : start + directions]:
            _relate(trace, part, features, units)
        features = trace.ledger.concatenate([units.given] * directions, [weights[0].outputs] * directions)
    time, batch = (0, None) if packed else (1, 0) if call["batch_first"] else (0, 1)
    samples = _stepped(trace, x, time, batch)
    samples = _started(trace, call["hx"], units, samples, -2)
    for part in weights:
        _count(trace, name, x, part)
    lead = [WHOLE] * (x.dim() - 1)
    if batch is not None:
        lead[batch] = samples
    _give(trace, result, [[*lead, features], *([WHOLE, samples, dim] for dim in (units.given, units.hidden))])


@call_rule(*(f"{name}_cell" for name in _GATES))
def recurrent_cell(trace: Trace, name: str, args: Sequence[Any], result: Any) -> None:
    """One step: `(batch, in)` and the states to the next states."""
    call = dict(zip(_CELL, (*args, None, None)[: len(_CELL)], strict=True))
    x = call["input"]
    weights = _Weights(call["w_ih"], call["w_hh"], (call["b_ih"], call["b_hh"]))
    units = _new_units(trace, weights, _GATES[name.removesuffix("_cell")])
    _relate(trace, weights, trace.value(x).dims[-1], units)
    samples = _started(trace, call["hx"], units, trace.value(x).dims[0], 0)
    _count(trace, name, x, weights)
    _give(trace, result, [[samples, units.hidden]] * 2)


def _split(params: Sequence[Tensor], biased: bool, count: int) -> Iterator[_Weights]:
    """The flat list of parameters, layer by layer and direction by direction."""
    each = len(params) // count
    if each * count != len(params) or each not in ({4, 5} if biased else {2, 3}):
        raise ValueError(f"{len(params)} parameters for {count} layers")
    for start in range(0, len(params), each):
        entering, repeated, *rest = params[start : start + each]
        biases = (rest.pop(0), rest.pop(0)) if biased else (None, None)
        yield _Weights(entering, repeated, biases, rest[0] if rest else None)


def _new_units(trace: Trace, weights: _Weights, gates: int) -> _Units:
    hidden = trace.ledger.fresh(int(weights.repeated.shape[0]) // gates)
    given = hidden if weights.projection is None else trace.ledger.fresh(weights.outputs)
    return _Units(hidden, given, gates)


def _relate(trace: Trace, weights: _Weights, features: Dim, units: _Units) -> None:
    """Rows of every gate are hidden units; columns are the input features and the outputs of the previous step."""
    entering, repeated = trace.value(weights.entering), trace.value(weights.repeated)
    rows = merge([WHOLE, units.hidden], [units.gates, int(weights.repeated.shape[0]) // units.gates])
    for value in (entering, repeated):
        trace.equal(value.dims[0], rows, _SINGLE)
        trace.role(value.axes[0], "out")
        trace.role(value.axes[1], "in")
    trace.equal(features, entering.dims[1], "it enters a recurrent layer whose weight is not cut")
    trace.equal(repeated.dims[1], units.given, _SINGLE)
    for bias in (trace.value(bias) for bias in weights.biases if bias is not None):
        trace.equal(bias.dims[0], rows, _SINGLE)
        trace.role(bias.axes[0], "bias")
    if weights.projection is not None:
        projection = trace.value(weights.projection)
        trace.equal(projection.dims[0], units.given, _SINGLE)
        trace.equal(projection.dims[1], units.hidden, _SINGLE)
        trace.role(projection.axes[0], "out")
        trace.role(projection.axes[1], "in")


_SINGLE = "its recurrent layer has a single unit"


def _stepped(trace: Trace, x: Tensor, time: int, batch: int | None) -> Dim:
    """The labels of the samples; the axis of time is frozen."""
    trace.freeze(trace.value(x).dims[time], "a recurrent layer steps along it")
    return WHOLE if batch is None else trace.value(x).dims[batch]


def _started(trace: Trace, states: Any, units: _Units, samples: Dim, batch: int) -> Dim:
    """Relate the initial states, each `(layers, batch, units)`, or `(batch, units)` of a cell."""
    for state, dim in zip(tensors_in([states]), (units.given, units.hidden), strict=False):
        value = trace.value(state)
        trace.equal(dim, value.dims[-1], "a recurrent layer starts from a state that is not cut")
        samples = trace.equal(samples, value.dims[batch], "a recurrent layer starts from a state that is not cut")
        for layers in value.dims[:-2]:
            trace.freeze(layers, "each layer starts from a state of its own")
    return samples


def _count(trace: Trace, name: str, x: Tensor, weights: _Weights) -> None:
    """Every step of every sequence meets each matrix once."""
    steps = tuple((x, axis) for axis in range(x.dim() - 1))
    for matrix, bias in weights.matrices:
        trace.use = _use(trace, matrix, bias)
        trace.count(name, [Term(1, (*steps, (matrix, 0), (matrix, 1)))], [x, matrix])


def _use(trace: Trace, matrix: Tensor, bias: Tensor | None) -> Use | None:
    outer, inner = trace.value(matrix).axes
    if outer is None or inner is None or outer[0] != inner[0]:
        return None
    axis = trace.value(bias).axes[0] if bias is not None else None
    return Use(outer[0], outer[1], inner[1], 1, "linear", axis[0] if axis else None, trace.module())


def _give(trace: Trace, result: Any, dims: Sequence[Sequence[Dim]]) -> None:
    """Record the labels of the returned tensors."""
    for tensor, labels in zip(tensors_in([result]), dims, strict=False):
        if tensor.dim() != len(labels):
            raise ValueError(f"{tensor.dim()} axes in place of {len(labels)}")
        trace.values[tensor] = TracedValue.plain(list(labels))
        trace.computed(tensor)


# -- packed sequences ----------------------------------------------------------------------------------------------


@rule("_pack_padded_sequence")
def pack(trace: Trace, ctx: Context) -> Returned:
    """The steps of all sequences one after the other: time and samples become one axis."""
    value = ctx.value(0)
    for dim in value.dims[:2]:
        trace.freeze(dim, "its steps are packed")
    return [TracedValue.plain([WHOLE, *value.dims[2:]]), None]


@call_rule("_pad_packed_sequence")
def unpack(trace: Trace, name: str, args: Sequence[Any], result: Any) -> None:
    """Back to `(time, batch, ...)`, or `(batch, time, ...)`."""
    steps, *others = trace.value(args[0]).dims
    trace.freeze(steps, "its steps are unpacked")
    _give(trace, result, [[WHOLE, WHOLE, *others]])
