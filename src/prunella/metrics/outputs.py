"""Metrics of predictions: flips, divergence, calibration, accuracy per class, pruning-identified exemplars."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from prunella.errors import RequestError
from prunella.registry.method import metric
from prunella.types import Mask

_Z = 1.959963984540054
"""The 97.5 % point of the normal distribution."""


@metric(source="Hooker et al. 2019, arXiv:1911.05248")
def flip_rate(dense: Tensor, pruned: Tensor) -> float:
    """Fraction of the examples whose predicted class changes by pruning.

    `mean(argmax dense != argmax pruned)` for logits `(examples, classes)`. Changes from right to wrong, wrong to right
    and wrong to another wrong all count; accuracy hides most of them. Ties go to the lowest class. Data: logits of both
    models.

    Example:

        >>> import torch, prunella as pr
        >>> dense, pruned = torch.tensor([[2.0, 1.0], [0.0, 1.0]]), torch.tensor([[2.0, 1.0], [1.0, 0.0]])
        >>> pr.metrics.flip_rate(dense, pruned)
        0.5

    Use: always together with accuracy. Avoid: two trainings from different seeds: the seed alone flips predictions.
    """
    _check(dense, pruned)
    return float((dense.argmax(1) != pruned.argmax(1)).double().mean())


@metric(source="Kullback and Leibler 1951, doi:10.1214/aoms/1177729694")
def kl_divergence(dense: Tensor, pruned: Tensor) -> float:
    """Divergence of the pruned model's distribution from the dense model's, in nats, averaged over examples.

    `mean sum_c p_c (log p_c - log q_c)`, p of the dense logits, q of the pruned ones `(examples, classes)`, in float64.
    Data: logits of both models.

    Example:

        >>> import torch, prunella as pr
        >>> logits = torch.tensor([[2.0, 1.0], [0.0, 1.0]])
        >>> pr.metrics.kl_divergence(logits, logits), round(pr.metrics.kl_divergence(logits, -logits), 3)
        (0.0, 0.462)

    Use: differences that do not change the predicted class. Avoid: models whose outputs are not logits.
    """
    _check(dense, pruned)
    first, second = (x.double().log_softmax(1) for x in (dense, pruned))
    return float((first.exp() * (first - second)).sum(1).mean())


@metric(source="Guo et al. 2017, arXiv:1706.04599; equal-mass bins: Nixon et al. 2019, arXiv:1904.01685")
def calibration_error(logits: Tensor, labels: Tensor, *, bins: int = 15, adaptive: bool = False) -> float:
    """Expected calibration error: the mean difference between confidence and accuracy.

    `sum_b (n_b / n) |accuracy_b - confidence_b|`, confidence the largest probability. bins: 1 or more, of equal width
    `(k / bins, (k + 1) / bins]`; adaptive: bins of equal numbers of examples instead, in the order of confidence.
    Data: logits `(examples, classes)` and labels `(examples,)`.
    Errors: RequestError without a bin, or with labels of another length.

    Example:

        >>> import torch, prunella as pr
        >>> logits, labels = torch.tensor([[9.0, 0.0], [9.0, 0.0]]), torch.tensor([0, 1])
        >>> round(pr.metrics.calibration_error(logits, labels), 3)
        0.5

    Use: decisions based on probabilities. Avoid: few examples per bin: the error is then biased upwards.
    """
    _check(logits, logits)
    if bins < 1 or len(labels) != len(logits):
        why = f"got {bins} bins, {len(logits)} examples and {len(labels)} labels"
        raise RequestError("a calibration error needs a bin and a label for each example", why, "for example bins=15")
    confidence, predicted = logits.double().softmax(1).max(1)
    correct = (predicted == labels).double()
    if adaptive:
        order = confidence.argsort(stable=True)
        parts = [part for part in order.tensor_split(bins) if len(part)]
    else:
        bin_of = (confidence * bins).ceil().long().clamp(1, bins) - 1
        parts = [(bin_of == b).nonzero().flatten() for b in range(bins)]
    return float(sum(abs(float((correct[part] - confidence[part]).sum())) for part in parts) / len(labels))


@dataclass(frozen=True)
class ClassDrop:
    """Accuracy on one class. intervals: Wilson's, at 95 %. p: exact test of as many lost as won (McNemar)."""

    label: int
    examples: int
    before: float
    after: float
    interval_before: tuple[float, float]
    interval_after: tuple[float, float]
    p: float

    @property
    def drop(self) -> float:
        """Accuracy lost, between -1 and 1."""
        return self.before - self.after


@metric(source="Hooker et al. 2020, arXiv:2010.03058; interval: Wilson 1927; paired test: McNemar 1947")
def per_class_drop(dense: Tensor, pruned: Tensor, labels: Tensor) -> tuple[ClassDrop, ...]:
    """Loss of accuracy of each class, the largest first, with intervals and a paired test.

    `drop_c = acc_c(dense) - acc_c(pruned)`; interval `(p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)`; p by
    the binomial test of examples lost among lost and won. Ties in the order go to the lowest class.
    Data: logits `(examples, classes)` of both models and labels `(examples,)`.

    Example:

        >>> import torch, prunella as pr
        >>> dense, pruned = torch.eye(2) * 4, torch.tensor([[4.0, 0.0], [4.0, 0.0]])
        >>> pr.metrics.per_class_drop(dense, pruned, torch.tensor([0, 1]))[0].label
        1

    Use: classes of unequal size or importance. Avoid: a single p of many classes.
    """
    _check(dense, pruned)
    from scipy.stats import binomtest

    first, second = (x.argmax(1) == labels for x in (dense, pruned))
    drops = []
    for label in sorted(set(labels.tolist())):
        members = labels == label
        a, b, n = int(first[members].sum()), int(second[members].sum()), int(members.sum())
        lost, won = int((first & ~second & members).sum()), int((~first & second & members).sum())
        p = float(binomtest(lost, lost + won).pvalue) if lost + won else 1.0
        drops.append(ClassDrop(label, n, a / n, b / n, wilson(a, n), wilson(b, n), p))
    return tuple(sorted(drops, key=lambda one: (-one.drop, one.label)))


def wilson(hits: int, n: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion (Wilson 1927)."""
    if n < 1:
        return 0.0, 1.0
    p, square = hits / n, _Z**2
    middle, half = p + square / (2 * n), _Z * math.sqrt(p * (1 - p) / n + square / (4 * n**2))
    return max(0.0, (middle - half) / (1 + square / n)), min(1.0, (middle + half) / (1 + square / n))


@metric(source="Hooker et al. 2019, arXiv:1911.05248")
def pruning_identified_exemplars(dense: Tensor, pruned: Tensor) -> Mask:
    """Examples on which an ensemble of pruned models has another most frequent answer than one of dense models (PIEs).

    `mode_k dense[k] != mode_k pruned[k]`, predicted classes `(models, examples)`, one row for each seed; a tie goes to
    the lowest class. Returns bool `(examples,)`. Data: predictions of several models of each kind.
    Errors: RequestError for predictions of different shapes.

    Example:

        >>> import torch, prunella as pr
        >>> dense, pruned = torch.tensor([[0, 1], [0, 1], [1, 1]]), torch.tensor([[0, 2], [0, 2], [0, 2]])
        >>> pr.metrics.pruning_identified_exemplars(dense, pruned)
        tensor([False,  True])

    Use: finding examples that pruning, and not the seed, changes. Avoid: one model of each kind, which gives plain
    flips.
    """
    if dense.dim() != 2 or pruned.dim() != 2 or dense.shape[1] != pruned.shape[1] or not dense.numel():
        shapes = f"got {tuple(dense.shape)} and {tuple(pruned.shape)}"
        raise RequestError("predictions are (models, examples), of the same examples", shapes, "stack them by seed")
    return _modal(dense) != _modal(pruned)


def _modal(votes: Tensor) -> Tensor:
    """The most frequent class of every column; ties to the lowest class."""
    classes = torch.arange(int(votes.max()) + 1, device=votes.device)
    return (votes.long().unsqueeze(-1) == classes).sum(0).argmax(-1)


def _check(first: Tensor, second: Tensor) -> None:
    if first.dim() != 2 or first.shape != second.shape or not first.numel():
        shapes = f"got {tuple(first.shape)} and {tuple(second.shape)}"
        raise RequestError("logits are (examples, classes), of the same examples", shapes, "flatten other axes first")
