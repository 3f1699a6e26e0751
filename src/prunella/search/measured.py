"""Allocation by measured losses: each group is cut alone, refitted, and the output of the model is compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunella.errors import RequestError
from prunella.graph.data import Group
from prunella.model.batches import batches, listed
from prunella.model.copying import copied
from prunella.model.forward import Outputs, first_tensor, forward, judged_by, real_tokens
from prunella.model.state import mode, untouched
from prunella.planning.candidates import CandidateUnits
from prunella.registry.method import search
from prunella.search.knapsack import knapsack
from prunella.search.replay import MOST, Recording
from prunella.search.scan import OnPoint, Scan
from prunella.search.space import Predict, SearchResult, Space
from prunella.stats import Subject
from prunella.stats.elimination import Quadratic, ReaderOfUnits, Readers, compensated
from prunella.targets import Target
from prunella.types import Mask

LEVELS = (0.0625, 0.1875, 0.375, 0.625, 0.8125)
Distance = Callable[[Any, Any], float]
"""A function of (output of the dense model, output of the pruned model): 0 for equal outputs, larger for worse."""


@search(source="Kurtic et al. 2023, arXiv:2302.04089 (ZipLM); Frantar & Alistarh 2022, arXiv:2201.13096 (SPDY)")
def measured(
    space: Space,
    target: Target,
    judge: Iterable[Any],
    *,
    distance: Distance | None = None,
    levels: Sequence[float] = LEVELS,
    ridge: float = 1e-3,
    predict: Predict | None = None,
    on_point: OnPoint | None = None,
) -> SearchResult:
    """Number of units to remove from each group: the smallest sum of measured losses within the budget.

    `loss_l(x) = mean over judge of distance(dense output, output without the fraction x of group l)`, where the layers
    that read the group have the weights of `prunella.stats.elimination.compensated`, fitted on the data of the space.
    Between the levels the logarithm of the loss is linear, and no loss is below that of a smaller cut. `knapsack`
    chooses. Unmeasured scores are not compared between groups: predicted losses are several times too small, and most
    so in the last layers.

    space: of units, with the data for the fit, best by the criterion `obs_units`. judge: batches that the fit has not
    seen; a hundred images or some thousand tokens. distance: by default the divergence `KL(dense || pruned)` of class
    logits for outputs named logits and for outputs `(samples, classes)` that are not of length one, else one minus the
    cosine. levels: fractions in (0, 1). ridge: of the fit. predict: as in `knapsack`. on_point: called with group,
    fraction and minus the loss.

    The model does not change. Cost: one pass over the data with Gram matrices, and `len(levels)` passes over `judge`
    for each group.
    target: as in `plan`. Errors: RequestError for masks, or numbers out of range.

    Use: channels, neurons and heads with calibration data, followed by `reconstruct`. Avoid: thousands of groups.
    """
    if not isinstance(space.candidates, CandidateUnits) or space.source.data is None:
        raise RequestError(
            "measured needs units and data", "it cuts groups and refits the layers that read them",
            "space(model, inputs, Recipe(criterion=obs_units), data=batches)",
        )  # fmt: skip
    wrong = next((level for level in levels if not 0 < level < 1), None)
    if wrong is not None or not levels or not ridge > 0:
        raise RequestError("measured needs levels between 0 and 1, and a ridge above 0", f"got {wrong}, {ridge:g}")
    measured_curves = _curves(space, listed(judge), distance, levels, ridge, on_point)
    steps = {
        name: every_step(points, space.levels(index), space.sizes[index])
        for index, (name, points) in enumerate(measured_curves.items())
    }
    return knapsack(space, target, Scan(0.0, steps, sum(map(len, measured_curves.values()))), predict=predict)


Curve = list[tuple[float, float]]


def recordings(model: nn.Module, batches: Sequence[Any], run: Outputs = forward) -> list[Recording]:
    """The passes of the dense model over these batches, whose states take at most `MOST` bytes together."""
    return [Recording.of(partial(run, model, batch), MOST // len(batches)) for batch in batches]


def curves(
    passes: Sequence[Recording],
    readers: Readers,
    groups: Sequence[Group],
    masks: Sequence[Mapping[int, Mask]],
    *,
    ridge: float = 1e-3,
    distance: Distance | None = None,
) -> Iterator[tuple[str, float, float]]:
    """Group, fraction removed and loss, point after point, for the cuts `masks` (units removed -> kept) of each group.

    Call it in evaluation mode and without gradients, with readers of the recorded model, which is changed and restored.
    Groups come in the order in which the model reads them; calls before the first changed layer are not repeated.
    Without a distance the passes must return inputs of `judged`.
    """
    compare = distance or distance_of(passes[0].output)
    order = {name: place for place, name in enumerate(readers.order)}
    pairs = [(group, cuts) for group, cuts in zip(groups, masks, strict=True) if cuts]
    pairs.sort(key=lambda pair: order.get(pair[0].name, len(order)))
    weights = [readers.weights(group.name) for group, _ in pairs]
    for number, (group, cuts) in enumerate(pairs):
        for recording in passes:
            recording.keep(map(recording.first, weights[number:]))
        parts = readers.of(group.name)
        for count, keep in cuts.items():
            with _cut(parts, keep, ridge) as changed:
                losses = [_loss(compare, recording, changed) for recording in passes]
            yield group.name, count / group.size, float(np.mean(losses))


def _loss(compare: Distance, recording: Recording, changed: Sequence[Tensor]) -> float:
    """The distance of the changed model. A result that is not finite is computed once more, by the whole model."""
    loss = compare(recording.output, recording.again(changed))
    return loss if math.isfinite(loss) else compare(recording.output, recording.run())


def _curves(
    space: Space,
    judge: Sequence[Any],
    distance: Distance | None,
    levels: Sequence[float],
    ridge: float,
    on_point: OnPoint | None,
) -> dict[str, Curve]:
    """Group -> points (fraction removed, loss), ascending."""
    model = copied(space.model)
    assert isinstance(space.candidates, CandidateUnits)
    groups = space.candidates.groups
    subject = Subject(model, space.candidates.graph, groups=groups)
    points: dict[str, Curve] = {group.name: [] for group in groups}
    with untouched(model, space.recipe.seed), mode(model, training=False), torch.no_grad():
        readers = _fitted(space, subject)
        masks = [_masks(space, index, levels) for index in range(len(groups))]
        passes = recordings(model, judge, judged_by(forward) if distance is None else forward)
        for name, fraction, loss in curves(passes, readers, groups, masks, ridge=ridge, distance=distance):
            points[name].append((fraction, loss))
            if on_point:
                on_point(name, fraction, -loss)
    return points


def _masks(space: Space, index: int, levels: Sequence[float]) -> dict[int, Mask]:
    """Number of removed units -> mask of the kept units of one group."""
    name = space.names[index]
    wanted = sorted({space.removed({name: level})[index] for level in levels} - {0})
    assert isinstance(space.candidates, CandidateUnits)
    nothing = [0] * len(space.names)
    return {n: space.candidates.keep((*nothing[:index], n, *nothing[index + 1 :]))[name] for n in wanted}


def _fitted(space: Space, subject: Subject) -> Readers:
    readers = Readers(subject.parameters, subject.groups)
    assert space.source.data is not None
    for batch in batches(space.source.data):
        with readers.watch(real_tokens(batch)):
            space.source.run(subject.model, batch)
    return readers


@contextmanager
def _cut(parts: Sequence[tuple[ReaderOfUnits, Quadratic]], keep: Mask, ridge: float) -> Iterator[list[Tensor]]:
    """Inside, the readers of a group have compensated weights for the removed units; yields the changed tensors."""
    saved: list[tuple[Tensor, Tensor]] = []

    def change(tensor: Tensor) -> Tensor:
        saved.append((tensor, tensor.clone()))
        return tensor

    try:
        for reader, quadratic in parts:
            weight, constant = compensated(quadratic, keep, ridge=ridge)
            _write(reader, weight, constant, change)
        yield [tensor for tensor, _ in saved]
    finally:
        for tensor, value in reversed(saved):
            tensor.copy_(value)


def _write(reader: ReaderOfUnits, weight: Tensor, constant: Tensor, change: Callable[[Tensor], Tensor]) -> None:
    """Write the weight of one matrix, and its constant to the bias or to the mean of the following norm."""
    read, matrix = reader.read, reader.matrix
    change(read.weight.detach())
    matrices = read.matrices().clone()
    matrices[matrix] = weight.to(matrices)
    read.write_(matrices)
    if read.bias is not None:
        change(read.bias)[matrix] += constant.to(read.bias)
    elif read.norm is not None:
        mean = change(read.norm.mean).view(len(matrices), -1)
        mean[matrix] -= constant.to(mean)


def distance_of(output: Any) -> Distance:
    """Divergence of logits, or one minus the cosine; vectors of length one are embeddings, not logits."""
    if isinstance(getattr(output, "logits", None), Tensor):
        return divergence
    classes = isinstance(output, Tensor) and output.dim() == 2 and output.shape[1] > 1
    return divergence if classes and not _of_length_one(output) else cosine_distance


def _of_length_one(vectors: Tensor) -> bool:
    """Whether all rows have length one, which does not happen to logits by chance."""
    lengths = vectors.detach().double().norm(dim=1)
    return len(lengths) > 1 and bool((lengths - 1).abs().max() < 1e-3)


def name_of(distance: Distance) -> str:
    """A distance in words, with its unit."""
    return "KL divergence in nats" if distance is divergence else "one minus the cosine"


def divergence(dense: Any, pruned: Any, temperature: float = 1.0) -> float:
    """`mean T^2 KL(softmax dense / T || softmax pruned / T)` over all positions, in nats for T = 1.

    The outputs are `(..., classes)`, or have them as `.logits`.
    """
    first, second = (
        (getattr(output, "logits", output).double().flatten(0, -2) / temperature).log_softmax(-1)
        for output in (dense, pruned)
    )
    return temperature**2 * float((first.exp() * (first - second)).sum(-1).mean())


def cosine_distance(dense: Any, pruned: Any) -> float:
    """`mean (1 - cos)` of the first output tensors, sample by sample."""
    first, second = (first_tensor(output).double().flatten(1) for output in (dense, pruned))
    return float(1 - nn.functional.cosine_similarity(first, second).mean())


def every_step(
    points: Sequence[tuple[float, float]], counts: Sequence[int], size: int
) -> tuple[tuple[float, float], ...]:
    """Points (fraction, minus the loss) at every count that the group can lose."""
    if not points:
        return ()
    xs = np.array([x for x, _ in points])
    tiny = 1e-12
    logs = np.log(np.maximum.accumulate([max(loss, tiny) for _, loss in points]))
    slope = (logs[-1] - logs[-2]) / (xs[-1] - xs[-2]) if len(xs) > 1 else 0.0
    curve = []
    for count in counts:
        x = count / size
        if count == 0:
            continue
        if x < xs[0]:
            loss = math.exp(logs[0]) * x / xs[0]
        elif x > xs[-1]:
            loss = math.exp(min(logs[-1] + slope * (x - xs[-1]), 700.0))
        else:
            loss = math.exp(float(np.interp(x, xs, logs)))
        curve.append((x, -loss))
    return tuple(curve)
