"""The oracle of every cut: in float64, the smaller module has the outputs of the masked model.

In the masked model removed positions are zero, and a dropped block returns its first input tensor as its first output.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunella.errors import CheckFailed, NotSupported
from prunella.graph.cut.block_surgery import bypassed
from prunella.graph.cut.changes import Changes, changes
from prunella.graph.cut.surgery import change_
from prunella.graph.data import PLAIN, Graph, Setting
from prunella.graph.double import as_double, precise, wide
from prunella.graph.further_outputs import Same, as_cut, contains
from prunella.graph.observed import Observed, SteadyCopy, observed_run
from prunella.graph.solve.tokens import known_only, renumber
from prunella.graph.training_pass import training_fault
from prunella.model.copying import copied
from prunella.model.weight_norm import scaled_by_norm
from prunella.types import Keep

TOLERANCE = 1e-9
"""Largest allowed difference, relative to the largest output, in float64."""
SINGLE = 1e-4
"""`TOLERANCE` for models that run only in their own precision."""


@dataclass(frozen=True)
class Verification:
    """Error of the smaller module against the masked model: largest difference / largest output, over all outputs."""

    error: float
    tolerance: float
    outputs: int
    dtype: str = "float64"
    as_cut: bool = False
    """Whether outputs lack removed positions or dropped blocks, where they may: see `verify`."""

    @property
    def exact(self) -> bool:
        """Whether the error is within the tolerance."""
        return self.error <= self.tolerance

    def __str__(self) -> str:
        word = "equals" if self.exact else "differs from"
        return f"shrunk {word} masked: relative error {self.error:.1e} ({self.dtype}, tolerance {self.tolerance:.0e})"


def check(dense: nn.Module, small: nn.Module, applied: Changes, inputs: Any, *, example: int = 0) -> Verification:
    """`verify`, with `CheckFailed` if the outputs differ. On the meta device only shapes are checked."""
    verification = verify(dense, small, applied, inputs, example=example)
    if not verification.exact:
        raise CheckFailed(
            "the smaller model does not compute what the masked model computes",
            f"relative error {verification.error:.2e} where {verification.tolerance:.0e} is allowed",
            "please report the model; skip= excludes the layers that you name",
        )
    return verification


def verify(
    dense: nn.Module,
    small: nn.Module,
    done: Changes,
    inputs: Any,
    *,
    example: int = 0,
    setting: Setting = PLAIN,
    further: bool = False,
) -> Verification:
    """Compare `small` with `dense` with zeros in the removed units, in float64 and eval mode, on one batch.

    example: the number of the example with the sizes of this batch. setting: the other conditions of both runs.
    further: the batch may give more outputs than the example: they may lack removed positions and dropped blocks.
    Errors: NotSupported if the small model does not run, the dense one does not repeat itself, or nothing is compared.
    """
    return Oracle(dense, small, done).verify(inputs, example=example, setting=setting, further=further)


class Addition(enum.Enum):
    """Which of both models returns the outputs of the example, and more: both, the masked one alone, or not so."""

    BOTH, MASKED, OTHER = range(3)


class Oracle:
    """`verify` for several batches: both models are copied, masked and cast once, if they are small."""

    def __init__(self, dense: nn.Module, small: nn.Module, done: Changes) -> None:
        self.dense, self.small, self.done = dense, small, done
        self._keeps = sum(p.numel() * p.element_size() for p in dense.parameters()) <= _KEPT
        self._copies: dict[tuple[str, bool], SteadyCopy] = {}

    def verify(self, inputs: Any, *, example: int = 0, setting: Setting = PLAIN, further: bool = False) -> Verification:
        """See `verify`."""
        if any(p.device.type == "meta" for p in self.dense.parameters()):
            return self._same_shapes(inputs)
        done = self.done.on(example)
        try:
            return _compare(self, done, inputs, double=True, setting=setting, further=further)
        except _DenseFailed:
            return _compare(self, done, inputs, double=False, setting=setting, further=further)

    def adds(self, inputs: Any, example: Any) -> Addition:
        """What both models return on `inputs` beside what they return on the example."""
        additions = (self._adds(inputs, example, double=double) for double in (True, False))
        return next((addition for addition in additions if addition is not Addition.OTHER), Addition.OTHER)

    def _adds(self, inputs: Any, example: Any, *, double: bool) -> Addition:
        batches = [as_double(batch) if double else batch for batch in (example, inputs)]
        known = [known_only(batch, self.done.renumbered) for batch in batches]
        few, more = (_Pair(self, self.done.on(0), batch, double, PLAIN) for batch in known)
        same = partial(_same, tolerance=TOLERANCE if double else SINGLE)

        def added(narrow: list[Tensor], wide: list[Tensor]) -> bool:
            return len(wide) > len(narrow) and contains(wide, narrow, same)

        try:
            if not added(few.of_masked("masked").outputs, more.of_masked("masked").outputs):
                return Addition.OTHER
        except NotSupported:
            return Addition.OTHER
        try:
            return Addition.BOTH if added(few.result().outputs, more.result().outputs) else Addition.OTHER
        except NotSupported:
            return Addition.MASKED

    def _same_shapes(self, inputs: Any) -> Verification:
        models = [SteadyCopy(model) for model in (self.dense, self.small)]
        shapes = [[tuple(t.shape) for t in observed_run(model, inputs).outputs] for model in models]
        if not shapes[0]:
            raise _nothing_compared("the model returns no tensor")
        return Verification(0.0 if shapes[0] == shapes[1] else float("inf"), TOLERANCE, len(shapes[0]))

    def copy(self, kind: str, *, double: bool) -> SteadyCopy:
        """A copy to run: of the `small` model, of the `masked` one, or of one with zeros in its `readers` alone."""
        known = self._copies.get((kind, double))
        if known is not None:
            return known
        model = copied(self.small) if kind == "small" else masked(self.dense, self.done, consumers=kind == "readers")
        steady = SteadyCopy(precise(model, double), parameters=False, values=self._keeps)
        if self._keeps:
            self._copies[kind, double] = steady
        return steady


def oracle_of(model: nn.Module, graph: Graph, keep: Keep) -> Oracle | None:
    """The oracle of a cut; None if nothing is cut."""
    applied = changes(graph, keep)
    if not applied:
        return None
    small = copied(model)
    change_(small, applied)
    return Oracle(model, small, applied)


_KEPT = 1 << 19
"""Bytes of parameters. Of a larger model there is one copy at a time."""


def unproven(model: nn.Module, graph: Graph, keep: Keep, inputs: Any, others: Sequence[Any] = ()) -> dict[str, str]:
    """Group name -> why its cut cannot be proven. Empty when the model cut by `keep` passes the oracle.

    others: further examples, which it has to pass too.
    """
    return at_fault(model, graph, keep, partial(_fault, examples=(inputs, *others)))


def at_fault(model: nn.Module, graph: Graph, keep: Keep, objection: Callable[[Oracle], str | None]) -> dict[str, str]:
    """Group name -> the objection to a cut of it. objection: None if the cut of an oracle is right.

    Bisection finds the groups at fault: a set that fails is tried in two halves, down to single groups. If only the
    full set fails, all of its groups are named.
    """
    names = [name for name, mask in keep.items() if not bool(mask.all())]
    oracle = oracle_of(model, graph, {name: keep[name] for name in names})
    reason = None if oracle is None else objection(oracle)
    if reason is None:
        return {}
    half = len(names) // 2
    faults: dict[str, str] = {}
    for part in (names[:half], names[half:]) if half else ():
        faults |= at_fault(model, graph, {name: keep[name] for name in part}, objection)
    return faults or dict.fromkeys(names, reason)


def _fault(oracle: Oracle, examples: Sequence[Any]) -> str | None:
    """The objection of the oracle to its cut; None if the cut passes on all examples."""
    for number, inputs in enumerate(examples):
        try:
            verification = oracle.verify(inputs, example=number)
        except NotSupported as error:
            return f"{error.what}: {error.why}"
        if not verification.exact:
            return f"the cut cannot be proven: relative error {verification.error:.1e} to the masked model"
    return training_fault(oracle.dense, oracle.small, oracle.done, examples[0]) or None


class _DenseFailed(Exception):
    """The masked model itself does not run or gives nan: the precision is the cause, not the cut."""


@dataclass(frozen=True)
class _Pair:
    """The masked and the smaller model on one batch, to be run under the same conditions."""

    oracle: Oracle
    done: Changes
    batch: Any
    double: bool
    setting: Setting

    def reference(self, *, still: bool = False, inner: bool = False) -> Observed:
        """The results of the masked model at the kept positions."""
        try:
            seen = self._masked("masked", still=still, inner=inner)
            if not all(torch.isfinite(t).all() for t in seen.outputs):
                seen = self._masked("readers", still=still, inner=inner)
            if self.double and any(torch.isnan(t).any() for t in seen.outputs):
                raise _DenseFailed
        except NotSupported as error:
            if not self.double:
                raise
            raise _DenseFailed from error
        return seen

    def result(self, *, still: bool = False, inner: bool = False) -> Observed:
        """The results of the smaller model."""
        model = self.oracle.copy("small", double=self.double)
        batch = renumber(self.batch, self.done.renumbered)
        before = tuple(renumber(earlier, self.done.renumbered) for earlier in self.setting.before)
        return observed_run(model, batch, still=still, inner=inner, setting=replace(self.setting, before=before))

    def of_masked(self, kind: str, *, still: bool = False, inner: bool = False) -> Observed:
        """The results of the masked model at all positions, with dropped blocks bypassed."""
        model = self.oracle.copy(kind, double=self.double)
        with bypassed(model.model, self.done.dropped):
            return observed_run(model, self.batch, self.done.along, still=still, inner=inner, setting=self.setting)

    def _masked(self, kind: str, *, still: bool, inner: bool) -> Observed:
        """The same at the kept positions."""
        seen = self.of_masked(kind, still=still, inner=inner)
        for entry in self.done.renumbered:
            for number, axis in entry.outputs:
                outputs = seen.outputs
                missing = number >= len(outputs) or outputs[number].dim() < -axis
                if missing or outputs[number].shape[axis] <= int(entry.kept.max()):
                    what = "the outputs on this input have no entry for each token"
                    raise NotSupported(what, "they have other axes than those on the example")
                outputs[number] = outputs[number].index_select(axis, entry.kept.to(outputs[number].device))
        return seen


def _compare(
    oracle: Oracle, done: Changes, inputs: Any, *, double: bool, setting: Setting, further: bool
) -> Verification:
    batch, *before = (
        known_only(as_double(given) if double else given, done.renumbered) for given in (inputs, *setting.before)
    )
    setting = replace(setting, before=tuple(before))
    pair, tolerance = _Pair(oracle, done, batch, double, setting), TOLERANCE if double else SINGLE
    difference = partial(_difference, done=done, same=partial(_same, tolerance=tolerance) if further else None)
    reference, result, still = pair.reference(), pair.result(), False
    worst = difference(reference, result)
    if reference.drew or worst > tolerance:  # a seed gives other numbers for other sizes; noise may hide a fault
        reference, result, still = pair.reference(still=True), pair.result(still=True), True
        worst = difference(reference, result)
    if worst > tolerance:
        _check_repeats(reference, pair.reference(still=True), tolerance)
    if not _has_numbers(reference.outputs):
        inner = _common(*(run(still=still, inner=True).inner for run in (pair.reference, pair.result)))
        if not _has_numbers(inner[0]):
            raise _nothing_compared(
                "its outputs on the example contain no numbers, and neither do those of its inner layers"
            )
        worst = max(worst, relative_error(*inner))
    lost = further and _lacks(reference, result)
    return Verification(worst, tolerance, len(result.outputs), "float64" if double else "own precision", lost)


def _difference(reference: Observed, result: Observed, *, done: Changes, same: Same | None) -> float:
    """The relative error of the outputs and of the tensors that both runs leave on their models.

    same: whether two tensors are the same, where outputs may lack removed positions and dropped blocks.
    """
    kept = ([], []) if done.dropped else _common(reference.kept, result.kept)
    outputs = as_cut(reference.outputs, result.outputs, done, same) if same else reference.outputs
    return max(relative_error(outputs, result.outputs), relative_error(*kept))


def _lacks(reference: Observed, result: Observed) -> bool:
    """Whether the result lacks outputs, or positions of outputs or of tensors that the runs leave on their models."""
    pairs = [*zip(reference.outputs, result.outputs, strict=False)]
    pairs += [(tensor, result.kept[name]) for name, tensor in reference.kept.items() if name in result.kept]
    return len(reference.outputs) > len(result.outputs) or any(a.shape != b.shape for a, b in pairs)


def _same(reference: Tensor, output: Tensor, *, tolerance: float = TOLERANCE) -> bool:
    return relative_error([reference], [output]) <= tolerance


def _common(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The tensors of the same name and shape: those without removed positions."""
    names = [name for name, tensor in first.items() if name in second and second[name].shape == tensor.shape]
    return [first[name] for name in names], [second[name] for name in names]


def _has_numbers(outputs: Sequence[Tensor]) -> bool:
    return any(t.numel() and (t.is_floating_point() or t.is_complex()) for t in outputs)


def _nothing_compared(why: str) -> NotSupported:
    todo = "give an example for which the model returns numbers, such as an image with a detection"
    return NotSupported("the cut cannot be verified", why, todo)


def _check_repeats(first: Observed, second: Observed, tolerance: float) -> None:
    """Errors: NotSupported if two runs of the same model on the same batch differ."""
    noise = relative_error(first.outputs, second.outputs)
    if noise > tolerance:
        raise NotSupported(
            "the cut cannot be verified",
            f"two runs of the same model on the same inputs differ by {noise:.1e}",
            "draw random numbers with torch, numpy or random, which are seeded, or switch the noise off in eval mode",
        )


def masked(model: nn.Module, done: Changes, *, consumers: bool = False) -> nn.Module:
    """A copy with zeros at the removed positions of every parameter; with `consumers`, along every axis but the first.

    `consumers` zeroes only the readers of a unit. Parameters that are normalized in the forward pass need it, since a
    slice of zeros would divide zero by zero. Under torch's weight norm a unit is zeroed by its scale.
    """
    masked_model = copied(model)
    parameters = dict(masked_model.named_parameters(remove_duplicate=False))
    scaled = {(name, entry.axis) for name, entry in scaled_by_norm(masked_model).items()}
    with torch.no_grad():
        for name, axes in done.cuts.items():
            for axis, kept in axes.items():
                if name in parameters and not (consumers and axis == 0) and (name, axis) not in scaled:
                    removed = torch.ones(parameters[name].shape[axis], dtype=torch.bool, device="cpu")
                    removed[kept] = False
                    parameters[name].index_fill_(axis, removed.nonzero().flatten().to(parameters[name].device), 0)
    return masked_model


def relative_error(reference: list[Tensor], outputs: list[Tensor]) -> float:
    """Largest |difference| over the largest |reference|, over all tensors; infinite if they do not match in shape."""
    if [t.shape for t in reference] != [t.shape for t in outputs]:
        return float("inf")
    worst = 0.0
    for a, b in zip(reference, outputs, strict=True):
        if a.numel():  # an empty tensor shows nothing: `verify` counts the others
            a, b = wide(a), wide(b)
            gap = torch.where(a == b, 0.0, (a - b).abs()).max().item()
            scale = a[torch.isfinite(a)].abs().max().item() if torch.isfinite(a).any() else 1.0
            worst = max(worst, gap / max(scale, 1e-30) if gap == gap else float("inf"))
    return worst
