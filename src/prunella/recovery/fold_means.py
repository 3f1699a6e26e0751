"""Add the mean contribution of removed units to the biases of the layers that read these units."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunella.model.batches import batches
from prunella.model.device import check_float64
from prunella.model.forward import run
from prunella.model.masks import reapply_
from prunella.model.observed_reads import Read
from prunella.model.state import mode, restored_on_error
from prunella.model.unwrap import unwrap
from prunella.model.watch import Watch
from prunella.planning.plan import Plan
from prunella.recovery.readers import Reader, Skipped, readers_of
from prunella.registry.method import recovery
from prunella.types import Loss


@dataclass(frozen=True)
class Fold:
    """One layer that reads removed units. shift: largest change of its bias. skipped: the reason, or empty."""

    name: str
    shift: float = 0.0
    skipped: str = ""

    def __str__(self) -> str:
        return (
            f"{self.name}: skipped, {self.skipped}" if self.skipped else f"{self.name}: bias by up to {self.shift:.3g}"
        )


@dataclass(frozen=True)
class FoldedMeans:
    """The result of `fold_means`, layer by layer in the order of execution."""

    folds: tuple[Fold, ...]

    def __str__(self) -> str:
        return "\n".join(map(str, self.folds)) or "no layer reads a pruned axis"


@recovery(source="An et al. 2024, arXiv:2312.11983; Ye et al. 2018, arXiv:1802.00124")
def fold_means(
    small: nn.Module, dense: nn.Module, data: Iterable[Any], plan: Plan, *, loss: Loss | None = None
) -> FoldedMeans:
    """Add the mean contribution of the removed units to the bias of every layer that reads them, in place.

    `b_i += sum_{j removed} W_ij * mean(x_j)`, with the weights and the activations of the dense model; for a
    convolution the sum is over the kernel too. The correction is exact for constant units, such as units with a
    normalization scale of 0 (`act(beta)`), except at the border of a convolution with padding, where fewer positions
    add to the sum.
    Data: batches, no labels, one pass; a few hundred tokens (pixels) are enough.

    small: the shrunk model, or the dense one with the plan's structure masked. loss: how to run a model on a batch; by
    default the model is called on the batch. The result names every layer without a bias. Such a layer does not change:
    a new bias would change the keys of the state dict. Recalibrate a batch normalization after it instead.

    Use: right after pruning by `fluctuation` or `activation_variance`, or of dead units; it costs one pass. Avoid:
    before `reconstruct`, which refits the bias too.
    """
    data = list(data) if isinstance(data, Iterator) else data
    small_, dense_ = unwrap(small), unwrap(dense)
    check_float64(dense_, "layers are refitted")
    with restored_on_error(small_), mode(small_, training=False), mode(dense_, training=False), torch.no_grad():
        stream = batches(data)
        items = readers_of(small_, dense_, next(stream), plan, loss)
        readers = {item.dense: item for item in items if isinstance(item, Reader) and item.biased}
        means = _Means(readers)
        for batch in batches(data):
            means.begin()
            watch = Watch(readers, means.add)
            with watch:
                run(dense_, batch, loss)
            watch.finish()
        folds = [_fold(item, means) for item in items]
        reapply_(small_)
    return FoldedMeans(tuple(folds))


class _Means:
    """For every matrix the sum of its inputs, and their number of tokens."""

    def __init__(self, readers: Mapping[nn.Parameter, Reader]) -> None:
        self.readers = readers
        self.sums: dict[tuple[nn.Parameter, int, int], tuple[Tensor, int]] = {}
        self._calls: Counter[nn.Parameter] = Counter()

    def begin(self) -> None:
        """Start a forward pass."""
        self._calls.clear()

    def add(self, read: Read) -> None:
        """Add the inputs of one call of a layer."""
        order = self.readers[read.weight].order
        part = order[self._calls[read.weight] % len(order)]
        self._calls[read.weight] += 1
        for group in range(read.groups):
            sums, tokens = read.form.input_sums(read.x, read.view.size, group)
            total, count = self.sums.get((read.weight, part, group), (torch.zeros_like(sums), 0))
            self.sums[read.weight, part, group] = total + sums, count + tokens


def _fold(item: Reader | Skipped, means: _Means) -> Fold:
    if isinstance(item, Skipped):
        return Fold(item.name, skipped=item.why)
    if not item.biased:
        return Fold(item.name, skipped="it has no bias for the constant")
    largest = 0.0
    for number, part in enumerate(item.parts):
        matrices = part.dense.matrices(item.dense.double())
        for submatrix in part.submatrices:
            total, count = means.sums[item.dense, number, submatrix.dense]
            # All taps of a kernel share the sum of their input channel.
            weight = matrices[submatrix.dense].reshape(-1, len(total), matrices.shape[2] // len(total)).sum(-1)
            removed = ~submatrix.kept.view(len(total), -1)[:, 0].to(weight.device)
            shift = weight @ (total / count * removed)
            shift = shift if submatrix.expected is None else shift[submatrix.expected.to(shift.device)]
            assert part.small.bias is not None  # the reader is biased
            bias = part.small.bias[submatrix.small]
            positions = torch.arange(len(shift), device="cpu") if submatrix.rows is None else submatrix.rows
            bias[positions] = (bias[positions].double() + shift).to(bias.dtype)
            largest = max(largest, float(shift.abs().max()) if len(shift) else 0.0)
    return Fold(item.name, largest)
