"""Batches on which the model's source may take another path than on the examples, although no comparison shows it.

Sizes come from the numbers that the source names: `TABLE[x.shape[1]]`, `log2(len(x)) > 5`. Values come from the
example: ten thousand times as large, zero, of the other sign. A batch is informative if it runs instructions of the
source, or modules, that no batch before it ran.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from prunella.graph.data import PLAIN, Hints, Setting
from prunella.graph.trace.answers import refuses
from prunella.graph.trace.kept_state import enter
from prunella.model.executed import ExecutedSteps, executed
from prunella.model.forward import forward, outputs_of
from prunella.model.state import Steady
from prunella.model.trees import each

_RUNS = 24
"""Largest number of batches to run; sizes nearest to the example's come first."""
_Size = tuple[frozenset[int], int]
_SCALES = (2, 4, 8, 16, 32, 64)


class Seen:
    """The steps and modules run so far.

    accepted: whether the model accepted the last batch. refused: whether a `raise` or `assert` of its source did not.
    The examples run once a batch is accepted. Between the runs the model must not change.
    """

    def __init__(self, model: nn.Module, examples: Iterable[Any], guard: Steady | None = None) -> None:
        self.model, self.guard, self.accepted, self.refused = model, guard or Steady(model), False, False
        self._examples, self._before, self._steps = tuple(examples), list[Seen](), ExecutedSteps()

    def forked(self) -> Seen:
        """Another one, which has seen what this one has."""
        other = Seen(self.model, (), self.guard)
        other._before.append(self)
        return other

    def steps(self) -> ExecutedSteps:
        """The instructions and modules so far."""
        while self._before:
            self._steps.add(self._before.pop().steps())
        examples, self._examples = self._examples, ()
        for example in examples:
            self._steps.add(self._run(example) or ExecutedSteps())
        return self._steps

    def codes(self) -> set[CodeType]:
        """The functions of the source that have run."""
        return set(self.steps().steps)

    def new(self, batch: Any, observer: AbstractContextManager[Any] | None = None, *, setting: Setting = PLAIN) -> bool:
        """Whether the model accepts this batch, with finite outputs, and runs something new on it."""
        steps = self._run(batch, observer, setting)
        self.accepted = steps is not None
        if steps is None:
            return False
        fresh = not steps <= self.steps()
        self._steps.add(steps)
        return fresh

    def _run(
        self, batch: Any, observer: AbstractContextManager[Any] | None = None, setting: Setting = PLAIN
    ) -> ExecutedSteps | None:
        """The steps of one batch; None if the model does not accept it."""
        self.refused = False
        try:
            with ExitStack() as stack:
                stack.enter_context(self.guard.run())
                stack.enter_context(torch.no_grad())
                stack.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
                enter(self.model, setting, partial(forward, self.model))
                stack.enter_context(observer or nullcontext())
                steps = stack.enter_context(executed(self.model))
                outputs = outputs_of(self.model, batch)
        except Exception as error:  # a probe: whatever it raises, the model does not accept this batch
            self.refused = refuses(error)
            return None
        return steps if all(bool(torch.isfinite(t).all()) for t in outputs if t.is_floating_point()) else None


def sizes_to_try(main: Tensor, hints: Hints) -> list[tuple[frozenset[int], int, bool]]:
    """Axes of the largest input, their new size, and whether to try it without evidence of a branch; nearest first.

    Keys of tables, and numbers where a size was converted to a Python integer, are always tried: a lookup, slice or
    index by them runs the same instructions.
    """
    named: dict[_Size, bool] = {}
    scaled: dict[_Size, bool] = {}
    for axes in _axes(main):
        size = main.shape[min(axes)]
        for number in (*hints.keys, *hints.numbers):
            beyond = number + 1 if number >= size else number - 1
            for other in (number,) if number in hints.keys else (number, beyond):
                named.setdefault((axes, other), number in hints.keys or hints.escaped)
        scaled |= {(axes, size * scale): hints.escaped for scale in _SCALES if hints.escaped}
    tried = [(axes, other, anyway) for part in (named, scaled) for (axes, other), anyway in _nearest(part, main)]
    return [(axes, other, anyway) for axes, other, anyway in tried if 0 < other != main.shape[min(axes)]][:_RUNS]


def _nearest(tried: Mapping[_Size, bool], main: Tensor) -> list[tuple[_Size, bool]]:
    return sorted(tried.items(), key=lambda item: abs(math.log(max(item[0][1], 1) / main.shape[min(item[0][0])])))


def _axes(main: Tensor) -> list[frozenset[int]]:
    """The samples, all axes of an image or a sequence where they are of one size, and each of them.

    Of three axes the second may be the steps of a sequence; of more it is taken for the channels.
    """
    places = range(2 if main.is_floating_point() and main.dim() > 2 else 1, main.dim())
    several = [frozenset(places)] if len({main.shape[axis] for axis in places}) == 1 else []
    steps = [frozenset([1])] if main.dim() == 3 else []
    return list(dict.fromkeys([frozenset([0]), *several, *steps, *(frozenset([axis]) for axis in places)]))


def other_values(inputs: Any) -> Iterator[Any]:
    """The inputs with other values of the same shape."""
    for factor in (1e4, 0.0, -1.0, 1e-4):
        yield each(inputs, partial(_scaled, factor=factor))
    for value in (0, 1):
        yield each(inputs, partial(_filled, value=value))


def _scaled(tensor: Tensor, factor: float) -> Tensor:
    return tensor.detach() * factor if tensor.is_floating_point() else tensor.detach()


def _filled(tensor: Tensor, value: int) -> Tensor:
    counted = not tensor.is_floating_point() and not tensor.is_complex()
    return torch.full_like(tensor, value) if counted else tensor.detach()


@dataclass(frozen=True)
class Attempt:
    """A run on a batch. accepted: with finite outputs. refused: a `raise` or `assert` of the source ended it."""

    accepted: bool
    refused: bool = False


def attempt(guard: Steady, batch: Any) -> Attempt:
    """Run the model of the guard on a batch."""
    try:
        with guard.run(), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outputs = outputs_of(guard.model, batch)
    except Exception as error:  # a probe: whatever it raises, the model does not take this batch
        return Attempt(accepted=False, refused=refuses(error))
    return Attempt(all(bool(torch.isfinite(t).all()) for t in outputs if t.is_floating_point()))
