"""Prune a Hugging Face folder block by block, into another folder, in the memory of one block."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunella.errors import RequestError
from prunella.io.files import make_folder
from prunella.llm.distributed import processes
from prunella.llm.one_shot import OneShot, Solving
from prunella.llm.streaming import memory as amounts
from prunella.llm.streaming.journal import Journal, fingerprint
from prunella.llm.streaming.runner import OnBlock, Prepared
from prunella.llm.streaming.writer import RECORD, finish
from prunella.model.forward import batches
from prunella.registry.method import solver

WORK = ".prunella"
"""The folder inside the output that holds the journal while a run is not finished."""


@dataclass(frozen=True)
class Streamed:
    """What `solve_folder` wrote. peak: predicted bytes; most: what the process has had, libraries included."""

    path: Path
    solving: Solving
    peak: amounts.Peak
    most: int
    seconds: float
    replayed: int = 0

    def __str__(self) -> str:
        blocks = f", {self.replayed} blocks from an earlier run" if self.replayed else ""
        layers = sum(not fit.skipped for fit in self.solving.fits)
        return (
            f"{self.path}: {layers} layers, sparsity {self.solving.sparsity:.4f} of their weights, "
            f"{self.seconds:.1f} s{blocks}\n"
            f"memory: predicted {self.peak}; the process had at most {amounts.shown(self.most)}"
        )


@dataclass(frozen=True)
class Forecast:
    """What a run will take: memory, bytes on disk, and seconds where a block was measured."""

    blocks: int
    layers: int
    weights: int
    peak: amounts.Peak
    disk: int
    seconds: float | None = None

    def __str__(self) -> str:
        lines = [
            f"{self.blocks} blocks, {self.layers} layers, {self.weights:,} weights in them",
            f"memory: {self.peak}, the stream between blocks {'on disk' if self.peak.on_disk else 'in memory'}",
            f"disk: {amounts.shown(self.disk)}",
        ]
        if self.seconds is not None:
            lines.append(f"time: about {self.seconds:.0f} s, by the first block on two batches")
        return "\n".join(lines)


@solver(source="Frantar and Alistarh 2023, arXiv:2301.00774 (block by block, one in memory)")
def solve_folder(
    source: str | Path,
    output: str | Path,
    how: OneShot,
    *,
    data: Iterable[Any],
    memory: str | int | None = None,
    skip: Sequence[str] = (),
    overwrite: bool = False,
    on_block: OnBlock | None = None,
) -> Streamed:
    """Prune the Hugging Face folder `source` into the folder `output`, with one block in memory at a time.

    The same numbers as `solve_` on the model in memory, bit for bit: the model is built without weights, what each
    block is called with is captured once, then each block is read, pruned, run, written as a shard and let go. The
    index and the configuration are written last, so a folder with them is complete. Killed, the same call goes on at
    the block it was at: finished blocks are read back and run once for the stream. Under torchrun every process calls
    this with the same `data`, takes its share of the batches, and the first one writes.
    Data: batches, no labels, for example `windows` of a text.

    memory: most bytes of the process, as `"4GB"`; the stream goes to disk when it does not fit, and a run that would
    take more is refused before it starts. None: the stream in memory, no check. Errors: RequestError for a folder that
    is taken or another run's, or too little memory; NotSupported where the blocks are not one list run in order.

    Use: models larger than memory. Avoid: models that fit, when they have to be evaluated next: `solve_`.
    """
    start, folder, held = time.perf_counter(), Path(output), list(batches(data))
    _check_output(folder, overwrite=overwrite)
    job = Prepared(Path(source), how, held, processes(), budget=_budget(memory), skip=skip)
    work = folder / WORK
    if job.team.first:
        if overwrite and folder.exists() and not work.is_dir():
            shutil.rmtree(folder)
        make_folder(work)
    job.team.wait()
    journal = Journal(work / "journal.json", fingerprint(job.source, held, how, job.team.count, skip))
    solving, replayed = job.run(folder, journal, on_block)
    seconds = time.perf_counter() - start
    if job.team.first:
        finish(job, folder, solving, seconds)
        shutil.rmtree(work)
    job.team.wait()
    return Streamed(folder, solving, job.peak, amounts.most_resident(), seconds, replayed)


def forecast(
    source: str | Path,
    how: OneShot,
    *,
    data: Iterable[Any],
    memory: str | int | None = None,
    skip: Sequence[str] = (),
    measured: bool = True,
) -> Forecast:
    """What `solve_folder` would take: nothing is written.

    measured: prune the first block, on two batches, for the time: `blocks * (solving + batches * a pass)`.
    Errors: those of `solve_folder`, too little memory above all.
    """
    held = list(batches(data))
    job = Prepared(Path(source), how, held, processes(), budget=_budget(memory), skip=skip)
    layers = [layer for some in job.layers.values() for layer in some]
    weights = sum(job.skeleton.like[layer.entity].numel() for layer in layers)
    disk = sum(stored.size for stored in job.skeleton.stored.values())
    disk += job.stream_bytes * job.copies if job.peak.on_disk else 0
    return Forecast(len(job.paths), len(layers), weights, job.peak, disk, job.measured() if measured else None)


def _budget(memory: str | int | None) -> int | None:
    return None if memory is None else amounts.parse_bytes(memory)


def _check_output(folder: Path, *, overwrite: bool) -> None:
    """RequestError unless the folder is free, or of a run that was not finished."""
    if folder.is_file():
        raise RequestError(f"cannot write the folder {folder}", "a file of that name exists", "choose another name")
    if not folder.exists() or not any(folder.iterdir()) or (folder / WORK).is_dir():
        return
    if not overwrite:
        todo = "choose another name, or pass overwrite=True (--overwrite) to replace it"
        raise RequestError(f"the output folder {folder} exists", "it is not empty, and nothing is overwritten", todo)
    if not (folder / RECORD).is_file():
        why = f"it has no {RECORD}, so prunella did not write it"
        raise RequestError(f"the output folder {folder} is not replaced", why, "remove it yourself, or choose another")
