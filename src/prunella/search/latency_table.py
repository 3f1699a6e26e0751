"""A measured table of latencies: what a cut costs in time, without building and timing every candidate."""

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
    """Milliseconds of every layer as a function of its own multiply-adds, and of the rest of those of the model.

    A table is a function of counts: `table(counts)` predicts the milliseconds of the model without these units, and can
    be passed as `predict=`. Coupled widths are dealt with by the multiply-adds, which see both sides of a layer; that
    time depends on their product alone is the approximation, and it is linear between the measured widths.
    """

    space: Space
    layers: Mapping[str, Curve]
    rest: Curve

    def __call__(self, counts: Counts) -> float:
        """Predicted milliseconds when these units are gone."""
        own, whole = _macs(self.space, counts)
        found = sum(float(np.interp(own[name], xs, ys)) for name, (xs, ys) in self.layers.items())
        return found + float(np.interp(whole, *self.rest))


def latency_table(
    space: Space, *, ratios: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 0.9), measure: Clock | None = None
) -> LatencyTable:
    """Measure a table: models cut alike in all groups, to several ratios, timed layer by layer in turn.

    Source: Yang et al. 2018, arXiv:1804.03230, where layers are timed one by one for a grid of widths; here they run
    inside the model, with its caches and its other layers around them. Times that fall where multiply-adds grow are
    noise, and are levelled out. measure: of (models by name, inputs) -> name -> module -> seconds; `time_by_layer`.
    """
    candidates = space.candidates
    if not isinstance(candidates, CandidateUnits):
        raise RequestError("masks have no latency table", "dense kernels multiply the zeros too", "take Channel()")
    if len(set(ratios)) < 2 or not all(0 <= ratio < 1 for ratio in ratios):
        raise RequestError("a latency table needs at least two ratios in [0, 1)", f"got {tuple(ratios)}")
    cuts = {str(ratio): space.removed(dict.fromkeys(space.names, ratio)) for ratio in sorted(ratios, reverse=True)}
    models = {name: space.cut(counts).eval() for name, counts in cuts.items()}
    clock = measure or time_by_layer
    times = clock(models, space.inputs)
    macs = {name: _macs(space, counts) for name, counts in cuts.items()}
    named = {layer.entity: layer.module or layer.name for layer in candidates.graph.layers}
    layers, spent = {}, dict.fromkeys(cuts, 0.0)
    for entity, module in named.items():
        if not all(module in times[name] for name in cuts):
            continue  # a weight that is read outside of a module: it is part of the rest
        layers[entity] = _curve([(macs[name][0][entity], times[name][module]) for name in cuts])
        spent = {name: total + times[name][module] for name, total in spent.items()}
    rest = _curve([(macs[name][1], sum(times[name].values()) - spent[name]) for name in cuts])
    return LatencyTable(space, layers, rest)


def _curve(points: Sequence[tuple[float, float]]) -> Curve:
    """Ascending in multiply-adds, milliseconds that never fall."""
    xs, ys = zip(*sorted(points), strict=True)
    return tuple(xs), tuple((np.maximum.accumulate(ys) * 1e3).tolist())


def _macs(space: Space, counts: Counts) -> tuple[dict[str, float], float]:
    candidates = space.candidates
    assert isinstance(candidates, CandidateUnits)
    keep = candidates.keep(counts)
    return macs_by_layer(candidates.graph, keep), candidates.graph.macs(keep)
