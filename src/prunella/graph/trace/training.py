"""Both modes of a model, evaluation and training, in one record, and the outputs of both."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from prunella.errors import NotSupported, one_line
from prunella.graph.data import Ints
from prunella.graph.solve.labels import Reason
from prunella.graph.trace.answers import NATURAL, AnswerMode
from prunella.graph.trace.branches import add_branches
from prunella.graph.trace.caches import uncached
from prunella.graph.trace.dataflow import Flow
from prunella.graph.trace.further_calls import add_arguments, add_calls
from prunella.graph.trace.kept import keep_outputs, say_example
from prunella.graph.trace.kept_state import Snapshot
from prunella.graph.trace.queries import as_in_training
from prunella.graph.trace.recorder import Trace
from prunella.graph.trace.run import new_record, trace
from prunella.model.state import restored_state, training_flags, untouched
from prunella.model.trees import tensors


def trace_modes(
    model: nn.Module,
    inputs: Any,
    apply_rule: Callable[..., None],
    others: Sequence[Any] = (),
    arguments: Sequence[tuple[str, Any]] = (),
) -> Trace:
    """The record of a run in evaluation mode, and of one in training mode if the model's source asks for the mode.

    others: further examples for evaluation mode. arguments: texts and batches with other arguments. Outputs of either
    mode are kept. If the model does not run in training mode, `Trace.untried` says why. Errors: NotSupported if the
    model returns no tensor of numbers, and those of the model.
    """
    with uncached(model):
        record = _both_modes(model, inputs, apply_rule, others, arguments)
    for name in sorted(record.shared.keys() & record.axes.keys()):
        for dim in record.axes[name]:
            record.ledger.freeze(dim, Reason(sharing(record, name), record.reader(name)[1]))
    return record


def _both_modes(
    model: nn.Module,
    inputs: Any,
    apply_rule: Callable[..., None],
    others: Sequence[Any],
    arguments: Sequence[tuple[str, Any]],
) -> Trace:
    with untouched(model), training_flags(model, training=False) as readers:
        record = new_record(model)
        asked = AnswerMode(NATURAL, lambda tensor: record.value(tensor).dims, model=model)
        with restored_state(model):
            before = Snapshot(model)
            run = trace(record, model, inputs, apply_rule, asked=asked)
            kept = keep_outputs(run, model, "it is an output of the model")
            check_numbers([*run.outputs, *kept])
            record.outputs = [
                (number, axis - tensor.dim(), dim[0])  # from the last: an input with one axis more adds it in front
                for number, tensor in enumerate(run.outputs)
                for axis, dim in enumerate(record.value(tensor).dims)
                if len(dim) == 1
            ]
            record.of_tokens = list(_of_tokens(record, run.outputs))
            del run  # it keeps the tensors of the run alive
            changes = before.changes()
        _add_examples(record, model, others, apply_rule)
        with _first_run(record):
            add_branches(record, model, inputs, apply_rule, asked.questions.values(), len(others) + 1)
            add_calls(record, model, inputs, apply_rule, changes, len(others) + 1)
            add_arguments(record, model, inputs, apply_rule, arguments, len(others) + 1)
    if readers:
        _add_training(record, model, inputs, apply_rule)
    return record


def _of_tokens(record: Trace, outputs: Sequence[Tensor]) -> Iterator[Ints]:
    numbers = {number for _, number in record.tables}
    given = record.given.items()  # type: ignore[no-untyped-call]
    shapes = {tuple(index.shape) for index, number in given if number in numbers}
    for tensor in outputs:
        for axis, dim in enumerate(record.value(tensor).dims):
            if len(dim) == 1 and tuple(tensor.shape[:axis]) in shapes:
                yield dim[0]


def sharing(record: Trace, name: str) -> str:
    """Why a parameter that shares memory with another one is kept."""
    both = " and ".join(sorted((name, record.shared[name])))
    return f"the parameters {both} share one memory: tie them as one parameter"


def _add_examples(record: Trace, model: nn.Module, others: Sequence[Any], apply_rule: Callable[..., None]) -> None:
    """Record a run on each of the other examples. The relations of all runs hold together."""
    with _first_run(record):
        for number, example in enumerate(others, start=1):
            record.example, record.flow, start = number, Flow(), len(record.ledger.frozen)
            with restored_state(model):
                keep_outputs(trace(record, model, example, apply_rule), model, "it is an output of the model")
            shapes = ", ".join("x".join(map(str, tensor.shape)) for tensor in tensors(example) if tensor.dim())
            say_example(record, start, f", on an input of {shapes}")


@contextmanager
def _first_run(record: Trace) -> Iterator[None]:
    """Inside, further runs are recorded, except for their work and data flow: those of the first run count."""
    flow, work, unregistered = record.flow, tuple(record.work), record.unregistered_work.copy()
    uncounted = {name: replace(unknown, reads=set(unknown.reads)) for name, unknown in record.uncounted.items()}
    yield
    seen = {item.use.entity for item in work if item.use}
    unseen = [item for item in record.work[len(work) :] if item.use and item.use.entity not in seen]
    record.flow, record.uncounted, record.unregistered_work = flow, uncounted, unregistered
    record.work = [*work, *(replace(item, constant=0.0) for item in unseen)]


def _add_training(record: Trace, model: nn.Module, inputs: Any, apply_rule: Callable[..., None]) -> None:
    with untouched(model), training_flags(model, training=True), as_in_training(model):
        other = new_record(model, record.ledger.size)
        other.known_sizes.codes = record.known_sizes.codes  # what they know is known from the first run
        try:
            run = trace(other, model, inputs, apply_rule)
            keep_outputs(run, model, "it is an output of the model in training mode")
        except Exception as error:  # a model may need targets, or a larger batch, and raise anything
            record.untried = one_line(error)
            _keep_unread(record, other)
    join_modes(record, other)


def _keep_unread(record: Trace, other: Trace) -> None:
    """Freeze the outputs of weights in an incomplete training run: their readers are unknown."""
    for name, dims in other.axes.items():
        if name not in record.axes:
            for axis, dim in enumerate(dims):
                if other.roles.get((name, axis)) != "in":
                    other.ledger.freeze(dim, Reason("the training mode did not run to its end"))


def check_numbers(outputs: Sequence[Tensor]) -> None:
    """Errors: NotSupported if no output is floating-point or complex, since a cut could not be verified."""
    if any(tensor.is_floating_point() or tensor.is_complex() for tensor in outputs):
        return
    others = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in outputs}))
    raise NotSupported(
        "a cut of this model could not be verified",
        f"the model returns tensors of {others} alone" if others else "the model returns no tensor",
        "return the scores too, in a container, a dataclass or any object",
    )


def join_modes(record: Trace, other: Trace) -> None:
    """Add the relations of the other mode to `record`: equal and frozen positions, sizes and branches.

    The atoms of `other` are numbered after those of `record`. Multiply-adds, calls along units and residual blocks stay
    those of `record`.
    """
    ours, theirs = record.ledger, other.ledger
    ours.size = theirs.size
    for field in ("edges", "ands", "frozen", "batched", "multiples", "min_units"):
        getattr(ours, field).extend(getattr(theirs, field))
    for name, dims in other.axes.items():
        known = record.axes.setdefault(name, dims)
        ours.edges += [(a[0], b[0]) for a, b in zip(known, dims, strict=True) if a and a is not b]
    for axis, role in other.roles.items():
        record.role(axis, role)
    record.links += other.links
    record.fixed += other.fixed
    record.decisions += other.decisions
