"""Sizes of the inputs at which the model's source takes another branch, from the comparisons that a run makes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from prunella.graph.data import Hints
from prunella.graph.solve.size_attributes import outcome
from prunella.graph.trace.recorder import Trace
from prunella.graph.trace.tracked_int import Attr, Expression, Shape, SizeComparison, leaves


def hints(record: Trace) -> Hints:
    """All hints of a run about other branches."""
    known = record.known_sizes
    return Hints(
        tuple(turns(record)),
        tuple(_alone(record)),
        tuple(sorted(known.numbers - known.keys)),
        tuple(sorted(known.keys)),
        known.escaped or _derived(record),
        bool(record.values_read),
        known.ranks,
        known.layouts,
        sum(item.constant * math.prod(size for _, size in item.dims) for item in record.work),
    )


def turns(record: Trace) -> Iterator[tuple[int, int]]:
    """A size of the inputs that decides a branch in the source, and the nearest size with the other branch.

    A comparison of several sizes, such as `height * width > 1000` or `x.numel() > 5000`, is tried with all of them
    multiplied: by their common divisor and its multiple.
    """
    found = dict[tuple[int, int], None]()
    for choice, given in _choices(record):
        size = math.gcd(*(leaf.value for leaf in given))
        several = len({leaf.value for leaf in given}) > 1
        before = _decided(choice, {})
        for other in [size * scale for scale in _SCALES] if several else _other_sizes(size, choice):
            if _decided(choice, {id(leaf): leaf.value // size * other for leaf in given}) not in (None, before):
                found[size, other] = None
                if several:  # the model may not accept all of them multiplied, as channels and samples
                    found[size, other * other // size] = None
                break
    return iter(found)


def _alone(record: Trace) -> Iterator[tuple[int, int, int]]:
    """An axis of the inputs, its size, and the nearest other size that changes a comparison with another axis.

    `height > width` and `len(x) != x.shape[1]` do not change while their sizes grow together.
    """
    found = dict[tuple[int, int, int], None]()
    for choice, given in _choices(record):
        if len({leaf.axis for leaf in given}) < 2:
            continue
        before = _decided(choice, {})
        for axis in sorted({leaf.axis for leaf in given} - {-1}):
            size = next(leaf.value for leaf in given if leaf.axis == axis)
            for other in _other_sizes(size, choice):
                new = {id(leaf): other for leaf in given if leaf.axis == axis and leaf.value == size}
                if _decided(choice, new) not in (None, before):
                    found[axis, size, other] = None
                    break
    return iter(found)


def _choices(record: Trace) -> Iterator[tuple[SizeComparison, list[Shape]]]:
    """The comparisons with sizes that no cut changes, and these sizes."""
    for choice, _ in record.decisions:
        given = [leaf for leaf in leaves(choice) if isinstance(leaf, Shape) and not leaf.dim and leaf.value]
        if given:
            yield choice, given


def _derived(record: Trace) -> bool:
    """Whether a comparison reads sizes of computed tensors; only a run shows how they depend on the inputs."""
    return any(leaf.axis < 0 for _, given in _choices(record) for leaf in given)


_SCALES = (2, 4, 8, 16, 32, 64)


def _other_sizes(size: int, choice: SizeComparison) -> list[int]:
    """Sizes to try, the nearest first: neighbors of the numbers in the comparison, small ones, and multiples."""
    ends = [number for side in (choice.left, choice.right) for number in _number(side)]
    ends += [leaf.value for leaf in leaves(choice) if isinstance(leaf, Shape)]
    near = {end + step for end in ends for step in (-1, 0, 1)} | {1, 2, size - 1, size + 1}
    near |= {scale * size for scale in _SCALES}
    return sorted((n for n in near if 0 < n <= _LARGEST), key=lambda n: abs(n - size))


def _number(side: Expression) -> list[int]:
    """The value of a side of a comparison, if no size of a tensor occurs in it."""
    if any(isinstance(leaf, Shape) for leaf in leaves(side)):
        return []
    value = outcome(side, lambda leaf: leaf.value)
    return [] if value is None or abs(value) > _LARGEST else [math.ceil(value)]


_LARGEST = 4096


def _decided(choice: SizeComparison, new: Mapping[int, int]) -> bool | None:
    """The outcome with new sizes of these leaves; None if it cannot be computed."""

    def value(leaf: Attr | Shape) -> int:
        return new.get(id(leaf), leaf.value)

    left, right = outcome(choice.left, value), outcome(choice.right, value)
    return None if left is None or right is None else choice.operation(left, right)
