"""One run over the blocks of a folder: captured, checked, then block after block."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunella.errors import RequestError
from prunella.graph.data import Layer
from prunella.graph.match import check_known, parts
from prunella.graph.matrix import to_matrix
from prunella.llm.blocks import Block, Call, Calls, Keep, uncached
from prunella.llm.distributed import Processes
from prunella.llm.experts import experts_run, in_turns, matrix_of
from prunella.llm.one_shot import Fit, Job, OneShot, Solving
from prunella.llm.streaming import memory as amounts
from prunella.llm.streaming.capture import Captured, capture, layers_of, paths_of
from prunella.llm.streaming.journal import Journal
from prunella.llm.streaming.offload import OnDisk
from prunella.llm.streaming.shards import read_folder, read_header, shard_name, write_shard
from prunella.llm.streaming.skeleton import Skeleton
from prunella.model.forward import forward, mode, tensors
from prunella.model.masks import forget_masks_

_TRAINED = 7
"""Copies of a block that is refined: itself, the dense one, what was saved, the gradient, Adam's two, and a sum."""


@dataclass(frozen=True)
class Step:
    """One block that is done: number `number` of `count`, with its layers. replayed: by an earlier run."""

    path: str
    number: int
    count: int
    fits: tuple[Fit, ...]
    seconds: float
    replayed: bool = False

    def __str__(self) -> str:
        done = [fit for fit in self.fits if not fit.skipped]
        error = sum(fit.error for fit in done) / len(done) if done else 0.0
        how = "was done before" if self.replayed else f"{len(done)} layers, mean error {error:.2%}"
        return f"block {self.number} of {self.count}, {self.path}: {how} ({self.seconds:.1f} s)"


OnBlock = Callable[[Step], None]
"""Called after each block."""


class FromFiles:
    """Feeds blocks that are in memory one at a time: the calls are known, the stream is in `keep`."""

    def __init__(self, model: nn.Module, captured: Captured, keep: Keep) -> None:
        self._model, self._captured, self.keep = model, captured, keep
        self._streams = captured.streams

    def calls(self, block: Block) -> Sequence[Call]:
        """What the block is called with, if all before it have been advanced."""
        return Calls(self._captured.calls[block.path], self._streams)

    def call(self, block: Block, call: Call) -> Any:
        """The block on one of its calls."""
        return call.run(self._model.get_submodule(block.path))

    def advance(self, block: Block, outputs: Sequence[Tensor] | None = None) -> None:
        """Run a block that is done on all its calls, or take its `outputs`; nothing after the last one."""
        if block != self._captured.blocks[-1]:
            made = (tensors(self.call(block, call))[0] for call in self.calls(block))
            self._streams = self.keep(made) if outputs is None else outputs


class Prepared:
    """A run that can start: the model without weights, its blocks and layers, and a peak within the budget."""

    def __init__(
        self,
        source: Path,
        how: OneShot,
        data: Sequence[Any],
        team: Processes,
        *,
        budget: int | None,
        skip: Sequence[str] = (),
    ) -> None:
        self.source, self.how, self.team, self.skip = source, how, team, tuple(skip)
        self.batches, self.data = len(data), team.share(data)
        self.tokens = sum(max((t.numel() for t in tensors(batch)), default=0) for batch in data)
        self.copies = 2 if how.refine is None else 3
        """Streams that exist at a time: into a block and out of it; with refining, those of the dense model too."""
        self.skeleton = Skeleton(source, read_folder(source))
        check_known({part for name in self.skeleton.like for part in parts(name)}, self.skip, ())
        self.paths = paths_of(self.skeleton.model)
        first = self._captured(self.data[:1], list)
        self.layers = self._layers(first)
        self.stream_bytes = len(self.data) * _bytes(first.streams[0])
        self.peak = amounts.largest(partial(self._moments, first), budget)

    def run(self, folder: Path, journal: Journal, on_block: OnBlock | None) -> tuple[Solving, int]:
        """Every block in turn, those in the journal only for the stream; what was done, and how many those were."""
        keep: Keep = partial(OnDisk, folder=folder) if self.peak.on_disk else list
        captured = self._captured(self.data, keep)
        job, replayed = self._job(captured, keep), 0
        for place, block in enumerate(captured.blocks):
            start, before = time.perf_counter(), len(job.fits)
            shard = folder / shard_name(place + 1, len(self.paths) + 1)
            old = journal.fits(block.path)
            if old is not None:
                self._replay(job, block, shard)
                job.fits += old
                replayed += 1
            else:
                self._solve(job, block, shard)
                if self.team.first:
                    journal.add(block.path, job.fits[before:])
            if on_block:
                fits, seconds = tuple(job.fits[before:]), time.perf_counter() - start
                on_block(Step(block.path, place + 1, len(self.paths), fits, seconds, old is not None))
        return Solving(tuple(job.fits), job.refined), replayed

    def measured(self) -> float:
        """Seconds of a whole run, by the first block on two batches: what solving takes, and the rest by batch."""
        some = self.data[:2]
        captured = self._captured(some, list)
        job, block = self._job(captured, list), captured.blocks[0]
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            self._solve(job, block, Path(folder) / "block")
        solving = sum(fit.seconds for fit in job.fits)
        by_batch = (time.perf_counter() - start - solving) / len(some)
        return len(self.paths) * (solving / self.team.count + by_batch * len(self.data))

    def _captured(self, batches: Sequence[Any], keep: Keep) -> Captured:
        with self._quiet(), experts_run(self.skeleton.model, "batched_mm"):
            return capture(self.skeleton, batches, forward, keep)

    def _job(self, captured: Captured, keep: Keep) -> Job:
        feed = FromFiles(self.skeleton.model, captured, keep)
        return Job(self.skeleton.model, self.how, feed, None, sum(map(len, self.layers.values())), self.team)

    def _solve(self, job: Job, block: Block, shard: Path) -> None:
        """Read, prune and write one block."""
        names = self.skeleton.names_in(block.path)
        self.skeleton.fill_(names)
        with self._quiet(), experts_run(self.skeleton.model, "eager"):
            job.block(block, self.layers[block.path])
        if self.team.first:
            write_shard(shard, self.skeleton.values(names))
        forget_masks_(self.skeleton.model)
        self.skeleton.empty_(names)

    def _replay(self, job: Job, block: Block, shard: Path) -> None:
        """Run a block of an earlier run for its outputs."""
        names, stored = self.skeleton.names_in(block.path), read_header(shard)
        with self._quiet(), experts_run(self.skeleton.model, "eager"):
            if self.how.refine is not None:
                self.skeleton.fill_(names)
                job.wanted(block, job.feed.calls(block))
            self.skeleton.fill_(names, stored)
            job.feed.advance(block)
        self.skeleton.empty_(names)

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        with mode(self.skeleton.model, training=False), uncached(self.skeleton.model), torch.no_grad():
            yield

    def _layers(self, first: Captured) -> dict[str, list[Layer]]:
        found = {}
        for path in self.paths:
            call = Calls(first.calls[path], first.streams)[0]
            with self._quiet():
                some = layers_of(self.skeleton.model, path, call, self.skip)
            found[path] = [
                layer
                for layer, routes in some.items()
                if self._within(layer, path)
                and self.how.of(layer) is not None
                and (not routes or self.how.names(layer))
            ]
        if not any(found.values()):
            raise RequestError("there is no layer to prune", "skip=, or the mapping of sparsities, leaves none", "")
        return found

    def _within(self, layer: Layer, path: str) -> bool:
        """Whether the weight lives in the block; one that is shared with the outside does not."""
        return all(alias.startswith(f"{path}.") for alias in self.skeleton.aliases[layer.entity])

    def _moments(self, first: Captured, on_disk: bool) -> list[amounts.Peak]:
        """What is in memory while what surrounds the blocks runs, and while each kind of block is solved."""
        base = amounts.resident() + amounts.BUFFERS
        stream, refining = 0 if on_disk else self.stream_bytes, self.how.refine is not None
        around = sum(stored.size for stored in self.skeleton.around())
        found = [amounts.Peak({"process": base, "around the blocks": around, "stream": stream}, on_disk)]
        seen = set()
        for path in self.paths:
            shapes = tuple(self.skeleton.like[name].shape for name in self.skeleton.names_in(path))
            if shapes not in seen:
                seen.add(shapes)
                size = sum(_bytes(self.skeleton.like[name]) for name in self.skeleton.names_in(path))
                sizes = {
                    "process": base,
                    "block": size * (1 if not refining else _TRAINED),
                    "stream": stream * self.copies,
                    "conversion": 2 * self.skeleton.converted(self.skeleton.names_in(path)),
                    "constants": first.constants,
                    "work": self._work(path, Calls(first.calls[path], first.streams)[0]),
                }
                found.append(amounts.Peak(sizes, on_disk))
        return found

    def _likes(self, path: str) -> Iterator[tuple[Layer, Tensor]]:
        """The layers of a block, each with a weight of its shape."""
        for layer in self.layers[path]:
            yield layer, self.skeleton.like[layer.entity]

    def _work(self, path: str, call: Call) -> int:
        """The most beside the weights: a pass with what the layers read and give, or a solver with its Gram matrix."""
        stream = call.stream
        module = self.skeleton.model.get_submodule(path)
        with self._quiet(), experts_run(self.skeleton.model, "batched_mm"):
            passing = amounts.forward_bytes(module, call, trained=self.how.refine is not None)
        turns = [(like, layer, next(in_turns(like, layer))) for layer, like in self._likes(path)]
        sides = [to_matrix(*matrix_of(like, layer, parts[0])).shape for like, layer, parts in turns]
        reads = stream.shape[:-1].numel() * sum(map(sum, sides)) * stream.element_size()
        gram = max((16 * s[1] ** 2 * len(parts) for s, (_, _, parts) in zip(sides, turns, strict=True)), default=0)
        solving = max((amounts.solver_bytes(self.how, *side) for side in set(sides)), default=0)
        return int(amounts.MARGIN * max(passing + max(reads, gram), solving))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
