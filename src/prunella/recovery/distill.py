"""Distillation of the dense model: losses for `finetune`, and `distill`, which trains with one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunella.errors import RequestError
from prunella.model.forward import Outputs, first_tensor, forward, judged
from prunella.model.hooks import removed_after
from prunella.model.state import mode
from prunella.model.unwrap import eager, unwrap
from prunella.recovery.finetune import LossCurve, OnStep, Training, finetune
from prunella.registry.method import recovery
from prunella.types import Loss

_DEFAULT = Training()


@recovery(source="Hinton et al. 2015, arXiv:1503.02531")
def distill_logits(teacher: nn.Module, *, temperature: float = 2.0, outputs: Outputs = forward) -> Loss:
    """A loss on the difference between the logits of a model and those of `teacher`.

    `T^2 * KL(softmax(teacher / T) || softmax(model / T))`, mean over all axes but the last, which holds the classes.
    Zero, with zero gradient, where the logits are equal. The teacher runs in evaluation mode without gradients, and its
    training flags are restored.

    temperature: above 0; a higher one gives the wrong classes more weight. outputs: how to get logits from (model,
    batch), by default the `logits` in the model's output for the batch, else its first tensor with as many rows as the
    batch; for batches with labels for example `lambda model, batch: model(batch[0])`.
    Errors: RequestError for a temperature that is not positive.

    Use: classifiers and language models: the first choice. Avoid: models whose last axis is not classes.
    """
    if temperature <= 0:
        raise RequestError(
            f"temperature={temperature:g} is out of range", "it takes positive numbers", "usual are 1 to 10"
        )

    def loss(model: nn.Module, batch: Any) -> Tensor:
        with mode(teacher, training=False, compiled=True), torch.no_grad():
            expected = first_tensor(judged(outputs(teacher, batch), batch))
        logits = first_tensor(judged(outputs(model, batch), batch))
        _same_shape("the logits", logits, expected)
        expected, logits = (F.log_softmax(t.reshape(-1, t.shape[-1]) / temperature, -1) for t in (expected, logits))
        return F.kl_div(logits, expected, reduction="batchmean", log_target=True) * temperature**2

    return loss


@recovery(source="Romero et al. 2015, arXiv:1412.6550; Sanh et al. 2019, arXiv:1910.01108")
def distill_features(teacher: nn.Module, names: Sequence[str] = ("",), *, outputs: Outputs = forward) -> Loss:
    """A loss on the difference between the outputs of some modules and those of the same modules of `teacher`.

    `mean over names of sum((f - f_teacher)^2) / sum(f_teacher^2)`: relative squared error, so that layers count alike.
    The loss compares the first tensor in the output of a module. Its shape must be that of the teacher: name modules
    whose output axis was not cut. The teacher runs in evaluation mode without gradients. Hooks are removed after each
    call.

    names: module names as in `named_modules()`; "" is the model itself. outputs: how to run (model, batch).

    Use: matching inner layers whose outputs were not cut. Avoid: layers whose output axis was cut: shapes differ.
    """
    for name in names:
        _module(teacher, name)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        with mode(teacher, training=False), torch.no_grad(), _outputs_of(teacher, names) as expected:
            outputs(eager(teacher), batch)
        with _outputs_of(model, names) as features:
            outputs(eager(model), batch)
        total = torch.zeros((), device="cpu")
        for name in names:
            f, t = _output(features, name), _output(expected, name)
            _same_shape(f"the output of {name or 'the model'}", f, t)
            error = (f - t).square().sum() / t.square().sum().clamp_min(torch.finfo(t.dtype).tiny)
            total = total.to(error) + error / len(names)
        return total

    return loss


@recovery(source="Zagoruyko and Komodakis 2017, arXiv:1612.03928")
def distill_attention(
    teacher: nn.Module, names: Sequence[str], *, p: float = 2.0, axis: int = 1, outputs: Outputs = forward
) -> Loss:
    """A loss on the difference between energy maps over positions of a model and those of `teacher`.

    `mean over names and samples of |q / |q| - q_t / |q_t||^2` with `q = sum_c |f_c|^p` over the channels of a module's
    output, one number for each position of a sample. The sum over channels allows to compare layers with pruned
    channels to dense ones. Zero where the maps are proportional.

    names: modules whose first output has samples on axis 0. p: above 0. axis: of the channels, 1 for images, -1 for
    tokens. outputs: how to run (model, batch).

    Data: batches without labels.
    Errors: RequestError for p out of range, or an output without positions.

    Use: with the logits or instead of them, after channel pruning. Avoid: layers with one position: every map is 1.
    """
    if not p > 0:
        raise RequestError(f"p={p:g} is out of range", "it takes positive numbers", "p=2 is usual")
    for name in names:
        _module(teacher, name)

    def maps(name: str, features: Tensor) -> Tensor:
        if features.dim() < 3:
            raise RequestError(f"the output of {name} has no positions", f"its shape is {tuple(features.shape)}")
        energy = features.abs().pow(p).sum(axis).flatten(1)
        return F.normalize(energy, dim=1, eps=torch.finfo(energy.dtype).tiny)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        with mode(teacher, training=False), torch.no_grad(), _outputs_of(teacher, names) as expected:
            outputs(eager(teacher), batch)
        with _outputs_of(model, names) as features_by_name:
            outputs(eager(model), batch)
        total = torch.zeros((), device="cpu")
        for name in names:
            q, t = maps(name, _output(features_by_name, name)), maps(name, _output(expected, name))
            _same_shape(f"the map of {name}", q, t)
            error = (q - t).square().sum(1).mean()
            total = total.to(error) + error / len(names)
        return total

    return loss


def attentions(model: nn.Module, batch: Any) -> Sequence[Tensor]:
    """The `attentions` that a model of transformers returns for a batch (a mapping) with `output_attentions=True`."""
    output = model(**batch, output_attentions=True)
    layers = getattr(output, "attentions", None) or getattr(output, "encoder_attentions", None)
    if not layers or any(layer is None for layer in layers):
        raise RequestError(
            f"{type(model).__name__} returned no attention probabilities",
            "fused attention does not compute them",
            'build the model with attn_implementation="eager", or pass probabilities=',
        )
    return list(layers)


@recovery(source="Wang et al. 2020, arXiv:2002.10957 (attention distributions); Jiao et al. 2020, arXiv:1909.10351")
def distill_attention_probabilities(
    teacher: nn.Module, *, probabilities: Callable[[nn.Module, Any], Sequence[Tensor]] = attentions
) -> Loss:
    """A loss on the difference between the attention probabilities of a transformer and those of `teacher`.

    `mean over layers, heads and queries of KL(teacher || model)`, of tensors `(samples, heads, queries, keys)`. For a
    layer with pruned heads, the loss compares the mean over its heads with the mean over the teacher's heads. Zero with
    zero gradient where the probabilities are equal.

    probabilities: the tensors of (model, batch), one for each layer, rows summing to 1; by default the attentions that
    models of transformers return for `output_attentions=True`.

    Data: batches without labels.
    Errors: RequestError for different numbers of layers or shapes.

    Use: after pruning heads or neurons of a transformer, with few labels. Avoid: after dropping layers: layers are
    compared one to one.
    """

    def loss(model: nn.Module, batch: Any) -> Tensor:
        with mode(teacher, training=False), torch.no_grad():
            expected = probabilities(teacher, batch)
        layers = probabilities(model, batch)
        if len(layers) != len(expected) or not layers:
            raise RequestError(
                f"the model has {len(layers)} layers of attention, the teacher {len(expected)}",
                "layers are compared one to one",
                "pass probabilities= that picks matching layers",
            )
        total = torch.zeros((), device="cpu")
        for layer, (p, t) in enumerate(zip(layers, expected, strict=True)):
            if p.shape[1] != t.shape[1]:
                p, t = p.mean(1, keepdim=True), t.mean(1, keepdim=True)
            _same_shape(f"attention layer {layer}", p, t)
            tiny = torch.finfo(p.dtype).tiny
            error = (t * (t.clamp_min(tiny).log() - p.clamp_min(tiny).log())).sum(-1).mean()
            total = total.to(error) + error / len(layers)
        return total

    return loss


@recovery(
    source="Hinton et al. 2015, arXiv:1503.02531; Muralidharan et al. 2024, arXiv:2407.14679 (after pruning)",
    status="stable",
)
def distill(
    model: nn.Module,
    teacher: nn.Module,
    data: Iterable[Any],
    *,
    steps: int,
    lr: float,
    imitate: Callable[[nn.Module], Loss] = distill_logits,
    training: Training = _DEFAULT,
    on_step: OnStep | None = None,
) -> LossCurve:
    """Fine-tune `model` toward `teacher` without labels: `finetune` with the loss `imitate(teacher)`.

    imitate: a function from the teacher to a loss, by default `distill_logits`; for features bind the names, as
    `partial(distill_features, names=["layer4"])`. training: optimizer, learning-rate schedule, clipping and seed.
    on_step: called after each step with its number, loss and learning rate.

    Example:

        >>> import torch, prunella as pr
        >>> teacher = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)).eval()
        >>> data = [torch.randn(32, 8) for _ in range(4)]
        >>> student = pr.shrink(teacher, pr.plan(teacher, data[0], target=pr.MACs(0.5)))
        >>> curve = pr.distill(student, teacher, data, steps=20, lr=1e-2)  # no labels
        >>> len(curve.loss)
        20

    Use: recovery without labels, with the dense model available. Avoid: a dense model that is poor on the data of
    interest.
    """
    return finetune(model, data, imitate(teacher), steps=steps, lr=lr, training=training, on_step=on_step)


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return unwrap(model).get_submodule(name)
    except AttributeError:
        raise RequestError(
            f"no module is called {name!r}", f"found none in {type(model).__name__}", "see model.named_modules()"
        ) from None


@contextmanager
def _outputs_of(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Name -> first tensor of the module's output, filled while the model runs."""
    tensors: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            tensors[name] = first_tensor(output)

        return hook

    modules = [_module(model, name) for name in names]
    handles = [module.register_forward_hook(keep(name)) for module, name in zip(modules, names, strict=True)]
    with removed_after(handles):
        yield tensors


def _output(tensors: dict[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise RequestError(f"module {name!r} did not run", "it is not used on this batch", "name a module that runs")
    return tensors[name]


def _same_shape(what: str, actual: Tensor, expected: Tensor) -> None:
    if actual.shape != expected.shape:
        raise RequestError(
            f"{what} has shape {tuple(actual.shape)} in the model, {tuple(expected.shape)} in the teacher",
            "this axis was cut",
            "compare outputs that both have",
        )
