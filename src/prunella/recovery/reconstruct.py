"""Recovery without labels: least-squares refit of the layers that read a pruned axis to the outputs of dense layers."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prunella.errors import CheckFailed, RequestError
from prunella.model.batches import batches, listed
from prunella.model.device import check_float64
from prunella.model.forms import Chunk
from prunella.model.forward import real_tokens, run
from prunella.model.masks import reapply_
from prunella.model.observed_reads import Read
from prunella.model.state import mode, restored_on_error
from prunella.model.unwrap import unwrap
from prunella.model.watch import Stop, Watch
from prunella.planning.plan import Plan
from prunella.recovery.least_squares import Solution, Sums
from prunella.recovery.readers import Part, Reader, Skipped, Submatrix, readers_of
from prunella.recovery.walk import Passes, Stuck
from prunella.registry.method import recovery
from prunella.stats.elimination import chosen_tokens
from prunella.types import Loss

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LayerFit:
    """One layer: relative output errors `|Y - Y'| / |Y - mean Y|` before and after, on the calibration data.

    damping: the addition to the diagonal, relative to its mean. skipped: why the layer was not refitted, or empty.
    """

    name: str
    tokens: int = 0
    before: float = 0.0
    after: float = 0.0
    damping: float = 0.0
    skipped: str = ""

    def __str__(self) -> str:
        if self.skipped:
            return f"{self.name}: skipped, {self.skipped}"
        return f"{self.name}: {self.before:.4f} -> {self.after:.4f} ({self.tokens} tokens, damping {self.damping:.0e})"


@dataclass(frozen=True)
class Reconstruction:
    """The result of `reconstruct`, layer by layer in the order of execution."""

    fits: tuple[LayerFit, ...]

    def __str__(self) -> str:
        return "\n".join(map(str, self.fits)) or "no layer reads a pruned axis"


Gathered = dict[tuple[int, int], Sums]
"""Number of the part of a weight, number of the matrix in the part -> the sums of its inputs and outputs."""
OnFit = Callable[[LayerFit, int, int], None]
"""Called after each layer with its fit, the number of finished layers, and the number of all layers."""


@recovery(
    source="He et al. 2017, arXiv:1707.06168; Frantar and Alistarh 2023, arXiv:2301.00774 (damping)", status="stable"
)
def reconstruct(
    small: nn.Module,
    dense: nn.Module,
    data: Iterable[Any],
    plan: Plan,
    *,
    loss: Loss | None = None,
    ridge: float | Literal["auto"] = 1e-2,
    on_fit: OnFit | None = None,
) -> Reconstruction:
    """Least-squares fit, in place, of every layer of `small` whose input axis was cut, to the same layer of `dense`.

    `min over D, b of |Y - X (W + D)^T - b|^2 + ridge * mean(diag(X^T X)) * |D|^2`, with X the inputs that the layer has
    in the small model and Y the outputs of the dense layer for the same batch, so that each layer compensates the
    errors of earlier layers. If the output is added to a residual stream, the sum is fitted to the sum in the dense
    model: the layer then also compensates the error of the stream. The penalty keeps the solution near the present
    weights: directions that `data` does not contain do not change. A layer with a bias is fitted on centered inputs and
    its bias is refitted; a layer without one in front of a batch normalization shifts the running mean instead. If a
    batch normalization lies between the layer and the residual sum, the sum behind it is fitted. Sums are gathered
    batch by batch in float64. For a singular matrix the damping grows; the result reports the damping.

    small: the shrunk model, or the dense one with the plan's structure masked (masked weights stay zero).
    data: batches, no labels; best a few times more tokens (or pixels) than a layer has inputs. Up to 128 batches of a
    list take one walk: the forward passes of all batches wait at each layer until it is fitted, and continue with its
    new outputs, at the cost of the memory for their activations. Otherwise each layer takes a pass of its own.
    loss: how to run a model on one batch; by default the model is called on the batch. ridge: from 0 up, 1e-3 to 1e-1
    is usual; with fewer tokens than about twice the inputs of a layer, small values fit noise. "auto": for each layer
    the value from 1e-3 to 10 with the least error on every fourth batch after a fit to the others. All batches then
    determine the weights; a layer that no value improves keeps its weights. With a single batch the value is 1e-3, or
    1e-2 for few tokens. If a batch has very many tokens (pixels), 16 per input of the layer are sampled.
    Positions where the `attention_mask` of a batch is 0 are padding and are ignored.

    Every operation of `prunella.model.reads` is refitted: linear layers, matrix products, einsum, convolutions of all
    kinds (each group by itself), `nn.MultiheadAttention`. The result names skipped weights and the reasons: masks of
    single weights, tied weights read in two ways, recurrent layers. on_fit: see `OnFit`. An error changes nothing.

    Example:

        >>> import torch, prunella as pr
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> data = [torch.randn(64, 8) for _ in range(4)]
        >>> plan = pr.plan(model, data[0], target=pr.Sparsity(0.25))
        >>> small = pr.shrink(model, plan)
        >>> fitted = pr.reconstruct(small, model, data, plan)
        >>> [(fit.name, fit.after <= fit.before) for fit in fitted.fits]
        [('2.weight', True)]

    Use: before any training, or instead of training with no labels and little time. Avoid: fewer tokens than about
    twice a layer's inputs.
    """
    _check_ridge(ridge)
    data = list(data) if isinstance(data, Iterator) else data  # it is read more than once
    small_, dense_ = unwrap(small), unwrap(dense)
    check_float64(dense_, "layers are refitted")
    with restored_on_error(small_), mode(small_, training=False), mode(dense_, training=False), torch.no_grad():
        items = readers_of(small_, dense_, next(batches(data)), plan, loss)
        job = _Job(small_, dense_, data, partial(run, loss=loss), ridge)
        fits = _fitted([item for item in items if isinstance(item, Reader)], job, on_fit)
        reapply_(small_)
    fits |= {item.name: LayerFit(item.name, skipped=item.why) for item in items if isinstance(item, Skipped)}
    return Reconstruction(tuple(fits[item.name] for item in items))


def _fitted(readers: list[Reader], job: _Job, on_fit: OnFit | None) -> dict[str, LayerFit]:
    fits: dict[str, LayerFit] = {}
    for done, fit in enumerate(job.fits(readers), start=1):
        fits[fit.name] = fit
        log.info("%s", fit)
        if on_fit:
            on_fit(fit, done, len(readers))
    return fits


def _check_ridge(ridge: float | Literal["auto"]) -> None:
    if ridge != "auto" and not ridge >= 0:
        raise RequestError(
            f"ridge={ridge:g} is out of range", "ridge takes numbers from 0 up, or auto", "for example ridge=1e-2"
        )


@dataclass(frozen=True)
class _Job:
    """The arguments that all fits share. run: runs a model on a batch."""

    small: nn.Module
    dense: nn.Module
    data: Iterable[Any]
    run: Callable[[nn.Module, Any], object]
    ridge: float | Literal["auto"]

    def fits(self, readers: Sequence[Reader]) -> Iterator[LayerFit]:
        """Refit the readers in order: in one walk if possible, otherwise with one pass for each."""
        left, together = list(readers), _few(self.data)
        while left:
            try:
                for fit in self._walk(left) if together and _single(left[0]) else self._pass(left[0]):
                    left.pop(0)
                    yield fit
            except Stuck:  # the model holds a lock while it runs, or cannot be copied
                log.info("the passes cannot wait for each other: each layer takes a pass of its own")
                together = False

    def _pass(self, reader: Reader) -> Iterator[LayerFit]:
        """One reader by a pass of its own; each forward pass stops as soon as the layer has run."""
        sums = _Gathering(reader, self.ridge == "auto")
        for batch in batches(self.data):
            expected = self._reads(self.dense, batch, reader.dense, len(reader.order))
            actual = self._reads(self.small, batch, reader.small, len(reader.order))
            sums.add(batch, expected, actual)
        yield _refit(reader, sums, self.ridge)

    def _walk(self, readers: Sequence[Reader]) -> Iterator[LayerFit]:
        """The readers before the first that is read several times, until one needs the passes to start again."""
        ahead = list(itertools.takewhile(_single, readers))
        weights = [reader.dense for reader in ahead], [reader.small for reader in ahead]
        data = listed(self.data)
        with Passes(data, self.run, (self.dense, self.small), weights) as passes:
            for reader in ahead:
                sums, refresh = _Gathering(reader, self.ridge == "auto"), list[Callable[[], bool]]()
                for batch, (dense, small) in zip(data, passes.pairs, strict=True):
                    expected, actual = dense.next(), small.next()
                    if not (_is(expected, reader.dense) and _is(actual, reader.small)):
                        # The order of the layers differs between batches or models.
                        if reader is ahead[0]:
                            yield from self._pass(reader)
                        return
                    sums.add(batch, _listed(expected), _listed(actual))
                    assert actual is not None and actual.refresh is not None
                    refresh.append(actual.refresh)
                yield _refit(reader, sums, self.ridge)
                if not all(again() for again in refresh):
                    return

    def _reads(self, model: nn.Module, batch: Any, weight: nn.Parameter, calls: int) -> list[Read]:
        reads: list[Read] = []

        def keep(read: Read) -> None:
            reads.append(read)
            if len(reads) == calls:
                raise Stop

        watch = Watch([weight], keep)
        with suppress(Stop):
            with watch:
                self.run(model, batch)
            watch.finish()
        return reads


LIVE = 128
"""Most batches in one walk: each batch has two passes, which keep their activations."""


def _few(data: Iterable[Any]) -> bool:
    try:
        return isinstance(data, Sized) and len(data) <= LIVE
    except TypeError:  # a loader of a stream has a `__len__` that raises
        return False


def _single(reader: Reader) -> bool:
    return len(reader.order) == 1


def _is(read: Read | None, weight: nn.Parameter) -> bool:
    return read is not None and read.weight is weight


def _listed(read: Read | None) -> list[Read]:
    return [] if read is None else [read]


RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""The ridges that "auto" tries."""


class _Gathering:
    """The sums of one reader: of all batches, or with every fourth apart, to choose the ridge by."""

    def __init__(self, reader: Reader, apart: bool) -> None:
        self._reader, self._apart, self._batches = reader, apart, 0
        self.fit: Gathered = {
            (number, submatrix): Sums(centered=part.shifts, quick=apart)
            for number, part in enumerate(reader.parts)
            for submatrix in range(len(part.submatrices))
        }
        self.held_out: Gathered = {}

    def add(self, batch: Any, expected: Sequence[Read], actual: Sequence[Read]) -> None:
        """Add the calls of one forward pass."""
        if len(expected) > len(actual):
            raise CheckFailed("the small model did not run every layer that the dense one ran", "", "")
        sums = self.fit
        if self._apart and self._batches % 4 == 1:
            self.held_out = self.held_out or {key: fit.empty() for key, fit in self.fit.items()}
            sums = self.held_out
        self._batches += 1
        real = real_tokens(batch)
        for number, part in enumerate(self._reader.order[: len(actual)]):
            for index, submatrix in enumerate(self._reader.parts[part].submatrices):
                matrix = self._reader.name, self._reader.parts[part], submatrix
                _add(sums[part, index], matrix, actual[number], expected[number : number + 1], real, self._apart)

    @property
    def total(self) -> Gathered:
        """The sums of all batches, for matrices that ran on at least one batch."""
        sums = {key: _sum(fit, self.held_out.get(key)) for key, fit in self.fit.items()}
        return {key: entry for key, entry in sums.items() if entry.tokens}

    def solution(self, key: tuple[int, int], ridge: float | Literal["auto"]) -> Solution:
        """The new weights of one matrix."""
        fit, held_out = self.fit[key], self.held_out.get(key)
        if ridge != "auto":
            return fit.solve(ridge)
        if held_out is not None and held_out.tokens and fit.tokens:
            return fit.chosen(held_out, RIDGES)
        total = _sum(fit, held_out)
        return total.solve(1e-2 if total.tokens < 2 * len(total.gram) else 1e-3)


def _sum(fit: Sums, held_out: Sums | None) -> Sums:
    if held_out is None or not held_out.tokens:
        return fit
    return fit + held_out if fit.tokens else held_out


def _add(
    sums: Sums,
    matrix: tuple[str, Part, Submatrix],
    read: Read,
    expected: Sequence[Read],
    real: Tensor | None,
    few: bool,
) -> None:
    """Add one call of one matrix: its inputs in the small model, its outputs in both.

    real: tokens without padding. few: as many tokens of a call as estimate the matrix well, not all.
    """
    name, part, submatrix = matrix
    if not expected or expected[0].tokens != read.tokens:
        raise CheckFailed(
            f"{name} has different output shapes in the small model and in the dense one",
            f"{read.tokens} tokens against {expected[0].tokens if expected else 'nothing'}",
            "reconstruction compares the same tokens on both sides",
        )
    places = chosen_tokens(read, real) if few else _real_tokens(read, real)
    if places is not None:
        chunks: Iterable[Chunk] = [(read.columns_at(places, submatrix.small, submatrix.columns), slice(None))]
    else:
        chunks = read.columns(submatrix.small, submatrix.columns)
    outputs = read.rows(submatrix.small, submatrix.rows, tokens=places)
    precision = torch.promote_types(outputs.dtype, torch.float32) if few else torch.float64
    target = _target(part, submatrix, read, expected[0], places, precision)
    gap = target - outputs.to(precision)
    for x, tokens in chunks:
        if len(x):
            sums.add(x, target[tokens], gap[tokens])


def _real_tokens(read: Read, real: Tensor | None) -> Tensor | None:
    return real.nonzero()[:, 0] if real is not None and len(real) == read.tokens else None


def _target(
    part: Part, submatrix: Submatrix, small: Read, dense: Read, tokens: Tensor | None, precision: torch.dtype
) -> Tensor:
    """The outputs that reproduce the dense model after the norm and the residual sum: `(tokens, out)`.

    `(a y + c + r - c' - r') / a'` with scale a and shift c of the norm, residual r, and the primes in the small model.
    The next layers read the sum: the layer compensates the error in the residual too. A channel with scale 0 keeps y.
    """
    y = dense.rows(submatrix.dense, submatrix.expected, tokens=tokens).to(precision)
    if (small.norm is None) != (part.small.norm is None) or (small.norm is None) != (dense.norm is None):
        return y  # the output has other readers than the norm
    added = torch.zeros_like(y)
    if small.residual is not None and dense.residual is not None:
        added += dense.rows(submatrix.dense, submatrix.expected, tokens=tokens, residual=True)
        added -= small.rows(submatrix.small, submatrix.rows, tokens=tokens, residual=True)
    if part.small.norm is None or part.dense.norm is None:
        return y + added
    (scale, shift), (scale_, shift_) = (
        [value.to(precision) for value in part.dense.affine(submatrix.dense, submatrix.expected)],
        [value.to(precision) for value in part.small.affine(submatrix.small, submatrix.rows)],
    )
    same = torch.equal(scale, scale_) and torch.equal(shift, shift_)
    target = y + added / scale_ if same else (y * scale + shift + added - shift_) / scale_
    return torch.where(scale_.abs() > torch.finfo(torch.float32).eps, target, y)


def _refit(reader: Reader, gathering: _Gathering, ridge: float | Literal["auto"]) -> LayerFit:
    """Solve for every matrix, and write the solutions that reduce the error."""
    gathered = gathering.total
    if not all(sums.finite for sums in gathered.values()):
        raise CheckFailed(
            f"the inputs or outputs of {reader.name} are not finite on the calibration data",
            "a model or the data holds NaN or infinity",
            "check weights and data before reconstructing",
        )
    scale = math.sqrt(sum(sums.variation for sums in gathered.values())) or 1.0
    before, after, damping = 0.0, 0.0, 0.0
    for number, index in gathered:
        solution = gathering.solution((number, index), ridge)
        part, better = reader.parts[number], math.sqrt(solution.after) / scale < math.sqrt(solution.before) / scale
        before, after = before + solution.before, after + (solution.after if better else solution.before)
        damping = max(damping, solution.damping)
        if better:
            _write(part.small, part.submatrices[index], solution)
    tokens = max((sums.tokens for sums in gathered.values()), default=0)
    return LayerFit(reader.name, tokens, math.sqrt(before) / scale, math.sqrt(after) / scale, damping)


def _write(read: Read, submatrix: Submatrix, solution: Solution) -> None:
    """Add the change to the kept block of the matrix, and the shift to its bias."""
    matrices = read.matrices().clone()
    matrix = matrices[submatrix.small]
    rows = _indices(submatrix.rows, len(matrix), matrix.device)
    columns = _indices(submatrix.columns, matrix.shape[1], matrix.device)
    block = rows[:, None], columns[None, :]
    matrix[block] = (matrix[block].double() + solution.change.T).to(matrix.dtype)
    read.write_(matrices)
    if read.bias is not None:
        bias = read.bias[submatrix.small]
        bias[rows] = (bias[rows].double() + solution.shift).to(bias.dtype)
    elif read.norm is not None:  # the norm subtracts its mean
        mean = read.norm.mean.view(len(matrices), -1)[submatrix.small]
        mean[rows] = (mean[rows].double() - solution.shift).to(mean.dtype)


def _indices(positions: Tensor | None, size: int, device: torch.device) -> Tensor:
    return torch.arange(size, device=device) if positions is None else positions.to(device)
