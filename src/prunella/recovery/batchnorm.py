"""Batch normalization after pruning: the statistics of the dense network do not fit the pruned network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from prunella.errors import CheckFailed, RequestError
from prunella.model.batches import batches
from prunella.model.device import check_float64
from prunella.model.forward import outputs_of, run
from prunella.model.state import losses_in_training_, mode
from prunella.model.trees import tensors
from prunella.model.unwrap import unwrap
from prunella.registry.method import recovery
from prunella.stats.elimination import column_sums
from prunella.types import Loss


@dataclass
class Moments:
    """Count, mean and sum of squared deviations per channel, merged over batches in float64."""

    count: int = 0
    mean: Tensor | float = 0.0
    squares: Tensor | float = 0.0
    calls: int = 0

    def add(self, value: Tensor) -> None:
        rows = value.detach().movedim(1, -1).flatten(0, -2)
        rows = rows.to(rows.dtype if rows.dtype.itemsize >= 4 else torch.float32)
        count, mean = len(rows), column_sums(rows) / len(rows)
        gap = rows - mean.to(rows)
        squares = column_sums(gap.square()) - column_sums(gap).square() / count
        total = self.count + count
        shift = mean - self.mean
        self.squares = self.squares + squares + shift.square() * (self.count * count / total)
        self.mean = self.mean + shift * (count / total)
        self.count, self.calls = total, self.calls + 1


@recovery(source="Wu and Johnson 2021, arXiv:2105.07576 (precise BN); Frantar and Alistarh 2022, arXiv:2208.11580")
def recalibrate_bn(
    model: nn.Module, data: Iterable[Any], *, loss: Loss | None = None, sequential: bool = False
) -> tuple[str, ...]:
    """Compute the running statistics of every batch normalization exactly from data.

    `running_mean` is the mean and `running_var` the unbiased variance of all values of the channel, pooled over all
    batches (not a moving average, and not a mean of variances). Weights, `momentum` and training flags do not change;
    all other modules run in evaluation mode. Returns the names of the changed modules, none if the model has no batch
    normalization.

    data: batches, no labels needed; 500 to 1000 samples are usually enough. loss: how to run the model on one batch,
    by default the model is called on the batch. sequential: False: one pass, in which each layer normalizes by the
    statistics of the batch, as in training. True: one pass per layer, in the order of execution, in which the earlier
    layers already use their new statistics: afterwards the statistics are exactly those of inference.

    `CheckFailed` if the statistics are not finite; the old statistics are then restored.

    Example:

        >>> import torch, prunella as pr
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.BatchNorm1d(2))
        >>> batch = torch.randn(100, 4)
        >>> pr.recalibrate_bn(model, [batch])
        ('1',)
        >>> torch.allclose(model[1].running_mean, model[0](batch).mean(0), atol=1e-6)
        True

    Use: after every pruning of a network with batch normalization; it costs seconds. Avoid: batches of a few samples.
    """
    model = unwrap(model)
    norms = {module: name for name, module in model.named_modules() if _has_statistics(module)}
    if not norms:
        return ()
    data = list(data) if isinstance(data, Iterator) else data  # the batches may be read more than once
    with mode(model, training=False), _restored_on_error(norms), torch.no_grad():
        if not sequential:
            moments = _observe(model, data, list(norms), loss, training=True)
            _write(moments, norms)
            return tuple(norms[module] for module in moments)
        order = list(_observe(model, data, list(norms), loss, training=False))
        for module in order:
            _write(_observe(model, data, [module], loss, training=False), norms)
        return tuple(norms[module] for module in order)


@recovery(source="Ioffe and Szegedy 2015, arXiv:1502.03167")
def absorb_bn(model: nn.Module, data: Iterable[Any], *, loss: Loss | None = None) -> tuple[str, ...]:
    """Give every batch normalization the statistics of `data`, and keep the function of evaluation mode, in place.

    `mean' = mean(x)`, `var' = var(x)`, `gamma' = gamma sqrt((var' + eps) / (var + eps))` and `beta' = beta + gamma
    (mean' - mean) / sqrt(var + eps)`, with x the values that reach the layer in evaluation mode. Training mode, which
    normalizes by the statistics of the batch, then starts from the same function. Returns the names of the changed
    modules. A normalization without scale and bias cannot absorb anything and does not change.

    data: batches, no labels, one pass. loss: how to run the model on one batch; by default the model is called on it.
    `CheckFailed` if the statistics are not finite; nothing has changed then.

    Example:

        >>> import torch, prunella as pr
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.BatchNorm1d(2)).eval()
        >>> batch = torch.randn(100, 4)
        >>> before = model(batch)
        >>> pr.recovery.absorb_bn(model, [batch])
        ('1',)
        >>> torch.allclose(model(batch), before, atol=1e-4), torch.allclose(model.train()(batch), before, atol=0.1)
        (True, True)

    Use: after `reconstruct`, before training. Avoid: right after a cut, where the old statistics are wrong and have to
    be replaced by `recalibrate_bn`.
    """
    model = unwrap(model)
    owners = Counter(id(tensor) for module in model.modules() for tensor in module.parameters(recurse=False))
    norms = {
        module: name
        for name, module in model.named_modules()
        if _has_statistics(module) and _has_affine(module) and owners[id(module.weight)] == owners[id(module.bias)] == 1
    }
    if not norms:
        return ()
    check_float64(model, "statistics are summed")
    data = list(data) if isinstance(data, Iterator) else data
    with mode(model, training=False), torch.no_grad():
        stream = batches(data)
        first = next(stream)
        expected = _outputs(model, first, loss)
        moments = _observe(model, data, list(norms), loss, training=False)
        old = {module: _statistics(module) for module in moments}
        with _restored_on_error(norms):
            _write(moments, norms)
            for module, (mean, variance) in old.items():
                _absorb(module, mean, variance)
            _check_same(model, expected, _outputs(model, first, loss))
    return tuple(norms[module] for module in moments)


def _outputs(model: nn.Module, batch: Any, loss: Loss | None) -> list[Tensor]:
    return outputs_of(model, batch) if loss is None else tensors(run(model, batch, loss))


def _check_same(model: nn.Module, expected: list[Tensor], outputs: list[Tensor]) -> None:
    """Errors: CheckFailed if other code reads the scale, shift or statistics of a norm, or the outputs hold NaN."""
    pairs = [(a.double(), b.double()) for a, b in zip(expected, outputs, strict=True) if a.is_floating_point()]
    largest = max((float(a.abs().max()) for a, _ in pairs if a.numel()), default=0.0)
    error = max((float((a - b).abs().max()) for a, b in pairs if a.numel()), default=0.0)
    coarse = any(p.dtype.itemsize < 4 for p in model.parameters())
    if not error <= (5e-2 if coarse else 5e-3) * largest:
        why = f"the output would change by {error / (largest or 1.0):.1%}: other code reads their parameters"
        raise CheckFailed("the norms cannot absorb the statistics", why, "the model is unchanged; leave absorb_bn out")


def _has_affine(module: nn.Module) -> bool:
    return isinstance(module.weight, Tensor) and isinstance(module.bias, Tensor)


def _statistics(module: nn.Module) -> tuple[Tensor, Tensor]:
    assert isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None
    return module.running_mean.double().clone(), module.running_var.double().clone()


def _absorb(module: nn.Module, mean: Tensor, variance: Tensor) -> None:
    """Change scale and bias so that the new statistics give the function of the old ones."""
    assert isinstance(module, _BatchNorm)
    new_mean, new_variance = _statistics(module)
    scale = module.weight.double() / (variance + module.eps).sqrt()
    module.bias.copy_(module.bias.double() + scale * (new_mean - mean))
    module.weight.copy_(scale * (new_variance + module.eps).sqrt())


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and isinstance(module.running_mean, Tensor)


def _observe(
    model: nn.Module, data: Iterable[Any], modules: list[nn.Module], loss: Loss | None, *, training: bool
) -> dict[nn.Module, Moments]:
    """Moments of the inputs of `modules` over `data`, in the order of the modules' first calls."""
    moments: dict[nn.Module, Moments] = {}

    def observe(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        value = arguments[0]
        if training and value.numel() == value.shape[1]:
            raise RequestError(
                "batch normalization saw a batch with one value per channel",
                "the variance over this batch is not defined",
                "use larger batches, or sequential=True",
            )
        moments.setdefault(module, Moments()).add(value)

    handles = [module.register_forward_pre_hook(observe) for module in modules]
    try:
        for module in modules:
            module.training = training
        for number, batch in enumerate(batches(data)):
            try:
                run(model, batch, loss)
            except Exception:  # whatever a user's loss raises
                if number or not losses_in_training_(model, batch, loss):
                    raise
                for module in modules:
                    module.training = training
                moments.clear()
                run(model, batch, loss)
    finally:
        for handle in handles:
            handle.remove()
        for module in modules:
            module.training = False
    return moments


def as_tensor(value: Tensor | float) -> Tensor:
    """A number as a tensor; a tensor stays where it is, also if the default device is another one."""
    return value if isinstance(value, Tensor) else torch.tensor(value, device="cpu")


def _write(moments: dict[nn.Module, Moments], names: dict[nn.Module, str]) -> None:
    for module, statistics in moments.items():
        assert isinstance(module, _BatchNorm) and module.running_mean is not None and module.running_var is not None
        mean = as_tensor(statistics.mean)
        variance = as_tensor(statistics.squares) / max(statistics.count - 1, 1)
        largest = torch.finfo(module.running_var.dtype).max
        if not bool((torch.isfinite(mean + variance) & (mean.abs() < largest) & (variance < largest)).all()):
            raise CheckFailed(
                f"the inputs of {names[module]} are not finite on the calibration data",
                "the model or the data holds NaN or infinity",
                "check the weights before recalibrating; the old statistics were kept",
            )
        module.running_mean.copy_(mean)
        module.running_var.copy_(variance)
        if module.num_batches_tracked is not None:
            module.num_batches_tracked.fill_(statistics.calls)


@contextmanager
def _restored_on_error(norms: dict[nn.Module, str]) -> Iterator[None]:
    """Restore the statistics after an error: passes in training mode change them."""
    saved = {module: [value.detach().clone() for value in _values(module)] for module in norms}
    try:
        yield
    except BaseException:
        for module, old in saved.items():
            for tensor, value in zip(_values(module), old, strict=True):
                tensor.detach().copy_(value)
        raise


def _values(module: nn.Module) -> list[Tensor]:
    return [*module.buffers(recurse=False), *module.parameters(recurse=False)]
