"""The oracle on calls with other arguments: what such a call returns is what the masked model returns."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from prunella.graph.data import Graph
from prunella.graph.guesses import attempt
from prunella.graph.other_sizes import verified
from prunella.graph.variants import Variant
from prunella.graph.verify import Addition, Oracle, at_fault
from prunella.model.contained import contained
from prunella.model.state import Steady
from prunella.model.trees import each, tensors
from prunella.types import Keep


class CutVerdict(enum.Enum):
    """How a cut compares with the masked model on one call."""

    RIGHT = enum.auto()
    AS_CUT = enum.auto()
    """Further outputs are inner units or states of blocks: they are those of the kept ones."""
    BEYOND = enum.auto()
    """The outputs of the example are right, further ones depend on how many experts, tokens or blocks there are."""
    FAILS = enum.auto()
    """The same, and the smaller model does not run there."""
    WRONG = enum.auto()


@dataclass(frozen=True)
class ArgumentCheck:
    """The calls with another argument, by the verdict on them; those that are right are left out."""

    wrong: tuple[Variant, ...] = ()
    as_cut: tuple[Variant, ...] = ()
    beyond: tuple[Variant, ...] = ()
    fails: tuple[Variant, ...] = ()


def check_arguments(oracle: Oracle, graph: Graph, inputs: Any, tried: Sequence[Variant]) -> ArgumentCheck:
    """Compare a cut with the masked model on calls with other arguments.

    Where a call with several of them is not simply right, each of them is judged alone.
    """
    if not tried:
        return ArgumentCheck()
    judge = _Judge(oracle, inputs, graph)
    verdicts = dict[Variant, CutVerdict]()
    for variant in tried:
        verdict = judge.verdict(variant)
        alone = variant.parts if verdict is not CutVerdict.RIGHT else ()
        verdicts |= {part: judge.verdict(part) for part in alone if part not in verdicts}
        explained = any(verdicts[part] is not CutVerdict.RIGHT for part in alone)
        if not variant.parts or (verdict is CutVerdict.WRONG and not explained):
            verdicts[variant] = verdict
    kinds = (CutVerdict.WRONG, CutVerdict.AS_CUT, CutVerdict.BEYOND, CutVerdict.FAILS)
    return ArgumentCheck(*(tuple(v for v, verdict in verdicts.items() if verdict is kind) for kind in kinds))


def wrong_groups(model: nn.Module, graph: Graph, keep: Keep, inputs: Any, wrong: Sequence[Variant]) -> list[str]:
    """The groups of which a cut is wrong on these calls, by bisection."""

    def objection(oracle: Oracle) -> str | None:
        return "wrong" if check_arguments(oracle, graph, inputs, wrong).wrong else None

    return list(at_fault(model, graph, keep, objection))


@dataclass(frozen=True, eq=False)
class _Judge:
    oracle: Oracle
    inputs: Any
    graph: Graph

    @cached_property
    def guard(self) -> Steady:
        """The dense model, for runs beside the oracle."""
        return Steady(self.oracle.dense)

    def verdict(self, variant: Variant) -> CutVerdict:
        """The verdict on one call."""
        number = next((branch.example for branch in self.graph.branches if branch.batch is variant.batch), 0)
        with contained():
            checks = [
                verified(self.oracle, batch, example=number, further=True)
                for batch in self._of_both_signs(variant.batch)
            ]
            if all(checks):
                return CutVerdict.AS_CUT if any(check.as_cut for check in checks if check) else CutVerdict.RIGHT
            if not attempt(self.guard, variant.batch).accepted:
                return CutVerdict.RIGHT
            return self._beyond(variant.batch)

    def _of_both_signs(self, batch: Any) -> Iterator[Any]:
        """A batch, and the same with other signs: a unit that is zero on one after a rectifier is not on the other."""
        yield batch
        if any(tensor.is_floating_point() for tensor in tensors(batch)):
            turned = each(batch, lambda tensor: -tensor.detach() if tensor.is_floating_point() else tensor)
            yield from [turned] if attempt(self.guard, turned).accepted else []

    def _beyond(self, batch: Any) -> CutVerdict:
        """Whether what differs is beside the outputs of the example, and is another one by the kind of the cut.

        Where experts, positions of a norm or blocks go, a statistic over them is another one; where tokens go, those in
        another argument have other numbers.
        """
        done = self.oracle.done
        if done.renumbered and len(_integers(batch)) > len(_integers(self.inputs)):
            return CutVerdict.BEYOND
        if not (done.along or done.dropped or done.renumbered):
            return CutVerdict.WRONG
        verdicts = {
            Addition.BOTH: CutVerdict.BEYOND,
            Addition.MASKED: CutVerdict.FAILS,
            Addition.OTHER: CutVerdict.WRONG,
        }
        return verdicts[self.oracle.adds(batch, self.inputs)]


def _integers(batch: Any) -> list[Tensor]:
    return [tensor for tensor in tensors(batch) if not tensor.is_floating_point() and tensor.dtype != torch.bool]
