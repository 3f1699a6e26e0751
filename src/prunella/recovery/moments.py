"""Statistics correction: the counterpart of `recalibrate_bn` for networks without batch norm."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunella.errors import CheckFailed, RequestError
from prunella.model.batches import batches
from prunella.model.device import check_float64
from prunella.model.forward import Outputs, first_tensor, forward
from prunella.model.hooks import removed_after
from prunella.model.masks import reapply_
from prunella.model.observed_reads import Read
from prunella.model.state import mode, restored_on_error
from prunella.model.unwrap import unwrap
from prunella.model.watch import Watch
from prunella.planning.plan import Plan
from prunella.recovery.batchnorm import Moments, as_tensor
from prunella.registry.method import recovery


@dataclass(frozen=True)
class _Layer:
    """A module with a weight and a bias: the axis of its outputs, and how it reads the weight.

    read: the read of its weight without activations; None if the weight is a scale.
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
    """Restore the mean and the variance of each output channel of some layers to those of the dense model, in place.

    `W_c <- W_c sd_c / sd'_c`, `b_c <- (b_c - mean'_c) sd_c / sd'_c + mean_c`, folded into the layer's own weight (or a
    norm's scale) and bias, layer by layer in the order of execution, so that each correction accounts for the corrected
    layers before it. A channel that is constant in the pruned model gets the mean alone. Zeros of the weight stay zero.
    Returns the names of the corrected layers.

    Data: batches without labels, one pass per layer. plan: the plan of the cut, if `model` is shrunk. names: modules
    with weight and bias; by default every linear layer and convolution with both. outputs: how to run (model, batch).
    Layers before a batch norm need `recalibrate_bn` instead.

    `CheckFailed` names a layer with a statistic that is not finite. After an error the model is as before.

    Use: masked or shrunk transformers and other networks without batch norm, without time to train. Avoid: a few dozen
    samples, whose variance is noise; before `reconstruct`, which overwrites the correction.
    """
    data = list(data) if isinstance(data, Iterator) else data  # it is read more than once
    model, dense = unwrap(model), unwrap(dense)
    check_float64(dense, "statistics are summed")
    with restored_on_error(model), mode(model, training=False), mode(dense, training=False), torch.no_grad():
        stream = batches(data)
        layers = _layers(model, names, next(stream), outputs)
        for layer in layers:
            expected = _moments(dense, layer, data, outputs)
            actual = _moments(model, layer, data, outputs)
            _correct_(layer, _kept_statistics(expected, layer, plan), actual)
            reapply_(model)
    return tuple(layer.name for layer in layers)


def _layers(model: nn.Module, names: Sequence[str], batch: Any, outputs: Outputs) -> list[_Layer]:
    """The requested layers in the order of their first calls."""
    owners = {name: module for name, module in model.named_modules() if _has_weight_and_bias(module)}
    unknown = [name for name in names if name not in owners]
    if unknown:
        raise RequestError(
            f"{unknown[0]!r} is not a module with a weight and a bias",
            "the correction needs both",
            "see named_modules()",
        )
    reads: dict[int, tuple[int, Read]] = {}
    ran: list[str] = []
    weights = [module.weight for module in owners.values()]

    def record(read: Read) -> None:
        if read.full and read.form.output_axis is not None:
            reads.setdefault(id(read.weight), (read.form.output_axis, read.bare))

    handles = [m.register_forward_hook(lambda *_, n=n: ran.append(n)) for n, m in owners.items()]
    with removed_after(handles), Watch(weights, record) as watch:
        outputs(model, batch)
        watch.finish()
    layers = []
    for name in dict.fromkeys(ran):
        module = owners[name]
        axis_and_read = reads.get(id(module.weight))
        if axis_and_read is not None:
            layers.append(_Layer(name, module.weight, module.bias, *axis_and_read))
        elif name in names:
            if module.weight.dim() != 1:
                why = str(watch.others.get(id(module.weight), "nothing reads its weight as a matrix"))
                raise RequestError(f"{name} cannot be corrected", why)
            layers.append(_Layer(name, module.weight, module.bias, -1 if hasattr(module, "normalized_shape") else 1))
    return [layer for layer in layers if not names or layer.name in names]


def _has_weight_and_bias(module: nn.Module) -> bool:
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    return weight is not None and bias is not None and bias.dim() == 1 and bias.numel() in weight.shape


def _moments(model: nn.Module, layer: _Layer, data: Iterable[Any], outputs: Outputs) -> Moments:
    moments = Moments()

    def observe(module: nn.Module, arguments: Any, output: Any) -> None:
        value = first_tensor(output).movedim(layer.axis, -1)
        moments.add(value.reshape(-1, value.shape[-1]))

    with _hooked(model.get_submodule(layer.name), observe):
        for batch in batches(data):
            outputs(model, batch)
    return moments


@contextmanager
def _hooked(module: nn.Module, hook: Any) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    with handle:
        yield


def _kept_statistics(moments: Moments, layer: _Layer, plan: Plan | None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the dense channels that the small model has."""
    mean, deviation = _mean(moments), _deviation(moments)
    kept = plan.cuts.get(f"{layer.name}.bias", {}).get(0) if plan is not None else None
    if kept is not None and len(mean) != len(layer.bias):
        mean, deviation = mean[kept.to(mean.device)], deviation[kept.to(mean.device)]
    if len(mean) != len(layer.bias):
        raise RequestError(
            f"{layer.name} has {len(layer.bias)} outputs, {len(mean)} in the dense model",
            "its outputs were cut",
            "pass plan=",
        )
    return mean, deviation


def _correct_(layer: _Layer, expected: tuple[Tensor, Tensor], moments: Moments) -> None:
    mean, deviation = _mean(moments), _deviation(moments)
    constant = deviation <= torch.finfo(layer.weight.dtype).eps * mean.abs()
    ratio = torch.where(constant, 1.0, expected[1] / deviation.masked_fill(constant, 1.0))
    shift = expected[0] - mean * ratio
    if not bool(torch.isfinite(ratio + shift).all()):
        raise CheckFailed(
            f"the outputs of {layer.name} are not finite on the calibration data",
            "the model or the data holds NaN or infinity",
            "check the weights before correcting",
        )
    if layer.read is None:
        layer.weight.copy_(layer.weight.double() * ratio)
    else:
        matrices = layer.read.matrices(layer.weight.double())
        layer.read.write_(matrices * ratio.reshape(len(matrices), -1, 1))
    layer.bias.copy_(layer.bias.double() * ratio + shift)


def _mean(moments: Moments) -> Tensor:
    return as_tensor(moments.mean)


def _deviation(moments: Moments) -> Tensor:
    return (as_tensor(moments.squares) / moments.count).sqrt()
