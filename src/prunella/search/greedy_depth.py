"""Which blocks go, decided by a measured quality: the cheapest loss first, one block at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prunella.errors import CheckFailed, RequestError
from prunella.io.identity import Identity, identify, model_parts
from prunella.io.journal import Records, open_records
from prunella.model.state import mode, untouched
from prunella.planning.depth import Blocks, find_blocks
from prunella.planning.plan import Plan
from prunella.registry.method import search
from prunella.search.space import Evaluate
from prunella.stats import Source, Subject, collect
from prunella.types import Inputs, Loss

OnTry = Callable[[tuple[str, ...], float], None]
"""Called with the blocks that are gone and the quality without them, for everything that is measured."""


@dataclass(frozen=True)
class Dropped:
    """What `greedy_blocks` chose: the plan, the blocks in the order in which they went, the quality after each.

    tried: evaluations in this process; what a journal knew is not evaluated again.
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
    """Drop blocks one at a time, each time the one without which the measured quality is highest.

    `b_k = argmax_b evaluate(model without b_1 .. b_{k-1}, b)`, ties to the first block. With `among`, each step tries
    only that many of the blocks that stay, those of least block influence in the dense model on `data`: the influence
    alone ranks nearly equal blocks by noise. The models that are evaluated share their weights with `model`.

    evaluate: a function of a model, higher is better, for example `agreement(model, batches, logits=True)` or minus a
    loss on calibration text. count: blocks to drop. folder: of a journal, one record for each evaluation, so that a
    killed search goes on where it was; that of another model or `evaluate` is refused.
    Errors: RequestError for a count or `among` out of range, CheckFailed for a quality that is not a number.

    Use: depth of language models when a minute of forward passes is affordable. Avoid: hundreds of blocks without
    `among`.
    """
    blocks = find_blocks(model, inputs)
    if not 0 < count < len(blocks.paths) or (among is not None and among < 1):
        why = f"there are {len(blocks.paths)} blocks, got count={count} and among={among}"
        raise RequestError("greedy_blocks cannot drop so many", why, "at least 1, and one block stays")
    order = _by_influence(blocks, data) if among is not None else blocks.paths
    gone: list[str] = []
    values: list[float] = []
    with open_records(folder, lambda: _identity(blocks, evaluate)) as records:
        for _ in range(count):
            left = [path for path in order if path not in gone][:among]
            tries = {path: _value(blocks, (*gone, path), evaluate, records, on_try) for path in left}
            best = max(tries, key=lambda path: (tries[path], -blocks.paths.index(path)))
            gone.append(best)
            values.append(tries[best])
        return Dropped(blocks.plan(gone), tuple(gone), tuple(values), records.added)


def _identity(blocks: Blocks, evaluate: Evaluate) -> Identity:
    """Neither `count` nor `among` decides a quality: searches for more blocks share a journal."""
    return identify({**model_parts(blocks.model), "blocks": blocks.paths, "question": "depth", "metric": evaluate})


def _value(blocks: Blocks, gone: tuple[str, ...], evaluate: Evaluate, records: Records, on_try: OnTry | None) -> float:
    value = records.number(" ".join(sorted(gone)), lambda: _measured(blocks, gone, evaluate))
    if on_try:
        on_try(gone, value)
    return value


def _measured(blocks: Blocks, gone: tuple[str, ...], evaluate: Evaluate) -> float:
    small = blocks.without(gone)
    with untouched(small, 0), mode(small, training=False), torch.no_grad():
        value = float(evaluate(small))
    if value != value:
        raise CheckFailed(f"the quality without {', '.join(gone)} is not a number", "", "check evaluate and its data")
    return value


def _by_influence(blocks: Blocks, data: Iterable[Any] | None, loss: Loss | None = None) -> Sequence[str]:
    """The blocks by how much they turn the stream, the least first; those that were not seen last."""
    if data is None:
        raise RequestError("among= needs data=", "block influence is measured on batches", "pass data=batches")
    subject = Subject(blocks.model, blocks.graph, groups=blocks.graph.stacks, inputs=blocks.inputs)
    with untouched(blocks.model, 0):
        found = collect(subject, ("influence",), Source(data, loss)).values["influence"]
    stacks = [(stack.paths, found.get(stack.name)) for stack in blocks.graph.stacks]
    pairs = [(float("inf") if v is None else float(v[k]), p) for paths, v in stacks for k, p in enumerate(paths)]
    return [path for _, path in sorted(pairs, key=lambda pair: pair[0])]
