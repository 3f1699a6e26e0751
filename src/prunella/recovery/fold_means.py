"""Put what removed units contributed on average into the biases of the layers that read them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunella.model.forward import batches, forward
from prunella.model.masks import reapply_
from prunella.model.reads import Read, Watch
from prunella.model.state import mode
from prunella.model.unwrap import unwrap
from prunella.planning.plan import Plan
from prunella.recovery.reconstruct import Fit, Layer, layers_of
from prunella.registry.method import recovery
from prunella.types import Loss


@dataclass(frozen=True)
class Fold:
    """One layer that reads removed units. shift: largest change of its bias. skipped: why it was left, or empty."""

    name: str
    shift: float = 0.0
    skipped: str = ""

    def __str__(self) -> str:
        return (
            f"{self.name}: skipped, {self.skipped}" if self.skipped else f"{self.name}: bias by up to {self.shift:.3g}"
        )


@dataclass(frozen=True)
class Folded:
    """What `fold_means` did, layer by layer in the order of execution."""

    folds: tuple[Fold, ...]

    def __str__(self) -> str:
        return "\n".join(map(str, self.folds)) or "no layer reads a pruned axis"


@recovery(source="An et al. 2024, arXiv:2312.11983; Ye et al. 2018, arXiv:1802.00124")
def fold_means(
    small: nn.Module, dense: nn.Module, data: Iterable[Any], plan: Plan, *, loss: Loss | None = None
) -> Folded:
    """Add the mean contribution of the removed units to the bias of every layer that reads them, in place.

    `b_i += sum_{j removed} W_ij * mean(x_j)`, with the weights and the activations of the dense model; of a convolution
    the sum is over its kernel too. It is exact where the removed units are constant, as those whose normalisation has a
    scale of 0 (`act(beta)`); behind a convolution with padding the border is off by what the padding does not add.
    Data: batches, no labels, passed over once; a few hundred tokens (pixels) are enough.

    small: the shrunk model, or the dense one with the plan's structure masked. loss: how to run a model on a batch; by
    default it is called on it. A layer without a bias is named in the answer and left as it is, since a new bias would
    change the keys of the state dict: a batch normalisation behind it can be recalibrated instead.

    Use: right after a cut by `fluctuation` or `activation_variance`, or of dead units; it costs one pass. Avoid: when
    `reconstruct` follows: it refits the bias too.
    """
    data = list(data) if isinstance(data, Iterator) else data
    small_, dense_ = unwrap(small), unwrap(dense)
    with mode(small_, training=False), mode(dense_, training=False), torch.no_grad():
        found = layers_of(small_, dense_, next(batches(data)), plan, loss)
        layers = {layer.dense: layer for layer in found if isinstance(layer, Layer) and layer.bias is not None}
        sums: dict[nn.Parameter, tuple[Tensor, int]] = {}

        def add(read: Read) -> None:
            x = read.x.movedim(1, -1) if read.conv is not None else read.x
            rows = x.reshape(-1, x.shape[-1]).double()
            total, count = sums.get(read.weight, (torch.zeros_like(rows[0]), 0))
            sums[read.weight] = total + rows.sum(0), count + len(rows)

        watch = Watch(layers, add)
        for batch in batches(data):
            with watch:
                loss(dense_, batch) if loss else forward(dense_, batch)
            watch.finish()
        folds = [_fold(item, sums, plan) for item in found]
        reapply_(small_)
    return Folded(tuple(folds))


def _fold(item: Layer | Fit, sums: dict[nn.Parameter, tuple[Tensor, int]], plan: Plan) -> Fold:
    if isinstance(item, Fit):
        return Fold(item.name, skipped=item.skipped.replace("refitted", "corrected"))
    if item.bias is None:
        return Fold(item.name, skipped="it has no bias that could take the constant")
    total, count = sums[item.dense]
    in_axis, out_axis = item.axes
    gone = torch.ones(item.dense.shape[in_axis], dtype=torch.bool, device=item.dense.device)
    gone[plan.cuts[item.name][in_axis].to(gone.device)] = False
    weight = item.dense.double().movedim((out_axis, in_axis), (0, 1))
    weight = weight.reshape(*weight.shape[:2], -1).sum(-1)
    shift = weight @ (total / count * gone)
    shift = shift if item.expected is None else shift[item.expected.to(shift.device)]
    places = torch.arange(len(shift)) if item.writes is None else item.writes
    item.bias[places] = (item.bias[places].double() + shift).to(item.bias.dtype)
    return Fold(item.name, float(shift.abs().max()) if len(shift) else 0.0)
