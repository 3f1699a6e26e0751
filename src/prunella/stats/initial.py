"""Statistics for pruning at initialization: Hessian-gradient products, total sensitivity, and flow without data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from prunella.errors import BadInput, NotSupported, RequestError
from prunella.model.copying import copied
from prunella.model.forward import outputs_of
from prunella.stats.gradient import MeanGrad
from prunella.stats.subject import Subject

Grads = Mapping[str, Tensor]


class TotalSlope:
    """`total_slope`: `sum |g w|` over all scored weights, one number in the shape of each parameter.

    The gradient is the mean over batches, taken before the absolute value.
    """

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self._mean = MeanGrad(subject)

    def watch(self) -> AbstractContextManager[object]:
        """Unused: this statistic needs no forward pass."""
        return nullcontext()

    def add(self, grads: Grads) -> None:
        """One batch."""
        self._mean.add(grads)

    def result(self) -> dict[str, Tensor]:
        """By entity."""
        weights, grads = self._subject.parameters, self._mean.result()
        total = sum(
            float((weights[name].detach() * grad).abs().sum(dtype=torch.float64)) for name, grad in grads.items()
        )
        return {name: grad.new_full((), total).expand(grad.shape) for name, grad in grads.items()}


class HessianGrad:
    """`hessian_grad`: `H g`, the Hessian of the loss times its gradient, by entity; both of the mean over batches.

    The output of the model is divided by `temperature` before the loss. `g` is complete only after the last batch, so
    that the graphs of all batches are kept: memory grows with the number of batches.
    """

    twice = True

    def __init__(self, subject: Subject, *, temperature: float = 200.0) -> None:
        if not temperature > 0:
            raise RequestError(f"temperature={temperature:g} is out of range", "a positive number", "use 200")
        self._subject, self._temperature = subject, temperature
        self._batches: list[Grads] = []

    def watch(self) -> AbstractContextManager[object]:
        """Divide the output of the model by the temperature."""
        return _Cooled(self._subject.model, self._temperature)

    def second(self, weights: Grads, grads: Grads) -> None:
        """Gradients of one batch that can be differentiated again."""
        self._batches.append(grads)

    def add(self, grads: Grads) -> None:
        """Unused: `second` collects the gradients."""

    def result(self) -> dict[str, Tensor]:
        """By entity."""
        mean = {name: torch.zeros_like(self._subject.parameters[name]) for name in self._subject.scored}
        for grads in self._batches:
            for name, grad in grads.items():
                mean[name] += grad.detach() / len(self._batches)
        hessian_grad = {name: torch.zeros_like(grad) for name, grad in mean.items()}
        weights = {name: self._subject.parameters[name] for name in self._subject.scored}
        for grads in self._batches:
            smooth = [name for name, grad in grads.items() if grad.requires_grad]
            if not smooth:
                continue
            products = torch.autograd.grad(
                [grads[n] for n in smooth], list(weights.values()), [mean[n] for n in smooth], allow_unused=True
            )
            for name, product in zip(weights, products, strict=True):
                if product is not None:
                    hessian_grad[name] += product.detach() / len(self._batches)
        self._batches.clear()
        return hessian_grad


class _Cooled:
    """While entered, the model's output is divided by a temperature."""

    def __init__(self, model: nn.Module, temperature: float) -> None:
        self._model, self._temperature = model, temperature

    def __enter__(self) -> None:
        self._handle = self._model.register_forward_hook(self._divide)

    def __exit__(self, *error: object) -> None:
        self._handle.remove()

    def _divide(self, module: nn.Module, args: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor) or not output.is_floating_point():
            raise NotSupported(
                f"`hessian_grad` divides the model's output by a temperature, and it is a {type(output).__name__}",
                "one tensor of floating-point numbers is needed, on which the loss depends",
                "wrap the model so that it returns the logits alone",
            )
        return output / self._temperature


def flow(subject: Subject) -> dict[str, Tensor]:
    """`flow`: gradient of `R` to the absolute value of each parameter, by entity, in float64.

    `R` is the sum of the outputs of a copy of the model with absolute weights, for an input of ones in the shape of the
    example. In the copy biases are zero, and batch normalization has mean 0, variance 1 and shift 0. With ReLU or
    identity between the layers `R` is the sum of the products of weights along all paths from input to output. The
    model itself does not run.
    """
    positive = _positive(subject)
    input_of_ones = _ones(subject.inputs)
    weights = dict(positive.named_parameters(remove_duplicate=False))
    parameters = [weights[name] for name in subject.scored]
    with torch.enable_grad():
        total = sum(
            (t.sum() for t in outputs_of(positive, input_of_ones) if t.is_floating_point()),
            torch.zeros((), device="cpu"),
        )
        gradients: Any = (None,) * len(parameters)
        if total.requires_grad:
            gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    _check(float(total.detach()), parameters)
    return {
        name: torch.zeros_like(weight) if grad is None else grad
        for name, weight, grad in zip(subject.scored, parameters, gradients, strict=True)
    }


@torch.no_grad()
def _positive(subject: Subject) -> nn.Module:
    positive = copied(subject.model).double().eval()
    weights = dict(positive.named_parameters(remove_duplicate=False))
    biases = {layer.bias for layer in subject.graph.layers if layer.bias}
    for name, weight in weights.items():
        weight.copy_(torch.zeros_like(weight) if name in biases else weight.abs())
        weight.requires_grad_(True)
    for module in positive.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.reset_running_stats()
            if module.bias is not None:
                module.bias.zero_()
    return positive


def _ones(inputs: Any) -> Any:
    def ones_like(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if not value.is_floating_point():
            raise NotSupported(
                "`flow` runs the model on an input of ones",
                f"the example is of {value.dtype}: token ids and class numbers have no magnitude",
                "use snip, grasp or magnitude for models with embeddings of their inputs",
            )
        return torch.ones_like(value, dtype=torch.float64)

    if inputs is None:
        raise RequestError("`flow` needs an example input", "the copy of the model runs on its shape", "pass inputs=")
    if isinstance(inputs, Mapping):
        return {name: ones_like(value) for name, value in inputs.items()}
    return tuple(map(ones_like, inputs)) if isinstance(inputs, tuple) else ones_like(inputs)


def _check(total: float, weights: Sequence[Tensor]) -> None:
    if not torch.isfinite(torch.tensor(total, device="cpu")):
        raise BadInput(f"the flow through the model is {total:g}", "its weights are too large", "scale them down")
    if total == 0 and not any(bool((weight == 0).any()) for weight in weights):
        raise NotSupported(
            "nothing flows through this model on an input of ones",
            "a normalization, such as layer norm, subtracts the mean of its input",
            "use snip or grasp",
        )
