"""Further calls of a model with state between calls: its second call, or its hundredth, may compute something else.

A run that changes a counter, a size or a cache of the model in plain Python may take another branch the next time. Such
calls are recorded into the same graph, and the cut is verified on them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from torch import Tensor, nn

from prunella.errors import one_line
from prunella.graph.data import PLAIN, Branch, Setting
from prunella.graph.guesses import Seen
from prunella.graph.resized import resized, samples, shape_text
from prunella.graph.trace.dataflow import Flow
from prunella.graph.trace.kept import keep_outputs, say_example
from prunella.graph.trace.kept_state import KeptChange
from prunella.graph.trace.known_sizes import numbers_of
from prunella.graph.trace.recorder import Trace
from prunella.graph.trace.run import trace
from prunella.graph.trace.scopes import FunctionScope
from prunella.graph.trace.tracked_int import Attr, leaves
from prunella.model.state import restored_state
from prunella.model.trees import tensors

log = logging.getLogger(__name__)
_MOST = 6
"""Most further calls that are recorded."""
_NUMBERS = 24
"""Most numbers that are tried in place of a counter of the model."""
_FAR = 1_000_000
Call = tuple[str, Setting, Any]
"""A description of the call; its setting; its batch, None for the example."""


def add_calls(
    record: Trace,
    model: nn.Module,
    inputs: Any,
    apply_rule: Callable[..., None],
    changes: Sequence[KeptChange],
    number: int,
) -> None:
    """Record further calls, if a run changes the state of the model. number: that of the first of the branches.

    The second call on the same batch is always recorded, others if the source runs something new.
    """
    if not changes:
        return
    seen, calls = Seen(model, (inputs,)), list[Call]()
    for text, setting, batch in _calls(record, seen, inputs, changes):
        fresh = seen.new(inputs if batch is None else batch, setting=setting)
        if seen.accepted and (fresh or not calls):
            calls.append((text, setting, batch))
    for call in calls[:_MOST]:
        record.branches.append(_recorded(record, model, inputs, apply_rule, call, number + len(record.branches)))


def add_arguments(
    record: Trace,
    model: nn.Module,
    inputs: Any,
    apply_rule: Callable[..., None],
    variants: Sequence[tuple[str, Any]],
    number: int,
) -> None:
    """Record calls with other arguments, each with its text. number: that of the first of the branches."""
    for text, batch in variants:
        call = text, PLAIN, batch
        branch = _recorded(record, model, inputs, apply_rule, call, number + len(record.branches))
        record.branches.append(replace(branch, other_arguments=True))


def _recorded(
    record: Trace, model: nn.Module, inputs: Any, apply_rule: Callable[..., None], call: Call, number: int
) -> Branch:
    text, setting, batch = call
    start = len(record.ledger.frozen)
    record.example, record.flow = number, Flow()
    try:
        with restored_state(model):
            run = trace(record, model, inputs if batch is None else batch, apply_rule, setting=setting)
            say_example(record, start, f", {text}")
            keep_outputs(run, model, "it is an output of the model")
    except Exception as error:  # the cut is verified on this call in any case
        log.debug("%s was not traced: %s", text, one_line(error))
    return Branch(text, setting, number, batch=batch)


def _calls(record: Trace, seen: Seen, inputs: Any, changes: Sequence[KeptChange]) -> Iterator[Call]:
    yield "on a second call", Setting(before=(inputs,)), None
    given = [tensor for tensor in tensors(inputs) if tensor.dim()]
    if given:
        main = max(given, key=Tensor.numel)
        for batch in (*islice(resized(inputs, main), 4), samples(inputs, main.shape[0], main.shape[0] + 1)):
            yield f"on a call on {shape_text(batch)} after one on the example", Setting(before=(inputs,)), batch
    for change in changes:
        if change.number:
            for value in _values(record, seen, change):
                setting = Setting(kept=((change.owner or "", change.name, type(change.value)(value)),))
                yield f"on a call with {change.name} = {value}", setting, None


def _values(record: Trace, seen: Seen, change: KeptChange) -> list[int]:
    """Numbers to try for one that a run changes: neighbors of the numbers that the source names with it."""
    known = set[int]()
    for comparison, _ in record.decisions:
        parts = list(leaves(comparison))
        if any(isinstance(leaf, Attr) and (leaf.owner, leaf.name) == (change.owner, change.name) for leaf in parts):
            known |= {leaf.value for leaf in parts}
            known |= {side for side in (comparison.left, comparison.right) if isinstance(side, int)}
    for code in seen.codes():
        if change.name in code.co_names:
            known |= set(numbers_of(FunctionScope(code, {}, None, ())))
    near = {number + step for number in known for step in (-1, 0, 1)} - {change.value}
    return [*sorted(near, key=lambda n: abs(n - change.value))[:_NUMBERS], _FAR]
