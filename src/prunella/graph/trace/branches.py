"""The other sides of branches on values, recorded by runs in which one read gives another value."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from prunella.errors import one_line
from prunella.graph.data import PLAIN, Branch, ReasonKind, Setting
from prunella.graph.guesses import Seen
from prunella.graph.solve.labels import Reason
from prunella.graph.trace.answers import NATURAL, AnswerMode, Answers, Question, refuses
from prunella.graph.trace.dataflow import Flow
from prunella.graph.trace.kept import keep_outputs, say_example
from prunella.graph.trace.recorder import Trace
from prunella.graph.trace.run import trace
from prunella.model.state import restored_state

_MOST = 8
"""Most runs in which a read gives another value."""
_NUMBERS = 16
"""Most numbers that are tried in place of one number."""


def add_branches(
    record: Trace,
    model: nn.Module,
    inputs: Any,
    apply_rule: Callable[..., None],
    questions: Iterable[Question],
    number: int,
) -> None:
    """Record a run on the other side of each branch on a value, and of the branches found there.

    number: that of the first of these runs. If a run ends in an error that the source did not raise itself, the tensors
    held by the source at the branch are kept.
    """
    waiting: list[tuple[Answers, Question]] = [(NATURAL, question) for question in questions]
    known = {question.site for _, question in waiting}
    while waiting and len(record.branches) < _MOST:
        before, question = waiting.pop(0)
        for answers in _other_sides(model, inputs, before, question):
            asked = AnswerMode(answers, lambda tensor: record.value(tensor).dims, model=model)
            branch = _other_side(record, model, inputs, apply_rule, asked, question, number + len(record.branches))
            record.branches.append(branch)
            fresh = [found for site, found in asked.questions.items() if site not in known]
            known |= {found.site for found in fresh}
            waiting += [(answers, found) for found in fresh]
    for _, question in waiting:
        record.branches.append(Branch(question.site.place, PLAIN, 0, "too many branches on values"))
        _keep_within(record, question)


def _other_sides(model: nn.Module, inputs: Any, before: Answers, question: Question) -> Iterator[Answers]:
    """The answers that lead to another side: the opposite one, or the first number that runs other instructions.

    If there is none, the first number that the model accepts: a slice or an index by it runs the same instructions.
    """
    others = [{**before, question.site: other} for other in question.others()]
    if isinstance(question.answer, bool):
        yield from others
        return
    seen = Seen(model, ())
    seen.new(inputs, AnswerMode(before, model=model))
    taken: list[Answers] = []
    for answers in others[:_NUMBERS]:
        if seen.new(inputs, AnswerMode(answers, model=model)):
            yield answers
            return
        taken += [answers] if seen.accepted else []
    yield from taken[:1]


def _other_side(
    record: Trace,
    model: nn.Module,
    inputs: Any,
    apply_rule: Callable[..., None],
    asked: AnswerMode,
    question: Question,
    number: int,
) -> Branch:
    place, start = question.site.place, len(record.ledger.frozen)
    record.example, record.flow, fault = number, Flow(), ""
    try:
        with restored_state(model):
            run = trace(record, model, inputs, apply_rule, asked=asked)
            decides = isinstance(question.answer, bool)
            number_text = f"if the number read at {place} is another"
            side = f"on the other side of the branch at {place}" if decides else number_text
            say_example(record, start, f", {side}")
            keep_outputs(run, model, "it is an output of the model")
    except Exception as error:  # a side that no input reaches may raise anything
        if not refuses(error):
            fault = one_line(error)
            _keep_within(record, question)
    return Branch(place, Setting(asked.instead), number, fault)


def _keep_within(record: Trace, question: Question) -> None:
    """Freeze the tensors that the source holds at a branch with an untraced other side."""
    text = "the other side of a branch on a value was not traced"
    for dim in question.within:
        record.ledger.freeze(dim, Reason(text, question.site.place, kind=ReasonKind.DECISION))
