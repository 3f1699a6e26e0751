"""A measured latency table: it predicts the latency of a candidate without building and timing the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from prunella.errors import RequestError
from prunella.graph.cut.macs import macs_by_layer
from prunella.measure.profile import time_by_layer
from prunella.planning.candidates import CandidateUnits
from prunella.search.space import Space
from prunella.selection import Counts

Clock = Callable[[Mapping[str, nn.Module], Any], Mapping[str, Mapping[str, float]]]
Curve = tuple[tuple[float, ...], tuple[float, ...]]


@dataclass(frozen=True)
class LatencyTable:
    """Milliseconds of every layer by its own multiply-adds, and of the rest of the model by the model's multiply-adds.

    A table is a function of counts: `table(counts)` predicts the milliseconds of the model without these units; pass it
    as `predict=`. The multiply-adds include both widths of a layer, so that coupled widths count. The approximation is
    that the time depends only on the product of both widths, and is linear between the measured widths.
    """

    space: Space
    layers: Mapping[str, Curve]
    rest: Curve

    def __call__(self, counts: Counts) -> float:
        """Predicted milliseconds without these units."""
        own, total = _macs(self.space, counts)
        milliseconds = sum(float(np.interp(own[name], xs, ys)) for name, (xs, ys) in self.layers.items())
        return milliseconds + float(np.interp(total, *self.rest))


def latency_table(
    space: Space, *, ratios: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 0.9), measure: Clock | None = None
) -> LatencyTable:
    """Measure a table: models with all groups pruned to the same ratio, for several ratios, timed layer by layer.

    Source: Yang et al. 2018, arXiv:1804.03230, where each layer is timed alone for a grid of widths; here the layers
    run inside the model, with its caches and its other layers. Times that fall while multiply-adds grow are noise and
    are raised to the previous time. measure: a function of (models by name, inputs) that returns name -> module ->
    seconds; by default `time_by_layer`.
    Errors: RequestError for masks, or ratios out of range.
    """
    candidates = space.candidates
    if not isinstance(candidates, CandidateUnits):
        raise RequestError("masks have no latency table", "dense kernels multiply zeros too", "take Channel()")
    if len(set(ratios)) < 2 or not all(0 <= ratio < 1 for ratio in ratios):
        raise RequestError("a latency table needs at least two ratios in [0, 1)", f"got {tuple(ratios)}")
    cuts = {str(ratio): space.removed(dict.fromkeys(space.names, ratio)) for ratio in sorted(ratios, reverse=True)}
    models = {name: space.cut(counts).eval() for name, counts in cuts.items()}
    clock = measure or time_by_layer
    times = clock(models, space.inputs)
    macs = {name: _macs(space, counts) for name, counts in cuts.items()}
    modules = {layer.entity: layer.module or layer.name for layer in candidates.graph.layers}
    layers, timed = {}, dict.fromkeys(cuts, 0.0)
    for entity, module in modules.items():
        if not all(module in times[name] for name in cuts):
            continue  # the weight is read outside of its module: its time is in the rest
        layers[entity] = _curve([(macs[name][0][entity], times[name][module]) for name in cuts])
        timed = {name: total + times[name][module] for name, total in timed.items()}
    rest_curve = _curve([(macs[name][1], sum(times[name].values()) - timed[name]) for name in cuts])
    return LatencyTable(space, layers, rest_curve)


def _curve(points: Sequence[tuple[float, float]]) -> Curve:
    """A curve with ascending multiply-adds and milliseconds that never fall."""
    xs, ys = zip(*sorted(points), strict=True)
    return tuple(xs), tuple((np.maximum.accumulate(ys) * 1e3).tolist())


def _macs(space: Space, counts: Counts) -> tuple[dict[str, float], float]:
    candidates = space.candidates
    assert isinstance(candidates, CandidateUnits)
    keep = candidates.keep(counts)
    return macs_by_layer(candidates.graph, keep), candidates.graph.macs(keep)
