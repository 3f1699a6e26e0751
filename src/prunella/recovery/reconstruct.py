"""Heal without labels: refit the layers that read a pruned axis so that they answer as the dense layers did."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunella.errors import CheckFailed, RequestError
from prunella.graph.cut.block_surgery import renamed
from prunella.model.forward import batches, forward
from prunella.model.masks import masks_of, reapply_
from prunella.model.reads import Read, Stop, Watch, rows, targets
from prunella.model.state import mode
from prunella.model.unwrap import unwrap
from prunella.planning.plan import Plan
from prunella.recovery.least_squares import Solution, Sums
from prunella.registry.method import recovery
from prunella.types import Loss

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fit:
    """One layer: relative output errors `|Y - Y'| / |Y - mean Y|` before and after, on the calibration data.

    damping: what was added to the diagonal, relative to its mean. skipped: why the layer was left alone, or empty.
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
    """What `reconstruct` did, layer by layer in the order of execution."""

    fits: tuple[Fit, ...]

    def __str__(self) -> str:
        return "\n".join(map(str, self.fits)) or "no layer reads a pruned axis"


OnFit = Callable[[Fit, int, int], None]
"""Called after each layer with its fit, how many are done, and how many there are."""


@dataclass(frozen=True)
class Layer:
    """One layer in both models, and which positions of its weight take part.

    `reads`, `writes`: positions on the input and output axis of the small weight (None: all of them).
    `expected`: the outputs of the dense layer that they stand for (None: all). `uses`: calls in one forward pass.
    """

    name: str
    dense: nn.Parameter
    small: nn.Parameter
    bias: nn.Parameter | None
    axes: tuple[int, int]
    uses: int
    reads: Tensor | None
    writes: Tensor | None
    expected: Tensor | None


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
    errors made before it. Where the output is added to something, as to a residual stream, the sum is fitted to the sum
    in the dense model: the layer also makes up for the error that the stream carries by then. The penalty pulls toward
    the weights the layer has: directions that `data` does not show stay as they are. A layer with a bias is fitted on
    centred inputs and its bias refitted. Sums are gathered batch by batch in float64, no activations are stored. Where
    the matrix is singular the damping grows, and the report says so.

    small: the shrunk model, or the dense one with the plan's structure masked (what is masked stays zero).
    data: batches, no labels; best a few times more tokens (or pixels) than a layer has inputs. Passed over once per
    layer: a single pass would be blind to what the fits before a layer changed, and harms deep networks.
    loss: how to run a model on one batch; by default it is called on the batch. ridge: from 0 up, 1e-3 to 1e-1 is
    usual; with fewer tokens than about twice the inputs of a layer, small values fit noise.

    Linear layers, matrix products and convolutions in one and two dimensions are refitted. The report names what was
    skipped and why: grouped convolutions, weights masked one by one, `nn.MultiheadAttention`, einsum.

    Use: before any training, and in its place when there are no labels and little time. Avoid: fewer tokens than about
    twice a layer's inputs.
    """
    if not ridge >= 0:
        raise RequestError(
            f"ridge={ridge:g} is out of range", "ridge takes numbers from 0 up", "for example ridge=1e-2"
        )
    small_, dense_ = unwrap(small), unwrap(dense)
    with mode(small_, training=False), mode(dense_, training=False), torch.no_grad():
        found = layers_of(small_, dense_, next(batches(data)), plan, loss)
        layers = [layer for layer in found if isinstance(layer, Layer)]
        fits = {item.name: item for item in found if isinstance(item, Fit)}
        for done, layer in enumerate(layers, start=1):
            fits[layer.name] = _refit(layer, _gather(layer, small_, dense_, data, loss), ridge)
            log.info("%s", fits[layer.name])
            if on_fit:
                on_fit(fits[layer.name], done, len(layers))
        reapply_(small_)
    return Reconstruction(tuple(fits[item.name] for item in found))


def layers_of(small: nn.Module, dense: nn.Module, batch: Any, plan: Plan, loss: Loss | None) -> list[Layer | Fit]:
    """Every reader of a cut axis in the order of execution: a `Layer`, or a `Fit` that says why it is skipped."""
    named = dict(dense.named_parameters(remove_duplicate=False))
    cut = {named[name]: (name, axes) for name, axes in plan.cuts.items() if name in named and named[name].dim() > 1}
    seen: dict[nn.Parameter, list[Read]] = {}
    watch = Watch(cut, lambda read: seen.setdefault(read.weight, []).append(read))
    with watch:
        loss(dense, batch) if loss else forward(dense, batch)
    watch.finish()
    result: list[Layer | Fit] = []
    new = renamed(dense, plan.dropped)
    for weight, reads in seen.items():
        name, axes = cut[weight]
        if reads[0].in_axis in axes and name in new:
            reason = _unfit(reads, watch.others.get(id(weight)))
            result.append(Fit(name, skipped=reason) if reason else _layer(small, dense, reads, name, axes, new))
    for weight, (name, _) in cut.items():
        other = watch.others.get(id(weight), "embedding")
        if weight not in seen and name in new and other != "embedding":
            result.append(Fit(name, skipped=f"{other} reads it, which is not refitted"))
    return result


def _unfit(reads: list[Read], other: str | None) -> str:
    if reads[0].conv is not None and reads[0].conv.groups > 1:
        return f"a convolution with {reads[0].conv.groups} groups is not refitted"
    if other is not None:
        return f"{other} reads the same (tied) weight"
    if any((read.in_axis, read.bias) != (reads[0].in_axis, reads[0].bias) for read in reads):
        return "it is used in two different ways"
    return ""


def _layer(
    small: nn.Module,
    dense: nn.Module,
    reads: list[Read],
    name: str,
    axes: Mapping[int, Tensor],
    new: Mapping[str, str],
) -> Layer | Fit:
    """A reader by its name in the dense model; `new` has its name in the small one."""
    read, named = reads[0], dict(small.named_parameters(remove_duplicate=False))
    if new[name] not in named:
        raise RequestError(
            f"the small model has no parameter {name!r}", "it was made from another model", "pass plan's own model"
        )
    weight = named[new[name]]
    taking_part = {axis: _positions(name, axis, read.weight, weight, axes.get(axis)) for axis in (0, 1)}
    mask = masks_of(small).get(new[name])
    if mask is not None and not bool(_select(mask, taking_part).all()):
        return Fit(name, skipped="single weights of it are masked, and a refit would fill them")
    dense_names = {parameter: key for key, parameter in dense.named_parameters()}
    bias = None if read.bias is None else named[new[dense_names[read.bias]]]
    ends = read.in_axis, read.out_axis
    reading, writing = taking_part[ends[0]], taking_part[ends[1]]
    return Layer(name, read.weight, weight, bias, ends, len(reads), reading, writing, axes.get(ends[1]))


def _positions(name: str, axis: int, dense: Tensor, small: Tensor, kept: Tensor | None) -> Tensor | None:
    """Positions of the small weight that take part: all if the axis was cut physically, the kept ones if masked."""
    full, size = dense.shape[axis], small.shape[axis]
    left = full if kept is None else kept.numel()
    if size not in (full, left):
        raise RequestError(
            f"axis {axis} of {name} has {size} positions in the small model, {full} in the dense one",
            f"the plan keeps {left}",
            "pass the plan that the small model was made with",
        )
    return kept if size != left else None


def _select(tensor: Tensor, positions: Mapping[int, Tensor | None]) -> Tensor:
    for axis, kept in positions.items():
        if kept is not None:
            tensor = tensor.index_select(axis, kept.to(tensor.device))
    return tensor


def _gather(layer: Layer, small: nn.Module, dense: nn.Module, data: Iterable[Any], loss: Loss | None) -> Sums:
    """One pass over the data through both models, each stopped as soon as the layer has run."""
    sums = Sums(centred=layer.bias is not None)
    for batch in batches(data):
        wanted = _reads(dense, batch, loss, layer.dense, layer.uses)
        for read in _reads(small, batch, loss, layer.small, layer.uses):
            _add(sums, layer, read, wanted)
        if wanted:
            raise CheckFailed("the small model did not run every layer that the dense one ran", "", "")
    return sums


def _reads(model: nn.Module, batch: Any, loss: Loss | None, weight: nn.Parameter, calls: int) -> list[Read]:
    found: list[Read] = []

    def keep(read: Read) -> None:
        found.append(read)
        if len(found) == calls:
            raise Stop

    watch = Watch([weight], keep)
    with suppress(Stop):
        with watch:
            loss(model, batch) if loss else forward(model, batch)
        watch.finish()
    return found


def _add(sums: Sums, layer: Layer, read: Read, wanted: list[Read]) -> None:
    got = targets(read, layer.writes)
    asked = targets(wanted[0], layer.expected) if wanted else got[:0]
    if asked.shape != got.shape:
        raise CheckFailed(
            f"{layer.name} answers with other shapes in the small model than in the dense one",
            f"{tuple(got.shape)} against {tuple(asked.shape) if wanted else 'nothing'}",
            "reconstruction compares the same tokens on both sides",
        )
    y = asked.double()
    other = wanted.pop(0)
    if read.residual is not None and other.residual is not None:
        # The sum is what goes on: the layer makes up for the error that is already in the other summand.
        y = y + targets(other, layer.expected, residual=True) - targets(read, layer.writes, residual=True)
    residual = y - got.double()
    for x, tokens in rows(read, layer.reads):
        sums.add(x, y[tokens], residual[tokens])


def _refit(layer: Layer, sums: Sums, ridge: float) -> Fit:
    if not sums.finite:
        raise CheckFailed(
            f"the inputs or outputs of {layer.name} are not finite on the calibration data",
            "a model or the data holds NaN or infinity",
            "check weights and data before reconstructing",
        )
    solution = sums.solve(ridge)
    scale = math.sqrt(sums.variation) or 1.0
    before, after = math.sqrt(solution.before) / scale, math.sqrt(solution.after) / scale
    if after >= before:
        return Fit(layer.name, sums.tokens, before, before, solution.damping)
    _write(layer, solution)
    return Fit(layer.name, sums.tokens, before, after, solution.damping)


def _write(layer: Layer, solution: Solution) -> None:
    """Add the change to the block of the weight that takes part, and the shift to the bias."""
    weight, (in_axis, out_axis) = layer.small, layer.axes
    reads = _all(weight, in_axis) if layer.reads is None else layer.reads.to(weight.device)
    writes = _all(weight, out_axis) if layer.writes is None else layer.writes.to(weight.device)
    change = solution.change.T.reshape(len(writes), len(reads), *weight.shape[2:])
    place = (writes[:, None], reads[None, :])
    if in_axis == 0:
        change, place = change.transpose(0, 1), (reads[:, None], writes[None, :])
    weight[place] = (weight[place].double() + change).to(weight.dtype)
    if layer.bias is not None:
        layer.bias[writes] = (layer.bias[writes].double() + solution.shift).to(layer.bias.dtype)


def _all(weight: Tensor, axis: int) -> Tensor:
    return torch.arange(weight.shape[axis], device=weight.device)
