"""Greedy depth pruning: blocks are dropped one at a time, by the measured quality without them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prunella.errors import RequestError
from prunella.io.identity import Identity, identify, model_parts
from prunella.io.journal import Records, open_records
from prunella.model.state import mode, untouched
from prunella.model.user_code import quality_of
from prunella.planning.depth import Blocks, find_blocks
from prunella.planning.plan import Plan
from prunella.registry.method import search
from prunella.search.space import Evaluate
from prunella.stats import Source, Subject, collect
from prunella.types import Inputs, Loss

OnTry = Callable[[tuple[str, ...], float], None]
"""Called after each evaluation with the dropped blocks and the quality without them."""


@dataclass(frozen=True)
class Dropped:
    """The result of `greedy_blocks`: the plan, the dropped blocks in order, and the quality after each.

    tried: evaluations in this process, without those from the journal.
    """

    plan: Plan
    paths: tuple[str, ...]
    values: tuple[float, ...]
    tried: int

    def __str__(self) -> str:
        return "\n".join(f"{path}: {value:.6g}" for path, value in zip(self.paths, self.values, strict=True))


@search(
    source="Men et al. 2024, arXiv:2403.03853 (pre-filter); Zhong et al. 2024, arXiv:2406.02924 (one by one, by loss)",
    status="stable",
)
def greedy_blocks(
    model: nn.Module,
    inputs: Inputs,
    evaluate: Evaluate,
    *,
    count: int,
    data: Iterable[Any] | None = None,
    among: int | None = None,
    folder: str | os.PathLike[str] | None = None,
    on_try: OnTry | None = None,
) -> Dropped:
    """Drop blocks one at a time, each time the block without which the measured quality is highest.

    `b_k = argmax_b evaluate(model without b_1 .. b_{k-1}, b)`, ties to the first block. With `among`, each step tries
    only this number of remaining blocks: those with the smallest block influence in the dense model on `data`. The
    influence alone ranks nearly equal blocks by noise. The evaluated models share their weights with `model`.

    evaluate: a function of a model, higher is better, for example `agreement(model, batches, logits=True)` or minus a
    loss on calibration text. count: blocks to drop. folder: of a journal with one record for each evaluation; a killed
    search resumes from it, and the journal of another model or `evaluate` is refused.
    Errors: RequestError for a count or `among` out of range, BadInput for a quality that is not a number.
    on_try: called after each evaluation with the dropped blocks and the quality.

    Use: depth of language models, with a minute for forward passes. Avoid: hundreds of blocks without `among`.
    """
    blocks = find_blocks(model, inputs)
    if not 0 < count < len(blocks.paths) or (among is not None and among < 1):
        why = f"there are {len(blocks.paths)} blocks, got count={count} and among={among}"
        raise RequestError("greedy_blocks cannot drop so many", why, "drop at least 1 block and keep at least 1")
    order = _by_influence(blocks, data) if among is not None else blocks.paths
    dropped: list[str] = []
    values: list[float] = []
    with open_records(folder, lambda: _identity(blocks, evaluate)) as records:
        for _ in range(count):
            remaining = [path for path in order if path not in dropped][:among]
            tries = {path: _value(blocks, (*dropped, path), evaluate, records, on_try) for path in remaining}
            best = max(tries, key=lambda path: (tries[path], -blocks.paths.index(path)))
            dropped.append(best)
            values.append(tries[best])
        return Dropped(blocks.plan(dropped), tuple(dropped), tuple(values), records.added)


def _identity(blocks: Blocks, evaluate: Evaluate) -> Identity:
    """Everything that determines a quality, without `count` and `among`: searches for more blocks share a journal."""
    return identify({**model_parts(blocks.model), "blocks": blocks.paths, "question": "depth", "metric": evaluate})


def _value(
    blocks: Blocks, dropped: tuple[str, ...], evaluate: Evaluate, records: Records, on_try: OnTry | None
) -> float:
    value = records.number(" ".join(sorted(dropped)), lambda: _measured(blocks, dropped, evaluate))
    if on_try:
        on_try(dropped, value)
    return value


def _measured(blocks: Blocks, dropped: tuple[str, ...], evaluate: Evaluate) -> float:
    small = blocks.without(dropped)
    with untouched(small, 0), mode(small, training=False), torch.no_grad():
        value = evaluate(small)
    return quality_of(value, "evaluate=", f"the model without {', '.join(dropped)}", dense=False)


def _by_influence(blocks: Blocks, data: Iterable[Any] | None, loss: Loss | None = None) -> Sequence[str]:
    """The blocks by their block influence, the smallest first; blocks that did not run come last."""
    if data is None:
        raise RequestError("among= needs data=", "block influence is measured on batches", "pass data=batches")
    subject = Subject(blocks.model, blocks.graph, groups=blocks.graph.stacks, inputs=blocks.inputs)
    with untouched(blocks.model, 0):
        influence = collect(subject, ("influence",), Source(data, loss)).values["influence"]
    stacks = [(stack.paths, influence.get(stack.name)) for stack in blocks.graph.stacks]
    pairs = [(float("inf") if v is None else float(v[k]), p) for paths, v in stacks for k, p in enumerate(paths)]
    return [path for _, path in sorted(pairs, key=lambda pair: pair[0])]
