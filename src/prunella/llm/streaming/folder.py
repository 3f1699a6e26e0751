"""Prune a Hugging Face folder block by block into another folder, with one block in memory: `solve_folder`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from prunella.io.files import clean_up_after_kill
from prunella.io.space import check_apart, check_folder_of_weights, check_space
from prunella.io.temporary import followed
from prunella.llm.blockwise import Solving
from prunella.llm.calibration import AUTO, Calibration, Sources, Split, as_calibration, split
from prunella.llm.distributed import process_group
from prunella.llm.recipe import OneShot
from prunella.llm.streaming import memory as amounts
from prunella.llm.streaming.progress import BlockProgress, check_output, identity_of, is_finished, open_progress
from prunella.llm.streaming.runner import OnBlock, StreamingRun
from prunella.llm.streaming.texts import drawn_for, placeholder, recorded, write_texts
from prunella.llm.streaming.writer import Close, finish
from prunella.measure.clock import now, since
from prunella.measure.text import byte_size
from prunella.model.batches import listed
from prunella.model.device import CPU, device_is_full, short_of_memory
from prunella.registry.method import solver


@dataclass(frozen=True)
class Streamed:
    """The result of `solve_folder`. peak: predicted bytes; most: the peak of the process, libraries included."""

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
            f"memory: predicted {self.peak}; the process had at most {byte_size(self.most)}"
        )


@dataclass(frozen=True)
class Forecast:
    """Predicted cost of a run: memory, bytes on disk, and seconds if the first block was measured.

    there: memory of the accelerator, if the blocks are on one.
    """

    blocks: int
    layers: int
    weights: int
    peak: amounts.Peak
    disk: int
    seconds: float | None = None
    there: amounts.Peak | None = None

    def __str__(self) -> str:
        lines = [
            f"{self.blocks} blocks, {self.layers} layers, {self.weights:,} weights in them",
            f"memory: {self.peak}, hidden states between blocks {'on disk' if self.peak.on_disk else 'in memory'}",
            f"disk: {byte_size(self.disk)}",
        ]
        if self.there is not None:
            lines.append(f"memory of the device: {self.there}")
        if self.seconds is not None:
            lines.append(f"time: about {self.seconds:.0f} s, measured on the first block and two batches")
        return "\n".join(lines)


@solver(source="Frantar and Alistarh 2023, arXiv:2301.00774 (block by block, one in memory)")
def solve_folder(
    source: str | Path,
    output: str | Path,
    how: OneShot,
    *,
    data: Iterable[Any] | Calibration | Sources | Split = AUTO,
    memory: str | int | None = None,
    skip: Sequence[str] = (),
    overwrite: bool = False,
    on_block: OnBlock | None = None,
    device: torch.device | str = CPU,
) -> Streamed:
    """Prune the Hugging Face folder `source` into the folder `output`, with one block in memory at a time.

    The weights are those of `solve_` on the model in memory, bit for bit. The model is built without weights and the
    arguments of all blocks are captured once; then each block is read, pruned, run, written as a shard and freed. The
    index and the configuration are written last: a folder that has them is complete. After a kill, the same call
    resumes at the unfinished block; finished blocks run forward once for the hidden states. Under torchrun every
    process calls this with the same `data` and takes its shard of the batches, and the process of rank 0 writes.
    Data: batches, no labels, for example samples of a text; without any, text that the model writes itself.

    data: as for `solve_`. The model's own text is stored in the output, in `calibration.json` and `calibration.txt`,
    and a resumed run reads it from there; to write it, the full model is in memory. memory: the most bytes of the
    process, such as `"4GB"`; hidden states are stored on disk if they do not fit, and a run that would need more is
    refused before it starts. None: hidden states in memory, no check. Errors: RequestError if the folder exists or
    belongs to another run, or for too little memory; NotSupported if the blocks are not entries of one list, run in
    order.
    how: as in `solve_`. overwrite: replace an existing result. on_block: called after each block. device: where blocks
    run and are solved, one at a time; hidden states wait in the memory of the process, and are copied while the device
    works. Errors: OutOfResources if the device has too little memory for a block.

    Use: models larger than memory. Avoid: models that fit, if they are evaluated next: `solve_`.
    """
    return solve_and_close(
        source, output, how, data=data, memory=memory, skip=skip, overwrite=overwrite, on_block=on_block, close=None,
        device=device,
    )  # fmt: skip


def solve_and_close(
    source: str | Path,
    output: str | Path,
    how: OneShot,
    *,
    data: Iterable[Any] | Calibration | Sources | Split,
    memory: str | int | None,
    skip: Sequence[str],
    overwrite: bool,
    on_block: OnBlock | None,
    close: Close | None,
    device: torch.device | str = CPU,
) -> Streamed:
    """`solve_folder`. close: judges the result before it is complete, and adds to its card and record."""
    start, folder, group, device = now(), followed(output), process_group(), torch.device(device)
    if group.is_main:
        clean_up_after_kill(folder)
    check_output(folder, overwrite=overwrite)
    check_apart(folder, source)
    if group.is_main:
        check_folder_of_weights(folder)
    parts = split(data)
    calibration, drawn = as_calibration(parts.data), None
    if calibration is not None:
        drawn = drawn_for(calibration, Path(source), folder, budget=_budget(memory), group=group, device=device)
    samples: list[Any] = listed(cast(Iterable[Any], parts.data)) if drawn is None else list(drawn.batches)
    run = StreamingRun(
        Path(source), how, samples, group, budget=_budget(memory), skip=skip, held_out=parts.held_out, device=device
    )
    asked = partial(identity_of, run.source, samples, how, skip, group.world_size, run.held_out, device)
    written = sum(file.stat().st_size for file in folder.glob("model-*.safetensors") if not is_finished(folder))
    check_space(folder, run.disk - written)
    with open_progress(folder, asked, group, overwrite=overwrite) as progress:
        if calibration is not None and drawn is not None and group.is_main:
            write_texts(progress.folder, calibration, drawn, run.source)
        solving, replayed = _run(run, progress, on_block)
        seconds, most = since(start), amounts.most_resident()  # before both models are judged
        if group.is_main:
            finish(run, progress.folder, solving, seconds, recorded(drawn), close)
    group.barrier()
    return Streamed(folder, solving, run.peak, most, seconds, replayed)


def _run(run: StreamingRun, progress: BlockProgress, on_block: OnBlock | None) -> tuple[Solving, int]:
    """Errors: OutOfResources where the accelerator is out of memory; finished blocks are kept."""
    try:
        return run.run(progress, on_block)
    except RuntimeError as error:
        if run.device == CPU or not short_of_memory(error):
            raise
        raise device_is_full(error, f"{run.device} is out of memory in a block") from error


def forecast(
    source: str | Path,
    how: OneShot,
    *,
    data: Iterable[Any] | Calibration | Sources | Split = AUTO,
    memory: str | int | None = None,
    skip: Sequence[str] = (),
    measured: bool = True,
    device: torch.device | str = CPU,
) -> Forecast:
    """Predict memory, disk and time of `solve_folder`. Nothing is written.

    measured: predict the time, `blocks * (solving + batches * a pass)`, by pruning the first block on two batches.
    Errors: those of `solve_folder`, above all RequestError for too little memory.
    """
    parts = split(data)
    drawn = as_calibration(parts.data)
    samples: list[Any] = (
        listed(cast(Iterable[Any], parts.data)) if drawn is None else list(placeholder(drawn, Path(source)).batches)
    )
    group, budget = process_group(), _budget(memory)
    where = torch.device(device)
    run = StreamingRun(
        Path(source), how, samples, group, budget=budget, skip=skip, held_out=parts.held_out, device=where
    )
    layers = [layer for some in run.layers.values() for layer in some]
    weights = sum(run.skeleton.like[layer.entity].numel() for layer in layers)
    seconds = run.measured() if measured else None
    return Forecast(len(run.paths), len(layers), weights, run.peak, run.disk, seconds, run.there)


def _budget(memory: str | int | None) -> int | None:
    return None if memory is None else amounts.parse_bytes(memory)
