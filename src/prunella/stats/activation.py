"""Statistics of what a weight multiplies.

The multiplications are watched below autograd, where every one of them (linear, addmm, matmul, convolution, whatever
module or function it came from) is one of a few operations. A weight is known by its memory, so that transposed and
sliced views of it, and the copies that autocast makes, count as well.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils._python_dispatch import TorchDispatchMode

from prunella.stats.subject import Subject

View = tuple[tuple[int, ...], tuple[int, ...], int]
"""Shape, strides and offset of a view of a weight."""
Totals = Mapping[tuple[str, View], Tensor]
"""Entity and view of it -> a total over the tokens that broadcasts to the view."""


@dataclass(frozen=True)
class Reading:
    """One multiplication: a tensor that may be a weight, and the input that it multiplies.

    every: values in the shape of `x` -> their totals over all tokens, in a shape that broadcasts to `operand`, each as
    often as it is multiplied (a convolution: by patches, padding included). once: the same with each value once.
    """

    operand: Tensor
    x: Tensor
    every: Callable[[Tensor], Tensor]
    once: Callable[[Tensor], Tensor]


class InputNorm:
    """`input_norm`: L2 norm over all tokens of the input that each weight multiplies, by entity, in the weight's shape.

    Convolutions: over all patches, padding included. Transposed convolutions: over all positions of the input.
    Sums are kept in float64, so that many batches and one large batch agree. A weight that never ran is absent.
    """

    def __init__(self, subject: Subject) -> None:
        layers = [subject.layer_of[name] for name in subject.scored if name in subject.layer_of]
        self._weights = {layer.entity: subject.parameters[layer.entity] for layer in layers}
        self._sums: dict[tuple[str, View], Tensor] = {}

    def watch(self) -> AbstractContextManager[object]:
        """Watch one forward pass."""
        return Watch(self._weights, self._add)

    def add(self, grads: object) -> None:
        """Gradients say nothing of inputs."""

    def result(self) -> dict[str, Tensor]:
        """By entity."""
        return {name: self._norms(name) for name in self._weights if any(key[0] == name for key in self._sums)}

    def _add(self, name: str, view: View, reading: Reading) -> None:
        squares = reading.every(_squares(reading.x))
        known = self._sums.get((name, view))
        self._sums[name, view] = squares if known is None else known + squares

    def _norms(self, name: str) -> Tensor:
        return lay_out(self._weights[name], name, self._sums).sqrt().to(torch.float32)


def lay_out(weight: Tensor, name: str, totals: Totals) -> Tensor:
    """Write the totals of every view of a weight where the view lies in it, and add up: float64, as the weight."""
    flat = torch.zeros(weight.numel(), dtype=torch.float64, device=weight.device)
    places = torch.arange(weight.numel(), device=weight.device)
    for (owner, (size, stride, offset)), total in totals.items():
        if owner == name:
            at = places.as_strided(size, stride, offset).reshape(-1)
            flat.index_add_(0, at, total.expand(size).reshape(-1))
    return flat.as_strided(weight.shape, weight.stride(), 0)


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Report every multiplication by one of `weights`."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the guard against the compiler would import it, which takes seconds

    def __init__(self, weights: dict[str, Tensor], report: Callable[[str, View, Reading], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._report = report
        self._homes: dict[int, list[tuple[str, int, int]]] = {}
        self._held: list[Tensor] = []
        for name, weight in weights.items():
            self._settle(name, weight)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        read = _READERS.get(func.overloadpacket)
        for reading in read(args, out) if read else ():
            operand = reading.operand
            home = self._home(operand)
            if home is not None:
                name, offset = home
                view = tuple(operand.shape), operand.stride(), int(operand.storage_offset()) - offset
                self._report(name, view, reading)
        if func.overloadpacket is torch.ops.aten._to_copy:
            self._follow(args[0], out)
        return out

    def _settle(self, name: str, weight: Tensor) -> None:
        entry = (name, int(weight.storage_offset()), weight.numel())
        self._homes.setdefault(weight.untyped_storage().data_ptr(), []).append(entry)

    def _home(self, tensor: Tensor) -> tuple[str, int] | None:
        for name, offset, size in self._homes.get(tensor.untyped_storage().data_ptr(), ()):
            if offset <= tensor.storage_offset() < offset + size:
                return name, offset
        return None

    def _follow(self, source: Tensor, copy: Tensor) -> None:
        """A whole weight in another precision is still that weight. Held, so that its memory is not used again."""
        home = self._home(source)
        if home is not None and source.stride() == copy.stride() and source.storage_offset() == home[1]:
            self._settle(home[0], copy)
            self._held.append(copy)


def _squares(values: Tensor) -> Tensor:
    return values.detach().to(torch.promote_types(values.dtype, torch.float32)).square()


def _product(left: Tensor, right: Tensor) -> Iterator[Reading]:
    """`left @ right`, batched or not: either may be the weight, the other is its input."""

    def rows(values: Tensor) -> Tensor:
        return values.sum(-2, dtype=torch.float64).unsqueeze(-1)

    def columns(values: Tensor) -> Tensor:
        return values.sum(-1, dtype=torch.float64).unsqueeze(-2)

    yield Reading(right, left, rows, rows)
    yield Reading(left, right, columns, columns)


def _first_two(args: Sequence[Any], _: Any) -> Iterator[Reading]:
    return _product(args[0], args[1])


def _last_two(args: Sequence[Any], _: Any) -> Iterator[Reading]:
    return _product(args[1], args[2])


def _vector(args: Sequence[Any], _: Any) -> Iterator[Reading]:
    return _product(args[-2], args[-1].unsqueeze(-1))


def _linear(args: Sequence[Any], _: Any) -> Iterator[Reading]:
    def rows(values: Tensor) -> Tensor:
        return values.flatten(0, -2).sum(0, dtype=torch.float64)

    yield Reading(args[1], args[0], rows, rows)


def _convolution(args: Sequence[Any], out: Any) -> Iterator[Reading]:
    x, weight, _, stride, padding, dilation, transposed, _, groups = args

    def patches(values: Tensor) -> Tensor:
        return _patches(values, weight, stride, padding, dilation, groups, tuple(out.shape[2:]))

    def channels(values: Tensor) -> Tensor:
        sums = values.transpose(0, 1).flatten(1).sum(1, dtype=torch.float64)
        if transposed:
            return sums.view(-1, *[1] * (weight.dim() - 1))
        rows = sums.view(groups, -1).repeat_interleave(weight.shape[0] // groups, 0)
        return rows.view(*rows.shape, *[1] * (weight.dim() - 2))

    yield Reading(weight, x, channels if transposed else patches, channels)


def _patches(
    values: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    grid: tuple[int, ...],
) -> Tensor:
    """Total of every entry of the patches that a convolution reads, without unfolding them."""
    sums = values.sum(0, dtype=torch.float64)
    sums = pad(sums, [side for amount in reversed(padding) for side in (amount, amount)])
    kernel = tuple(weight.shape[2:])
    entries = []
    for place in itertools.product(*map(range, kernel)):
        starts = [p * d for p, d in zip(place, dilation, strict=True)]
        cut = [slice(a, a + s * (n - 1) + 1, s) for a, s, n in zip(starts, stride, grid, strict=True)]
        entries.append(sums[(slice(None), *cut)].flatten(1).sum(1))
    patches = torch.stack(entries, 1).view(values.shape[1], *kernel)
    if groups == 1:
        return patches.unsqueeze(0)
    return patches.view(groups, -1, *kernel).repeat_interleave(weight.shape[0] // groups, 0)


_aten = torch.ops.aten
_READERS: dict[Any, Callable[[Sequence[Any], Any], Iterator[Reading]]] = {
    _aten.mm: _first_two,
    _aten.bmm: _first_two,
    _aten.mv: _vector,
    _aten.addmm: _last_two,
    _aten.baddbmm: _last_two,
    _aten.addmv: _vector,
    _aten.linear: _linear,
    _aten.convolution: _convolution,
}
