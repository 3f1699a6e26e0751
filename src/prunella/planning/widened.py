"""The runs beside the example on which a cut has to be right: other sizes, and other arguments."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from prunella.graph.arguments import Variant, Variants, variants
from prunella.graph.other_sizes import check_arguments, disagreement
from prunella.graph.resized import batch_text
from prunella.planning.request import MOST_EXAMPLES, Request, with_arguments, with_example
from prunella.types import Keep

_LISTED = 3


@dataclass(frozen=True)
class Widening:
    """request: traced on what shows that a cut is wrong too; None if nothing does, or if no more is tried.

    wrong: that run, in words; empty if the cut is right. narrower: arguments with outputs that the cut narrows.
    """

    request: Request | None = None
    wrong: str = ""
    narrower: tuple[Variant, ...] = ()


def with_tried(request: Request) -> Request:
    """The request with the other arguments that are tried; they are looked for once."""
    return replace(request, tried=variants(request.model, request.inputs, request.others))


def widened(request: Request, keep: Keep, given: int = 0) -> Widening:
    """Check a cut on other sizes and on other arguments. given: number of examples by hand. Errors: of `couple`."""
    other = disagreement(request.model, request.graph, keep, request.inputs, request.others)
    if other is not None:
        text = f"on {batch_text(other, request.inputs)}"
        few = len(request.others) < given + MOST_EXAMPLES - 1
        return Widening(with_example(request, other) if few else None, text)
    tried = (request.tried or Variants()).batches
    check = check_arguments(request.model, request.graph, keep, request.inputs, tried)
    if check.wrong:
        text = ", ".join(variant.text for variant in check.wrong[:_LISTED])
        fresh = not any(variant in request.traced for variant in check.wrong)
        return Widening(with_arguments(request, check.wrong) if fresh else None, text)
    return Widening(narrower=check.narrower)


def argument_remarks(request: Request, narrower: tuple[Variant, ...]) -> Iterator[str]:
    """What was found with other arguments, and which were not tried."""
    for variant in request.traced:
        yield f"traced {variant.text} too, where cuts are wrong that are right on the example"
    for variant in narrower:
        what = "some outputs, or tensors that the model keeps, are inner units"
        yield f"{variant.text} {what}: they have the kept positions alone"
    untried = request.tried.untried if request.tried else ()
    if untried:
        rest = f" and {len(untried) - _LISTED} more" if len(untried) > _LISTED else ""
        yield f"not tried with another value, since no guess runs: {', '.join(untried[:_LISTED])}{rest}; an example may"
