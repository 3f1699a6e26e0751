"""The oracle on inputs of other sizes: what holds for one batch size or image size only is not proven.

A reshape that mixes channels with positions, or a branch on the batch size, may couple other channels on another input.
From an example, batches of other sizes are made from its own values: another number of samples, and other positions on
the axes that may be an image or a sequence. Where the dense model does not accept a size, nothing is concluded.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from prunella.errors import CheckFailed, NotSupported
from prunella.graph.cut.changes import Changes, changes
from prunella.graph.cut.surgery import change_
from prunella.graph.data import Graph, Hints
from prunella.graph.guesses import Seen, other_values, sizes_to_try
from prunella.graph.solve.tokens import known_only, renumber
from prunella.graph.trace.answers import NATURAL, Answers
from prunella.graph.verify import check, relative_error, verify
from prunella.model.calls import called
from prunella.model.copying import copied
from prunella.model.forward import outputs_of
from prunella.model.state import untouched
from prunella.model.trees import each, tensors
from prunella.types import Keep

_FEW = 8
"""An axis of fewer positions is made longer, a longer one shorter: the check then costs no more than the first."""
_SAMPLES = 4
"""A batch of fewer samples is tried with one more; a larger one with one less than this number."""
_LARGEST = 1 << 18
"""Numbers of an input that is tried because a branch of the source asks for it; or four times the example."""
_MOST = 4
"""Sizes at which the source takes another branch, of the nearest ones."""


_NONE = Hints()


def wrong_branch(model: nn.Module, graph: Graph, keep: Keep, inputs: Any) -> str:
    """The place of a branch on a value on whose other side the cut differs from the masked model; empty if none is."""
    applied, small = changes(graph, keep), copied(model)
    ran = [branch for branch in graph.branches if not branch.fault]
    if not applied or not ran:
        return ""
    change_(small, applied)
    wrong = (b.place for b in ran if not _agrees(model, small, applied, inputs, example=b.example, answers=b.answers))
    return next(wrong, "")


def disagreement(model: nn.Module, graph: Graph, keep: Keep, inputs: Any, others: Sequence[Any] = ()) -> Any:
    """The first input of another size on which the cut differs from the masked model; None if there is none."""
    applied, small = changes(graph, keep), copied(model)
    if not applied:
        return None
    change_(small, applied)
    for batch in other_sizes(model, inputs, others, graph.hints):
        if not _agrees(model, small, applied, batch):
            return batch
    return None


def check_sizes(dense: nn.Module, small: nn.Module, applied: Changes, inputs: Any, others: Sequence[Any] = ()) -> None:
    """`check` on inputs of other sizes than those of the examples. Errors: `CheckFailed`, `NotSupported`."""
    for batch in other_sizes(dense, inputs, others):
        if _agrees(dense, small, applied, batch):
            continue
        try:
            check(dense, small, applied, batch)
        except CheckFailed as error:
            todo = f"plan with both sizes: {_BOTH}; or leave out what is cut there: skip="
            raise CheckFailed(f"{error.what} on an input of {shape_text(batch)}", error.why, todo) from error


_BOTH = "prunella.Examples(one, other)"


def other_sizes(model: nn.Module, inputs: Any, others: Sequence[Any] = (), hints: Hints = _NONE) -> Iterator[Any]:
    """Batches of other sizes on which the dense model gives finite outputs; not those of `others`, which are known."""
    given = [tensor for tensor in tensors(inputs) if tensor.dim()]
    if not given or any(parameter.is_meta for parameter in model.parameters()) or _may_crash(model):
        return
    known = {_shapes(example) for example in (inputs, *others)}

    def first(batches: Iterable[Any]) -> list[Any]:
        """The first of these that is new and that the dense model takes."""
        for batch in batches:
            if _shapes(batch) not in known and _runs(model, batch):
                known.add(_shapes(batch))
                return [batch]
        return []

    main = max(given, key=lambda tensor: tensor.numel())
    count = main.shape[0]
    more = count + 1 if count < _SAMPLES else _SAMPLES - 1
    # An index out of range is an error on a CPU; an accelerator does not survive it.
    if main.device.type != "cpu" and not all(tensor.is_floating_point() for tensor in given):
        yield from first([samples(inputs, count, count + 1)])
        return
    both = first(samples(batch, count, more) for batch in _resized(inputs, main))
    yield from both or first([samples(inputs, count, more)])
    yield from [] if both else first(_resized(inputs, main))
    yield from first([samples(inputs, count, 1)])
    for size, other in hints.turns[:_MOST]:
        for batch in _turned(inputs, main, size, other):  # all: nobody knows which axis decides
            yield from first([batch])
    for axis, size, other in hints.alone[:_MOST]:
        if axis < main.dim() and main.shape[axis] == size:
            yield from first(_stretched(inputs, main, frozenset([axis]), other))
    yield from _guessed(model, inputs, others, hints, main, first)


def _may_crash(model: nn.Module) -> bool:
    """Whether a program runs a recurrent kernel itself: a state of another size then ends the process."""
    graphs = [module.graph for module in model.modules() if isinstance(module, fx.GraphModule)]
    names = {called(node.target) for graph in graphs for node in graph.nodes if node.op == "call_function"}
    return bool(names & _UNCHECKED)


_UNCHECKED = frozenset("lstm gru rnn_tanh rnn_relu mkldnn_rnn_layer _thnn_fused_lstm_cell _thnn_fused_gru_cell".split())
"""Operations whose checks of sizes are in the module around them."""


def _guessed(
    model: nn.Module,
    inputs: Any,
    others: Sequence[Any],
    hints: Hints,
    main: Tensor,
    first: Callable[[Iterable[Any]], list[Any]],
) -> Iterator[Any]:
    """Batches on which the source does something new, though no comparison tells so."""
    sizes = sizes_to_try(main, hints)
    if not sizes and not hints.values:
        return
    seen, told = Seen(model, (inputs, *others)), {True: 0, False: 0}
    for axes, other, anyway in sizes:
        for batch in _stretched(inputs, main, axes, other):
            fresh = seen.new(batch)
            if seen.accepted and (fresh or anyway) and told[fresh] < _MOST:
                told[fresh] += 1
                yield from first([batch])
    for batch in other_values(inputs) if hints.values else ():
        if seen.new(batch):
            yield batch


def shape_text(inputs: Any) -> str:
    """`2x3x4x4, 2x5`."""
    return ", ".join("x".join(map(str, tensor.shape)) or "a number" for tensor in tensors(inputs))


def _agrees(
    model: nn.Module,
    small: nn.Module,
    applied: Changes,
    batch: Any,
    *,
    example: int = 0,
    answers: Answers = NATURAL,
) -> bool:
    """Whether both compute the same, or too little is known: where rounding alone changes as much, nothing is shown."""
    try:
        verification = verify(model, small, applied, batch, example=example, answers=answers)
    except NotSupported:
        return False
    return verification.exact or _shaken(small, applied, batch) >= verification.error * _NOISE


_NOISE = 1e-2
"""Of a difference: a change of the weights by rounding that gives as much tells of ties, as in a choice of boxes."""


def _shaken(small: nn.Module, applied: Changes, batch: Any) -> float:
    """How much the outputs change with the last digits of the weights."""
    shaken = copied(small)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in shaken.parameters():
            if parameter.is_floating_point():
                noise = torch.randn(parameter.shape, generator=generator).to(parameter.device, parameter.dtype)
                parameter.mul_(1 + noise * 4 * torch.finfo(parameter.dtype).eps)
    batch = renumber(known_only(batch, applied.renumbered), applied.renumbered)
    try:
        with torch.no_grad(), untouched(small), untouched(shaken):
            return relative_error(*(outputs_of(model, batch) for model in (small, shaken)))
    except Exception:  # what does not run does not tell
        return 0.0


def _runs(model: nn.Module, batch: Any) -> bool:
    try:
        with untouched(model), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outputs = outputs_of(model, batch)
    except Exception:  # a probe: whatever it raises, the model does not take this size
        return False
    return all(bool(torch.isfinite(t).all()) for t in outputs if t.is_floating_point())


def _shapes(batch: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(tensor.shape) for tensor in tensors(batch))


# -- which sizes ---------------------------------------------------------------------------------------------------


def _spatial(main: Tensor) -> Iterator[frozenset[int]]:
    """Sets of sizes that may be those of an image or a sequence: of the axes behind the channels, or before them."""
    shape = tuple(main.shape)
    yield from dict.fromkeys(frozenset(axes) for axes in (shape[2:], shape[1:-1], shape[1:2]) if axes)


def _resized(inputs: Any, main: Tensor) -> Iterator[Any]:
    """The inputs with the sizes of an image or a sequence halved, or doubled where they are small or it may not be."""
    for sizes in _spatial(main):
        for factor in (_halved, _doubled) if min(sizes) >= _FEW else (_doubled, _halved):
            new = {size: factor(size) for size in sizes}
            if all(size > 0 for size in new.values()):
                yield positions(inputs, new)


def _halved(size: int) -> int:
    return size // 2


def _doubled(size: int) -> int:
    return 2 * size


def _turned(inputs: Any, main: Tensor, size: int, other: int) -> Iterator[Any]:
    """The inputs with the size that decides a branch as `other`: the batch, or axes of which it is a fraction."""
    room = max(_LARGEST, 4 * main.numel())
    if main.shape[0] == size and main.numel() // size * other <= room:
        yield samples(inputs, size, other)
    single = [frozenset([n]) for n in sorted(set(main.shape[1:]))]
    whole = [*single, frozenset(main.shape[2:]), frozenset(main.shape[1:])]
    for lengths in dict.fromkeys(whole):
        new = {n: n // size * other for n in lengths if n % size == 0}
        if new and math.prod(new.get(n, n) for n in main.shape[1:]) * main.shape[0] <= room:
            yield positions(inputs, new)


def _stretched(inputs: Any, main: Tensor, axes: frozenset[int], new: int) -> Iterator[Any]:
    """The inputs with these axes of the main one of the size `new`; none where that would be too large."""
    size = main.shape[min(axes)]
    if main.numel() * (new / size) ** len(axes) > max(_LARGEST, 4 * main.numel()):
        return
    if axes == {0}:
        yield samples(inputs, size, new)
        return

    def change(tensor: Tensor) -> Tensor:
        for axis in axes:
            if tensor.dim() == main.dim() and tensor.shape[axis] == size:
                tensor = tensor.index_select(axis, torch.arange(new, device=tensor.device) % size)
        return tensor

    yield each(_plain(inputs), change)


# -- batches of other sizes ----------------------------------------------------------------------------------------


def samples(inputs: Any, count: int, new: int) -> Any:
    """The inputs with `new` samples in place of `count`; further samples are the first ones, with positions shifted."""

    def change(tensor: Tensor) -> Tensor:
        if not tensor.dim() or tensor.shape[0] != count:
            return tensor
        copies = [tensor]
        while sum(len(copy) for copy in copies) < new:
            copies.append(_shifted(tensor, len(copies)))
        return torch.cat(copies)[:new].contiguous()

    return each(_plain(inputs), change)


def positions(inputs: Any, sizes: Mapping[int, int]) -> Any:
    """The inputs with axes of these sizes, other than the first, cut or continued with their own positions."""

    def change(tensor: Tensor) -> Tensor:
        behind = tensor.is_floating_point() and any(size in sizes for size in tensor.shape[2:])
        for axis in range(2 if behind else 1, tensor.dim()):  # channels may have the size of an image by chance
            size = tensor.shape[axis]
            if size in sizes:
                tensor = tensor.index_select(axis, torch.arange(sizes[size], device=tensor.device) % size)
        return tensor

    return each(_plain(inputs), change)


def _shifted(tensor: Tensor, steps: int) -> Tensor:
    return tensor.roll(steps, -1) if tensor.dim() > 1 else tensor


def _plain(inputs: Any) -> Any:
    """The inputs without gradients, so that nothing is recorded of what is made of them."""
    return each(inputs, lambda tensor: tensor.detach())
