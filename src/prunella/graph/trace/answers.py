"""Reads of tensor values by Python, where the source may branch on them, and other answers in their place."""

from __future__ import annotations

import dis
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from prunella.graph.solve.labels import Dim
from prunella.graph.trace.known_sizes import known_numbers
from prunella.graph.trace.queries import asked_by, queries_answered
from prunella.graph.trace.source import reader, where
from prunella.model.calls import called
from prunella.model.trees import tensors

Answer = bool | int | float
_REQUIRES = "requires_grad"
_CALLS = "__bool__ is_nonzero equal allclose __contains__ __int__ __float__ __index__ item"
_ASKED = frozenset({*_CALLS.split(), _REQUIRES})
"""Calls that answer with one number or truth."""


_READS = 16
"""Most reads at one site that get another answer: a loop that waits for a value then ends."""
LEAVES_TORCH = frozenset("numpy tolist item __array__ __float__ __int__ __bool__ __index__ __dlpack__ stride".split())
"""Calls that turn values or sizes into plain Python, where no cut can follow."""
_DECIDES = LEAVES_TORCH | frozenset("is_nonzero equal allclose __contains__".split())
"""Calls that give Python a number or a truth value that depends on tensor values."""
_SIZED_BY_VALUES = frozenset("nonzero masked_select unique _unique _unique2 unique_dim unique_consecutive nms".split())


def decides(name: str, start: FrameType | None) -> bool:
    """Whether the model's source itself reads a value by this call."""
    return name in _DECIDES and reader(start) is not None


def sized_by_values(func: Any, args: Any) -> bool:
    """Whether the size of a result of this operation depends on values."""
    masks = args[1] if called(func) == "index" and len(args) > 1 else ()
    return called(func) in _SIZED_BY_VALUES or any(t is not None and t.dtype == torch.bool for t in masks)


@dataclass(frozen=True)
class Site:
    """An expression of the model's source that reads a value. place: `file:line`, for people.

    position: lines and columns of the expression. The index of the instruction is not stable: Python specializes the
    instructions of a function that runs often, unless it is observed.
    """

    file: str
    function: int
    position: tuple[int | None, ...]
    place: str


Answers = Mapping[Site, Answer]
NATURAL: Answers = {}
"""Every read gives the computed value."""


@dataclass(frozen=True)
class Question:
    """The first read at a site of a run: its answer, and the numbers that the function around it names.

    within: the labels of the tensors that the running functions of the source hold at this moment.
    """

    site: Site
    call: str
    answer: Answer
    numbers: tuple[Answer, ...] = ()
    within: tuple[Dim, ...] = ()

    def others(self) -> list[Answer]:
        """Other answers: the opposite, or neighbors of the numbers that the source names, and distant numbers."""
        if isinstance(self.answer, bool):
            return [not self.answer]
        beside = [near for number in self.numbers for near in _beside(number)]
        numbers = [*beside, 0, 1, -1, self.answer * 1_000 + 1, -self.answer]
        return [other for other in dict.fromkeys(map(type(self.answer), numbers)) if other != self.answer]


def _beside(number: Answer) -> tuple[Answer, ...]:
    return (number, number * 1.1, number * 0.9) if isinstance(number, float) else (number, number + 1, number - 1)


class AnswerMode(TorchFunctionMode):
    """Collects the first question at each site of a run, and replaces the answers of all reads at sites in `instead`.

    labels: gives the labels of a tensor, for `Question.within`; without it, that is empty. model: its source may have
    imported queries by name.
    """

    def __init__(
        self,
        instead: Answers,
        labels: Callable[[Tensor], Iterable[Dim]] | None = None,
        *,
        model: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.instead, self.labels, self.model = instead, labels, model
        self.questions: dict[Site, Question] = {}
        self.reads: Counter[Site] = Counter()
        self._queries = ExitStack()

    def __enter__(self) -> AnswerMode:
        super().__enter__()  # type: ignore[no-untyped-call]
        self._queries.enter_context(queries_answered(self._queried, self.model))
        return self

    def __exit__(self, *error: Any) -> None:
        self._queries.close()
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = func(*args, **(kwargs or {}))
        name = _REQUIRES if func == Tensor.requires_grad.__get__ else called(func)  # type: ignore[attr-defined]
        return self._answered(name, answer, reader(sys._getframe(1))) if name in _ASKED else answer

    def _queried(self, query: str, answer: Any) -> Any:
        """The answer to a query of the source beside its tensors."""
        return self._answered(query, answer, asked_by(sys._getframe(2)))

    def _answered(self, name: str, answer: Any, frame: FrameType | None) -> Any:
        if frame is None or not isinstance(answer, bool | int | float):
            return answer
        site = _site(frame)
        self.reads[site] += 1
        if site in self.questions:
            return self.instead.get(site, answer) if self.reads[site] <= _READS else answer
        within = () if self.labels is None else tuple(dim for held in _held(frame) for dim in self.labels(held) if dim)
        self.questions[site] = Question(site, name, answer, known_numbers(frame), within)
        return self.instead.get(site, answer)


def _site(frame: FrameType) -> Site:
    code = frame.f_code
    position = next(islice(code.co_positions(), frame.f_lasti // 2, None), (frame.f_lineno,))
    return Site(code.co_filename, code.co_firstlineno, position, where(frame))


def _held(frame: FrameType | None) -> list[Tensor]:
    """The tensors in the local variables of the running functions of the source."""
    held: list[Tensor] = []
    while frame is not None and where(frame):
        held += [tensor for value in frame.f_locals.values() for tensor in tensors(value)]
        frame = frame.f_back
    return held


def refuses(error: BaseException) -> bool:
    """Whether the source itself raised this error, by `raise` or `assert`: a guard, without code on its other side."""
    step = error.__traceback__
    if step is None:
        return False
    while step.tb_next is not None:
        step = step.tb_next
    name = step.tb_frame.f_code.co_name
    return name in _GUARDS or _instruction(step.tb_frame.f_code, step.tb_lasti) in _RAISES


_GUARDS = frozenset({"_assert", "_check", "_check_with"})
_RAISES = frozenset({"RAISE_VARARGS", "RERAISE"})


def _instruction(code: CodeType, at: int) -> str:
    return next((entry.opname for entry in dis.get_instructions(code) if entry.offset == at), "")
