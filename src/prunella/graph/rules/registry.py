"""Rules for ATen operations: one small rule per family of operations.

Views are executed on the labels themselves. Compute operations relate labels. An operation without a rule is a barrier:
all axes of its inputs and outputs are frozen.

A rule is `rule(trace, ctx)`. It reads `ctx.args`, relates labels through `trace`, and returns the `TracedValue` of each
output tensor (None: unknown, all positions are frozen). Register a rule for a custom operation with `@rule`:

    @rule("mylib.scale_channels")
    def scale_channels(trace: Trace, ctx: Context) -> Returned:
        x, gain = ctx.value(0), ctx.value(1)
        return TracedValue.plain([x.dims[0], trace.equal(x.dims[1], gain.dims[0], "scale"), *x.dims[2:]])
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prunella.graph.data import ReasonKind
from prunella.graph.solve.labels import WHOLE
from prunella.graph.trace.call_names import OPAQUE
from prunella.graph.trace.recorder import CALL_RULES, CallRule, Trace, TracedValue
from prunella.graph.work import name_of, pointwise, positional, tensors_in, terms

log = logging.getLogger(__name__)
Returned = TracedValue | Sequence[TracedValue | None] | None


@dataclass(frozen=True)
class Context:
    """One executed operation."""

    trace: Trace
    name: str
    args: tuple[Any, ...]
    outputs: tuple[Tensor, ...]

    def value(self, k: int) -> TracedValue:
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


def call_rule(*names: str) -> Callable[[CallRule], CallRule]:
    """Register a rule for Python calls by name. It relates the call as a whole, whatever operations run inside."""

    def register(function: CallRule) -> CallRule:
        for name in names:
            CALL_RULES[name] = function
        return function

    return register


def apply_rule(trace: Trace, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
    """Apply the rule of an operation and record the values of its outputs."""
    name = name_of(func)
    outputs, arguments = tuple(tensors_in(result)), tensors_in([args, list(kwargs.values())])
    trace.flow.note(name, pointwise(func), arguments, list(outputs))
    trace.reads(name, arguments, outputs)
    if trace.call().name in CALL_RULES:
        return
    ctx = Context(trace, name, positional(func, args, kwargs), outputs)
    matching_rule = RULES.get(name) or (RULES["where"] if pointwise(func) else None)
    try:
        returned = matching_rule(trace, ctx) if matching_rule else barrier(trace, ctx)
    except Exception as error:
        log.debug("rule of %s failed: %r", name, error)
        returned = barrier(trace, ctx)
    values = [returned] if isinstance(returned, TracedValue) else list(returned or [])
    for k, tensor in enumerate(outputs):
        value = values[k] if k < len(values) else None
        if value is not None and len(value.dims) == tensor.dim():
            trace.values[tensor] = value
        elif tensor not in trace.values:
            trace.values[tensor] = TracedValue.plain([WHOLE] * tensor.dim())
        trace.computed(tensor)
    trace.count(name, terms(func, args, kwargs, outputs), arguments)
    for table in (trace.numbers, trace.given):
        if name in _NUMBERS and outputs and isinstance(args[0], Tensor) and args[0] in table:
            table[outputs[0]] = table[args[0]]


_NUMBERS = frozenset(
    "view _unsafe_view reshape _reshape_alias permute t transpose squeeze unsqueeze expand clone detach alias _to_copy "
    "slice select index index_select sort".split()
)
"""Operations that move values without a change."""


def same(value: TracedValue) -> TracedValue:
    """A tensor with the same axes."""
    return TracedValue(value.dims, value.axes, value.weight, value.zeroed)


@rule("_barrier")
def barrier(trace: Trace, ctx: Context) -> Returned:
    """Freeze all axes of the inputs. A result computed from weights alone is a weight, frozen for the same reason."""
    call = trace.call().name
    text = f"the operation {ctx.name}{f' in {call}' if call in OPAQUE else ''} has no rule"
    of_complex = any(tensor.is_complex() for tensor in (*tensors_in(ctx.args), *ctx.outputs))
    text += ", and it is of complex numbers" if of_complex else ""
    for tensor in tensors_in(ctx.args):
        for dim in trace.value(tensor).dims:
            trace.freeze(dim, text, ReasonKind.COMPLEX if of_complex else ReasonKind.RULE)
    return [_computed_weight(trace, tensor, text) if trace.sources.of(tensor) else None for tensor in ctx.outputs]


def _computed_weight(trace: Trace, tensor: Tensor, text: str) -> TracedValue:
    dims = tuple(trace.ledger.fresh(int(size)) for size in tensor.shape)
    for dim in dims:
        trace.freeze(dim, text, ReasonKind.RULE)
    return TracedValue(dims, (None,) * len(dims), True)


def flat(items: Any) -> list[Any]:
    """The leaves of nested tuples and lists."""
    leaves: list[Any] = []
    for item in items:
        leaves += flat(item) if isinstance(item, tuple | list | torch.Size) else [item]
    return leaves
