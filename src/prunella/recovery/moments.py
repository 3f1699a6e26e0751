"""Statistics correction: what recalibrating batch norms does, for networks that have none."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunella.errors import CheckFailed, RequestError
from prunella.model.forward import Outputs, batches, first_tensor, forward
from prunella.model.masks import reapply_
from prunella.model.state import mode
from prunella.model.unwrap import unwrap
from prunella.model.watch import Read, Watch
from prunella.planning.plan import Plan
from prunella.recovery.batchnorm import Moments
from prunella.registry.method import recovery


@dataclass(frozen=True)
class _Place:
    """A module with a weight and a bias: the axis of its outputs in what it returns, and how the weight is read.

    read: without the values of a run; None where the weight is a scale.
    """

    name: str
    weight: nn.Parameter
    bias: nn.Parameter
    axis: int
    read: Read | None = None


@recovery(source="Frantar and Alistarh 2022, arXiv:2208.11580 (statistics correction)")
def correct_statistics(
    model: nn.Module,
    dense: nn.Module,
    data: Iterable[Any],
    *,
    plan: Plan | None = None,
    names: Sequence[str] = (),
    outputs: Outputs = forward,
) -> tuple[str, ...]:
    """Give each output channel of some layers the mean and the variance that it has in the dense model, in place.

    `W_c <- W_c sd_c / sd'_c`, `b_c <- (b_c - mean'_c) sd_c / sd'_c + mean_c`, folded into the layer's own weight (or a
    norm's scale) and bias, layer by layer in the order of execution, so that a layer is corrected for what the layers
    before it became. A channel that is constant in the pruned model gets the mean alone. Zeros of the weight stay zero.
    Returns the names of the layers corrected.

    Data: batches without labels, passed over once per layer. plan: what was cut, if `model` is the shrunk one. names:
    modules with weight and bias; by default every linear layer and convolution that has both. outputs: how to run
    (model, batch). Layers in front of a batch norm need `recalibrate_bn` instead.

    `CheckFailed` if a statistic is not finite: no layer after the one named was changed.

    Use: for masked or shrunk transformers and other networks without batch norm, when there is no time to train.
    Avoid: with a few dozen samples, whose variance is noise; before `reconstruct`, which undoes it.
    """
    model, dense = unwrap(model), unwrap(dense)
    with mode(model, training=False), mode(dense, training=False), torch.no_grad():
        places = _places(model, names, next(batches(data)), outputs)
        for place in places:
            wanted = _moments(dense, place, data, outputs)
            found = _moments(model, place, data, outputs)
            _correct_(place, _kept(wanted, place, plan), found)
            reapply_(model)
    return tuple(place.name for place in places)


def _places(model: nn.Module, names: Sequence[str], batch: Any, outputs: Outputs) -> list[_Place]:
    """The layers asked for in the order in which they first run."""
    owners = {name: module for name, module in model.named_modules() if _has_both(module)}
    unknown = [name for name in names if name not in owners]
    if unknown:
        raise RequestError(
            f"{unknown[0]!r} is no module with a weight and a bias", "both take the correction", "see named_modules()"
        )
    reads: dict[int, tuple[int, Read]] = {}
    ran: list[str] = []
    weights = [module.weight for module in owners.values()]

    def see(read: Read) -> None:
        if read.whole and read.form.output_axis is not None:
            reads.setdefault(id(read.weight), (read.form.output_axis, read.bare))

    handles = [m.register_forward_hook(lambda *_, n=n: ran.append(n)) for n, m in owners.items()]
    try:
        with Watch(weights, see) as watch:
            outputs(model, batch)
            watch.finish()
    finally:
        for handle in handles:
            handle.remove()
    found = []
    for name in dict.fromkeys(ran):
        module = owners[name]
        known = reads.get(id(module.weight))
        if known is not None:
            found.append(_Place(name, module.weight, module.bias, *known))
        elif name in names:
            if module.weight.dim() != 1:
                why = str(watch.others.get(id(module.weight), "nothing reads its weight as a matrix"))
                raise RequestError(f"{name} cannot be corrected", why)
            found.append(_Place(name, module.weight, module.bias, -1 if hasattr(module, "normalized_shape") else 1))
    return [place for place in found if not names or place.name in names]


def _has_both(module: nn.Module) -> bool:
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    return weight is not None and bias is not None and bias.dim() == 1 and bias.numel() in weight.shape


def _moments(model: nn.Module, place: _Place, data: Iterable[Any], outputs: Outputs) -> Moments:
    found = Moments()

    def look(module: nn.Module, arguments: Any, output: Any) -> None:
        value = first_tensor(output).movedim(place.axis, -1)
        found.add(value.reshape(-1, value.shape[-1]))

    with _hooked(model.get_submodule(place.name), look):
        for batch in batches(data):
            outputs(model, batch)
    return found


@contextmanager
def _hooked(module: nn.Module, look: Any) -> Iterator[None]:
    handle = module.register_forward_hook(look)
    try:
        yield
    finally:
        handle.remove()


def _kept(moments: Moments, place: _Place, plan: Plan | None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the dense channels that the small model has."""
    mean, deviation = _mean(moments), _deviation(moments)
    cut = plan.cuts.get(f"{place.name}.bias", {}).get(0) if plan is not None else None
    if cut is not None and len(mean) != len(place.bias):
        mean, deviation = mean[cut.to(mean.device)], deviation[cut.to(mean.device)]
    if len(mean) != len(place.bias):
        raise RequestError(
            f"{place.name} has {len(place.bias)} outputs, {len(mean)} in the dense model",
            "its outputs were cut",
            "pass plan=",
        )
    return mean, deviation


def _correct_(place: _Place, wanted: tuple[Tensor, Tensor], moments: Moments) -> None:
    mean, deviation = _mean(moments), _deviation(moments)
    constant = deviation <= torch.finfo(place.weight.dtype).eps * mean.abs()
    ratio = torch.where(constant, 1.0, wanted[1] / deviation.masked_fill(constant, 1.0))
    shift = wanted[0] - mean * ratio
    if not bool(torch.isfinite(ratio + shift).all()):
        raise CheckFailed(
            f"the outputs of {place.name} are not finite on the calibration data",
            "the model or the data holds NaN or infinity",
            "check the weights before correcting",
        )
    if place.read is None:
        place.weight.copy_(place.weight.double() * ratio)
    else:
        matrices = place.read.matrices(place.weight.double())
        place.read.write_(matrices * ratio.reshape(len(matrices), -1, 1))
    place.bias.copy_(place.bias.double() * ratio + shift)


def _mean(moments: Moments) -> Tensor:
    return torch.as_tensor(moments.mean)


def _deviation(moments: Moments) -> Tensor:
    return (torch.as_tensor(moments.squares) / moments.count).sqrt()
