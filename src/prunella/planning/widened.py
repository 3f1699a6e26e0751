"""The runs beside the example on which a cut has to be right: other sizes, and other arguments."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from prunella.errors import NotSupported
from prunella.graph.arguments import variants
from prunella.graph.data import Graph
from prunella.graph.other_arguments import ArgumentCheck, check_arguments, wrong_groups
from prunella.graph.other_sizes import disagreement
from prunella.graph.resized import batch_text
from prunella.graph.variants import Variant, Variants, listed, listed_arguments
from prunella.graph.verify import oracle_of
from prunella.planning.request import MOST_EXAMPLES, Request, with_arguments, with_example
from prunella.types import Keep

_NOTHING = ArgumentCheck()
_LEAVE_OUT = "leave them out: skip=, only="


@dataclass(frozen=True)
class Widening:
    """request: with what shows that a cut is wrong; None if nothing does, or if no more is tried.

    wrong: that run, in words; empty if the cut is right. check: what calls with other arguments show of a right cut.
    """

    request: Request | None = None
    wrong: str = ""
    check: ArgumentCheck = _NOTHING


def with_tried(request: Request) -> Request:
    """The request with the other arguments that are tried; they are looked for once."""
    return replace(request, tried=variants(request.model, request.inputs, request.others))


def widened(request: Request, keep: Keep, given: int = 0) -> Widening:
    """Check a cut on other sizes and on other arguments. given: number of examples by hand. Errors: of `couple`."""
    oracle = oracle_of(request.model, request.graph, keep)
    if oracle is None:
        return Widening()
    other = disagreement(oracle, request.graph.hints, request.inputs, request.others)
    if other is not None:
        text = f"on {batch_text(other, request.inputs)}"
        few = len(request.others) < given + MOST_EXAMPLES - 1
        return Widening(with_example(request, other) if few else None, text)
    tried = (request.tried or Variants()).batches
    check = check_arguments(oracle, request.graph, request.inputs, tried)
    if not check.wrong:
        return Widening(check=check)
    text = _all(check.wrong)
    names = wrong_groups(request.model, request.graph, keep, request.inputs, check.wrong)
    if request.wrong.keys() >= {*names}:
        raise NotSupported(f"units of {listed(tuple(names))} cannot be removed", f"{text} a cut is wrong", _LEAVE_OUT)
    fresh = [variant for variant in check.wrong if variant not in request.traced]
    traced = with_arguments(request, fresh) if fresh else None
    if traced is not None and _groups(request.graph) - set(names) <= _groups(traced.graph):
        return Widening(traced, text)
    reasons = dict.fromkeys(names, f"{text} a cut of it is wrong, though it is right on the example")
    return Widening(replace(request, wrong={**request.wrong, **reasons}), text)


def _groups(graph: Graph) -> set[str]:
    return {group.name for group in (*graph.groups, *graph.stacks)}


def argument_remarks(request: Request, check: ArgumentCheck) -> Iterator[str]:
    """What was found with other arguments, and which were not tried."""
    if request.traced:
        yield f"also traced {_all(request.traced)}, where a cut that is right on the example would be wrong"
    if check.as_cut:
        what = "some outputs, or tensors that the model keeps, are inner units or states of blocks"
        yield f"{_all(check.as_cut)} {what}: the smaller model has those of the kept ones"
    if check.beyond:
        what = "some outputs depend on how many units there are: they are those of the smaller model, and not compared"
        yield f"{_all(check.beyond)} {what}"
    if check.fails:
        yield f"{_all(check.fails)} the smaller model does not run: some outputs depend on how many units there are"
    untried = request.tried.untried if request.tried else ()
    if untried:
        yield f"no other value was tried, since the model took none of the guesses: {listed(untried)}; give examples"


def _all(variants: Sequence[Variant]) -> str:
    return listed_arguments(change for variant in variants for change in variant.changes)
