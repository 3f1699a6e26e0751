"""The oracle on inputs of other sizes: a cut that is exact for one batch or image size only is not proven.

A reshape that mixes channels with positions, or a branch on the batch size, may couple other channels on another input.
From an example, batches of other sizes are made from its own values: another number of samples, and other positions on
the axes that may be an image or a sequence. Sizes that the dense model does not accept are ignored.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from prunella.errors import CheckFailed, NotSupported
from prunella.graph.cut.changes import Changes
from prunella.graph.data import PLAIN, Graph, Hints, Setting
from prunella.graph.guesses import Seen, attempt, other_values, sizes_to_try
from prunella.graph.resized import (
    layout,
    of_other_layout,
    of_other_rank,
    resized,
    samples,
    shape_text,
    stretched,
    turned,
)
from prunella.graph.solve.tokens import known_only, renumber
from prunella.graph.verify import Oracle, Verification, check, oracle_of, relative_error
from prunella.model.calls import called
from prunella.model.copying import copied
from prunella.model.forward import outputs_of
from prunella.model.state import Steady, untouched
from prunella.model.trees import tensors
from prunella.types import Keep

_SAMPLES = 4
"""Batches with fewer samples are tried with one more sample, larger ones with one less than this number."""
_MOST = 4
"""Largest number of sizes at which the source takes another branch, the nearest first."""


_NONE = Hints()


def wrong_branch(model: nn.Module, graph: Graph, keep: Keep, inputs: Any) -> str:
    """The run on which a cut differs from the masked model: on the other side of a branch, or a further call.

    Calls with other arguments are left to `check_arguments`.
    """
    ran = [branch for branch in graph.branches if not branch.fault and not branch.other_arguments]
    oracle = oracle_of(model, graph, keep) if ran else None
    if oracle is None:
        return ""
    for branch in ran:
        batch = inputs if branch.batch is None else branch.batch
        if not _agrees(oracle, batch, example=branch.example, setting=branch.setting):
            return branch.text
    return ""


def disagreement(oracle: Oracle, hints: Hints, inputs: Any, others: Sequence[Any] = ()) -> Any:
    """The first input of another size on which the cut model differs from the masked one; None if there is none."""
    for batch in other_sizes(oracle.dense, inputs, others, hints):
        if not _agrees(oracle, batch):
            return batch
    return None


def check_sizes(dense: nn.Module, small: nn.Module, applied: Changes, inputs: Any, others: Sequence[Any] = ()) -> None:
    """`check` on inputs of other sizes than those of the examples. Errors: `CheckFailed`, `NotSupported`."""
    oracle = Oracle(dense, small, applied)
    for batch in other_sizes(dense, inputs, others):
        if _agrees(oracle, batch):
            continue
        try:
            check(dense, small, applied, batch)
        except CheckFailed as error:
            todo = f"plan with both sizes: {_BOTH}; or leave out what is cut there: skip="
            raise CheckFailed(f"{error.what} on an input of {shape_text(batch)}", error.why, todo) from error


_BOTH = "prunella.Examples(one, other)"


def other_sizes(model: nn.Module, inputs: Any, others: Sequence[Any] = (), hints: Hints = _NONE) -> Iterator[Any]:
    """Batches of other sizes, apart from those of `others`, on which the dense model gives finite outputs."""
    given = [tensor for tensor in tensors(inputs) if tensor.dim()]
    if not given or any(parameter.is_meta for parameter in model.parameters()) or _may_crash(model):
        return
    main = max(given, key=lambda tensor: tensor.numel())
    probes = _Probes(model, inputs, others, hints, main)
    # An index out of range is an error on a CPU; an accelerator does not survive it.
    if main.device.type != "cpu" and not all(tensor.is_floating_point() for tensor in given):
        yield from probes.first([samples(inputs, main.shape[0], main.shape[0] + 1)])
        return
    yield from probes.usual()
    yield from probes.guessed()
    yield from probes.of_other_form()


WORK = 2e11
"""Most multiply-adds of all guesses of sizes in a plan: some seconds of a processor. Each takes one pass."""


def _largest(batch: Any) -> int:
    return max((tensor.numel() for tensor in tensors(batch)), default=0)


def _may_crash(model: nn.Module) -> bool:
    """Whether a program calls a recurrent kernel directly: a state of another size then crashes the process."""
    graphs = [module.graph for module in model.modules() if isinstance(module, fx.GraphModule)]
    names = {called(node.target) for graph in graphs for node in graph.nodes if node.op == "call_function"}
    return bool(names & _UNCHECKED)


_UNCHECKED = frozenset("lstm gru rnn_tanh rnn_relu mkldnn_rnn_layer _thnn_fused_lstm_cell _thnn_fused_gru_cell".split())
"""Operations whose checks of sizes are in the module around them."""


class _Probes:
    """Runs of the dense model on batches made from the example. known: shapes of the examples, and of what was given.

    All runs are of one model, which each of them leaves as it was.
    """

    def __init__(self, model: nn.Module, inputs: Any, others: Sequence[Any], hints: Hints, main: Tensor) -> None:
        self.model, self.inputs, self.examples = model, inputs, (inputs, *others)
        self.hints, self.main, self.guard = hints, main, Steady(model)
        self.known = {_shapes(example) for example in self.examples}

    @cached_property
    def seen(self) -> Seen:
        """What the source does on the examples."""
        return Seen(self.model, self.examples, self.guard)

    def runs(self, batch: Any) -> bool:
        """Whether the model accepts a batch, with finite outputs."""
        return attempt(self.guard, batch).accepted

    def first(self, batches: Iterable[Any]) -> list[Any]:
        """The first of these batches that is new and that the dense model accepts."""
        for batch in batches:
            if _shapes(batch) not in self.known and self.runs(batch):
                self.known.add(_shapes(batch))
                return [batch]
        return []

    def usual(self) -> Iterator[Any]:
        """Another number of samples and another image or sequence, and what turns a comparison of the source."""
        inputs, main, first = self.inputs, self.main, self.first
        count = main.shape[0]
        more = count + 1 if count < _SAMPLES else _SAMPLES - 1
        both = first(samples(batch, count, more) for batch in resized(inputs, main))
        yield from both or first([samples(inputs, count, more)])
        yield from [] if both else first(resized(inputs, main))
        yield from first([samples(inputs, count, 1)])
        for size, other in self.hints.turns[:_MOST]:
            for batch in turned(inputs, main, size, other):  # all of them: which axis decides is unknown
                yield from first([batch])
        for axis, size, other in self.hints.alone[:_MOST]:
            if axis < main.dim() and main.shape[axis] == size:
                yield from first(stretched(inputs, main, frozenset([axis]), other))

    def guessed(self) -> Iterator[Any]:
        """Batches on which the source runs something new, although no comparison shows it."""
        sizes = sizes_to_try(self.main, self.hints)
        if not sizes and not self.hints.values:
            return
        seen, told = self.seen.forked(), {True: 0, False: 0}
        left = WORK
        for axes, other, anyway in sizes:
            for batch in stretched(self.inputs, self.main, axes, other):
                cost = self.hints.macs * max(1.0, _largest(batch) / max(self.main.numel(), 1))
                if cost > left:
                    continue
                left -= cost
                fresh = seen.new(batch)
                if seen.accepted and (fresh or anyway) and told[fresh] < _MOST:
                    told[fresh] += 1
                    if _shapes(batch) not in self.known:
                        self.known.add(_shapes(batch))
                        yield batch
        for batch in other_values(self.inputs) if self.hints.values else ():
            if seen.new(batch):
                yield batch

    def of_other_form(self) -> Iterator[Any]:
        """Batches with another number of axes or memory layout, if the source reads them or runs something new."""
        known = [(_shapes(example), layout(example)) for example in self.examples]
        seen = self.seen.forked()
        for batch in of_other_rank(self.inputs, self.main):
            if _shapes(batch) not in [shapes for shapes, _ in known]:
                fresh = seen.new(batch)
                if fresh or (seen.accepted and self.hints.ranks):
                    yield batch
        for batch in of_other_layout(self.inputs) if self.hints.layouts else ():
            if (_shapes(batch), layout(batch)) not in known and self.runs(batch):
                yield batch


def _agrees(oracle: Oracle, batch: Any, *, example: int = 0, setting: Setting = PLAIN) -> bool:
    """Whether both compute the same, or the comparison is inconclusive: rounding alone changes the outputs as much."""
    return verified(oracle, batch, example=example, setting=setting) is not None


def verified(
    oracle: Oracle, batch: Any, *, example: int = 0, setting: Setting = PLAIN, further: bool = False
) -> Verification | None:
    """The comparison; None if both compute different results. further: see `verify`."""
    try:
        verification = oracle.verify(batch, example=example, setting=setting, further=further)
    except NotSupported:
        return None
    right = verification.exact or _shaken(oracle.small, oracle.done, batch) >= verification.error * _NOISE
    return verification if right else None


_NOISE = 1e-2
"""Share of a difference: if rounding of the weights causes this much, ties explain it, as in a choice of boxes."""


def _shaken(small: nn.Module, applied: Changes, batch: Any) -> float:
    """How much the outputs change with the last digits of the weights."""
    shaken = copied(small)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in shaken.parameters():
            if parameter.is_floating_point():
                noise = torch.randn(parameter.shape, generator=generator, device="cpu").to(
                    parameter.device, parameter.dtype
                )
                parameter.mul_(1 + noise * 4 * torch.finfo(parameter.dtype).eps)
    batch = renumber(known_only(batch, applied.renumbered), applied.renumbered)
    try:
        with torch.no_grad(), untouched(small), untouched(shaken):
            return relative_error(*(outputs_of(model, batch) for model in (small, shaken)))
    except Exception:  # a model that does not run gives no evidence
        return 0.0


def _shapes(batch: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(tensor.shape) for tensor in tensors(batch))
