"""Learn from the dense model: losses for `finetune`, and the loop with one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunella.errors import RequestError
from prunella.model.forward import Outputs, first_tensor, forward
from prunella.model.state import mode
from prunella.model.unwrap import unwrap
from prunella.recovery.finetune import Curve, OnStep, Training, finetune
from prunella.registry.method import recovery
from prunella.types import Loss

_DEFAULT = Training()


@recovery(source="Hinton et al. 2015, arXiv:1503.02531")
def distill_logits(teacher: nn.Module, *, temperature: float = 2.0, outputs: Outputs = forward) -> Loss:
    """A loss that makes the logits of a model like those of `teacher`.

    `T^2 * KL(softmax(teacher / T) || softmax(model / T))`, mean over everything but the last axis, which holds the
    classes. Zero, with zero gradient, where the logits are equal. The teacher runs in evaluation mode without gradients
    and gets its training flags back.

    temperature: above 0; higher looks at the wrong classes more. outputs: how to get logits from (model, batch), by
    default the first tensor of what the model returns for the batch; with labels in the batch for example
    `lambda model, batch: model(batch[0])`.

    Use: classifiers and language models: the first choice. Avoid: models whose last axis is not classes.
    """
    if temperature <= 0:
        raise RequestError(
            f"temperature={temperature:g} is out of range", "it takes positive numbers", "usual are 1 to 10"
        )

    def loss(model: nn.Module, batch: Any) -> Tensor:
        with mode(teacher, training=False), torch.no_grad():
            wanted = first_tensor(outputs(teacher, batch))
        got = first_tensor(outputs(model, batch))
        _same_shape("the logits", got, wanted)
        wanted, got = (F.log_softmax(t.reshape(-1, t.shape[-1]) / temperature, -1) for t in (wanted, got))
        return F.kl_div(got, wanted, reduction="batchmean", log_target=True) * temperature**2

    return loss


@recovery(source="Romero et al. 2015, arXiv:1412.6550; Sanh et al. 2019, arXiv:1910.01108")
def distill_features(teacher: nn.Module, names: Sequence[str] = ("",), *, outputs: Outputs = forward) -> Loss:
    """A loss that makes the outputs of some modules like those of the same modules of `teacher`.

    `mean over names of sum((f - f_teacher)^2) / sum(f_teacher^2)`: relative squared error, so that layers count alike.
    The first tensor that a module returns is compared; its shape must be that of the teacher, so name modules whose
    output axis was not cut. The teacher runs in evaluation mode without gradients. Hooks are removed after each call.

    names: module names as in `named_modules()`; "" is the model itself. outputs: how to run (model, batch).

    Use: matching inner layers whose outputs were not cut. Avoid: layers whose output axis is smaller now: shapes
    differ.
    """
    for name in names:
        _module(teacher, name)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        with mode(teacher, training=False), torch.no_grad(), _outputs_of(teacher, names) as wanted:
            outputs(teacher, batch)
        with _outputs_of(model, names) as got:
            outputs(model, batch)
        total = torch.zeros(())
        for name in names:
            f, t = _ran(got, name), _ran(wanted, name)
            _same_shape(f"the output of {name or 'the model'}", f, t)
            error = (f - t).square().sum() / t.square().sum().clamp_min(torch.finfo(t.dtype).tiny)
            total = total.to(error) + error / len(names)
        return total

    return loss


@recovery(source="Zagoruyko and Komodakis 2017, arXiv:1612.03928")
def distill_attention(
    teacher: nn.Module, names: Sequence[str], *, p: float = 2.0, axis: int = 1, outputs: Outputs = forward
) -> Loss:
    """A loss that makes a model look where `teacher` looks: energy maps over positions, whatever the channels.

    `mean over names and samples of |q / |q| - q_t / |q_t||^2` with `q = sum_c |f_c|^p` over the channels of a module's
    output, one number for each position of a sample. Channels are summed away, so that layers whose channels were cut
    are compared with the whole ones. Zero where the maps are proportional.

    names: modules whose first output has samples on axis 0. p: above 0. axis: of the channels, 1 for images, -1 for
    tokens. outputs: how to run (model, batch).

    Data: batches without labels.

    Use: beside or instead of logits, after channels were cut. Avoid: for layers with one position, where every map is
    1.
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
        with mode(teacher, training=False), torch.no_grad(), _outputs_of(teacher, names) as wanted:
            outputs(teacher, batch)
        with _outputs_of(model, names) as got:
            outputs(model, batch)
        total = torch.zeros(())
        for name in names:
            q, t = maps(name, _ran(got, name)), maps(name, _ran(wanted, name))
            _same_shape(f"the map of {name}", q, t)
            error = (q - t).square().sum(1).mean()
            total = total.to(error) + error / len(names)
        return total

    return loss


def attentions(model: nn.Module, batch: Any) -> Sequence[Tensor]:
    """What a model of transformers returns as `attentions` when the batch (a mapping) asks `output_attentions`."""
    output = model(**batch, output_attentions=True)
    found = getattr(output, "attentions", None) or getattr(output, "encoder_attentions", None)
    if not found or any(layer is None for layer in found):
        raise RequestError(
            f"{type(model).__name__} returned no attention probabilities",
            "fused attention does not compute them",
            'build the model with attn_implementation="eager", or pass probabilities=',
        )
    return list(found)


@recovery(source="Wang et al. 2020, arXiv:2002.10957 (attention distributions); Jiao et al. 2020, arXiv:1909.10351")
def distill_attention_probabilities(
    teacher: nn.Module, *, probabilities: Callable[[nn.Module, Any], Sequence[Tensor]] = attentions
) -> Loss:
    """A loss that makes the attention probabilities of a transformer like those of `teacher`.

    `mean over layers, heads and queries of KL(teacher || model)`, of tensors `(samples, heads, queries, keys)`. Where a
    layer lost heads, the mean over its heads is compared with the mean over the teacher's. Zero with zero gradient
    where they are equal.

    probabilities: the tensors of (model, batch), one for each layer, rows summing to 1; by default what models of
    transformers return for `output_attentions=True`.

    Data: batches without labels.

    Use: after heads or neurons of a transformer were cut and labels are few. Avoid: after layers were dropped, since
    layers are compared one to one.
    """

    def loss(model: nn.Module, batch: Any) -> Tensor:
        with mode(teacher, training=False), torch.no_grad():
            wanted = probabilities(teacher, batch)
        got = probabilities(model, batch)
        if len(got) != len(wanted) or not got:
            raise RequestError(
                f"the model has {len(got)} layers of attention, the teacher {len(wanted)}",
                "they are compared one to one",
                "pass probabilities= that picks matching layers",
            )
        total = torch.zeros(())
        for layer, (p, t) in enumerate(zip(got, wanted, strict=True)):
            if p.shape[1] != t.shape[1]:
                p, t = p.mean(1, keepdim=True), t.mean(1, keepdim=True)
            _same_shape(f"attention layer {layer}", p, t)
            tiny = torch.finfo(p.dtype).tiny
            error = (t * (t.clamp_min(tiny).log() - p.clamp_min(tiny).log())).sum(-1).mean()
            total = total.to(error) + error / len(got)
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
) -> Curve:
    """Fine-tune `model` toward `teacher` without labels: `finetune` with the loss `imitate(teacher)`.

    imitate: a function from the teacher to a loss, by default `distill_logits`; for features bind the names, as
    `partial(distill_features, names=["layer4"])`. training: optimizer, learning-rate curve, clipping and seed.

    Example:

        >>> import torch, prunella as pr
        >>> teacher = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)).eval()
        >>> data = [torch.randn(32, 8) for _ in range(4)]
        >>> student = pr.shrink(teacher, pr.plan(teacher, data[0], target=pr.MACs(0.5)))
        >>> curve = pr.distill(student, teacher, data, steps=20, lr=1e-2)  # no labels
        >>> len(curve.loss)
        20

    Use: recovery without labels, with the dense model at hand. Avoid: when the dense model is poor on the data that
    matters.
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
    """Name -> first tensor that the module returns, filled while the model runs."""
    found: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, arguments: Any, output: Any) -> None:
            found[name] = first_tensor(output)

        return hook

    modules = [_module(model, name) for name in names]
    handles = [module.register_forward_hook(keep(name)) for module, name in zip(modules, names, strict=True)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _ran(found: dict[str, Tensor], name: str) -> Tensor:
    if name not in found:
        raise RequestError(f"module {name!r} did not run", "it is not used on this batch", "name a module that runs")
    return found[name]


def _same_shape(what: str, got: Tensor, wanted: Tensor) -> None:
    if got.shape != wanted.shape:
        raise RequestError(
            f"{what} has shape {tuple(got.shape)} in the model, {tuple(wanted.shape)} in the teacher",
            "this axis was cut",
            "compare outputs that both have",
        )
