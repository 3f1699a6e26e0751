"""Recovery without labels: least-squares refit of the layers that read a pruned axis to the outputs of dense layers."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunella.errors import CheckFailed, RequestError
from prunella.model.forward import batches, run
from prunella.model.masks import reapply_
from prunella.model.state import mode
from prunella.model.unwrap import unwrap
from prunella.model.watch import Read, Stop, Watch
from prunella.planning.plan import Plan
from prunella.recovery.least_squares import Solution, Sums
from prunella.recovery.readers import Piece, Reader, Skipped, readers_of
from prunella.registry.method import recovery
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
    ridge: float = 1e-2,
    on_fit: OnFit | None = None,
) -> Reconstruction:
    """Least-squares fit, in place, of every layer of `small` whose input axis was cut, to the same layer of `dense`.

    `min over D, b of |Y - X (W + D)^T - b|^2 + ridge * mean(diag(X^T X)) * |D|^2`, with X the inputs that the layer has
    in the small model and Y the outputs of the dense layer for the same batch, so that each layer compensates the
    errors of earlier layers. If the output is added to a residual stream, the sum is fitted to the sum in the dense
    model: the layer then also compensates the error of the stream. The penalty keeps the solution near the present
    weights: directions that `data` does not contain do not change. A layer with a bias is fitted on centred inputs, and
    its bias is refitted. Sums are gathered batch by batch in float64, and no activations are stored. For a singular
    matrix the damping grows; the result reports the damping.

    small: the shrunk model, or the dense one with the plan's structure masked (masked weights stay zero).
    data: batches, no labels; best a few times more tokens (or pixels) than a layer has inputs. One pass per layer: a
    single pass for all layers would not see the changes of earlier fits, and harms deep networks.
    loss: how to run a model on one batch; by default the model is called on the batch. ridge: from 0 up, 1e-3 to 1e-1
    is usual; with fewer tokens than about twice the inputs of a layer, small values fit noise.

    Every operation of `prunella.model.reads` is refitted: linear layers, matrix products, einsum, convolutions of all
    kinds (each group by itself), `nn.MultiheadAttention`. The result names skipped weights and the reasons: masks of
    single weights, tied weights that are read in two ways, recurrent layers.

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
    if not ridge >= 0:
        raise RequestError(
            f"ridge={ridge:g} is out of range", "ridge takes numbers from 0 up", "for example ridge=1e-2"
        )
    small_, dense_ = unwrap(small), unwrap(dense)
    with mode(small_, training=False), mode(dense_, training=False), torch.no_grad():
        items = readers_of(small_, dense_, next(batches(data)), plan, loss)
        readers = [item for item in items if isinstance(item, Reader)]
        fits = {item.name: LayerFit(item.name, skipped=item.why) for item in items if isinstance(item, Skipped)}
        for done, reader in enumerate(readers, start=1):
            fits[reader.name] = _refit(reader, _gather(reader, small_, dense_, data, loss), ridge)
            log.info("%s", fits[reader.name])
            if on_fit:
                on_fit(fits[reader.name], done, len(readers))
        reapply_(small_)
    return Reconstruction(tuple(fits[item.name] for item in items))


def _gather(reader: Reader, small: nn.Module, dense: nn.Module, data: Iterable[Any], loss: Loss | None) -> Gathered:
    """One pass over the data through both models; each forward pass stops as soon as the layer has run."""
    sums = {
        (number, piece): Sums(centred=part.small.bias is not None)
        for number, part in enumerate(reader.parts)
        for piece in range(len(part.pieces))
    }
    for batch in batches(data):
        expected = _reads(dense, batch, loss, reader.dense, len(reader.order))
        actual = _reads(small, batch, loss, reader.small, len(reader.order))
        if len(expected) > len(actual):
            raise CheckFailed("the small model did not run every layer that the dense one ran", "", "")
        for number, part in enumerate(reader.order[: len(actual)]):
            for index, piece in enumerate(reader.parts[part].pieces):
                _add(sums[part, index], reader.name, piece, actual[number], expected[number : number + 1])
    return sums


def _reads(model: nn.Module, batch: Any, loss: Loss | None, weight: nn.Parameter, calls: int) -> list[Read]:
    reads: list[Read] = []

    def keep(read: Read) -> None:
        reads.append(read)
        if len(reads) == calls:
            raise Stop

    watch = Watch([weight], keep)
    with suppress(Stop):
        with watch:
            run(model, batch, loss)
        watch.finish()
    return reads


def _add(sums: Sums, name: str, piece: Piece, read: Read, expected: Sequence[Read]) -> None:
    """Add one call of one matrix: its inputs in the small model, its outputs in both."""
    outputs = read.rows(piece.small, piece.rows)
    expected_outputs = expected[0].rows(piece.dense, piece.expected) if expected else outputs[:0]
    if expected_outputs.shape != outputs.shape:
        raise CheckFailed(
            f"{name} has different output shapes in the small model and in the dense one",
            f"{tuple(outputs.shape)} against {tuple(expected_outputs.shape) if expected else 'nothing'}",
            "reconstruction compares the same tokens on both sides",
        )
    y = expected_outputs.double()
    if read.residual is not None and expected[0].residual is not None:
        # The next layers read the sum: the layer compensates the error in the residual too.
        y = y + expected[0].rows(piece.dense, piece.expected, residual=True)
        y = y - read.rows(piece.small, piece.rows, residual=True)
    gap = y - outputs.double()
    for x, tokens in read.columns(piece.small, piece.columns):
        sums.add(x, y[tokens], gap[tokens])


def _refit(reader: Reader, gathered: Gathered, ridge: float) -> LayerFit:
    """Solve for every matrix, and write the solutions that reduce the error."""
    if not all(sums.finite for sums in gathered.values()):
        raise CheckFailed(
            f"the inputs or outputs of {reader.name} are not finite on the calibration data",
            "a model or the data holds NaN or infinity",
            "check weights and data before reconstructing",
        )
    scale = math.sqrt(sum(sums.variation for sums in gathered.values())) or 1.0
    before, after, damping = 0.0, 0.0, 0.0
    for (number, index), sums in gathered.items():
        solution = sums.solve(ridge)
        part, better = reader.parts[number], math.sqrt(solution.after) / scale < math.sqrt(solution.before) / scale
        before, after = before + solution.before, after + (solution.after if better else solution.before)
        damping = max(damping, solution.damping)
        if better:
            _write(part.small, part.pieces[index], solution)
    tokens = max(sums.tokens for sums in gathered.values())
    return LayerFit(reader.name, tokens, math.sqrt(before) / scale, math.sqrt(after) / scale, damping)


def _write(read: Read, piece: Piece, solution: Solution) -> None:
    """Add the change to the kept block of the matrix, and the shift to its bias."""
    matrices = read.matrices().clone()
    matrix = matrices[piece.small]
    rows = _indices(piece.rows, len(matrix), matrix.device)
    columns = _indices(piece.columns, matrix.shape[1], matrix.device)
    block = rows[:, None], columns[None, :]
    matrix[block] = (matrix[block].double() + solution.change.T).to(matrix.dtype)
    read.write_(matrices)
    if read.bias is not None:
        bias = read.bias[piece.small]
        bias[rows] = (bias[rows].double() + solution.shift).to(bias.dtype)


def _indices(positions: Tensor | None, size: int, device: torch.device) -> Tensor:
    return torch.arange(size, device=device) if positions is None else positions.to(device)
