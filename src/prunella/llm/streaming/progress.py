"""Which blocks of a run are done: a journal in the output folder, which a killed run goes on from."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from prunella.errors import BadInput, PruningError, RequestError
from prunella.io.files import digest
from prunella.io.identity import Identity, identify
from prunella.io.journal import NAME, Records, open_records
from prunella.io.load import import_transformers
from prunella.io.lock import locked
from prunella.llm.distributed import ProcessGroup
from prunella.llm.recipe import OneShot
from prunella.llm.solve_block import Fit

WORK = ".prunella"
"""The folder inside the output that holds the journal while a run is not finished."""


class Progress:
    """Blocks that are done, with their fits, in every process; the first one records them."""

    def __init__(self, done: Mapping[str, Sequence[Fit]], records: Records | None) -> None:
        self._done, self._records = dict(done), records

    def fits(self, path: str) -> list[Fit] | None:
        """What was done to a block, None if it is not done."""
        return list(self._done[path]) if path in self._done else None

    def add(self, path: str, fits: Sequence[Fit]) -> None:
        """A block is done; its shard is on the disk."""
        self._done[path] = list(fits)
        if self._records is not None:
            self._records.add(path, {"fits": [asdict(fit) for fit in fits]})


@contextmanager
def open_progress(
    folder: Path, identify: Callable[[], Identity], group: ProcessGroup, *, overwrite: bool
) -> Iterator[Progress]:
    """The progress of the run in `folder`, which is locked; the journal goes when the block ends well.

    overwrite: remove what is there, unless it is a run that goes on. Errors, in all processes: RequestError for another
    run, Locked (the first process) for one that is under way, BadInput for a damaged journal.
    """
    if not group.is_main:
        yield Progress(_fits(_received()), None)
        return
    with ExitStack() as stack:
        try:
            records = stack.enter_context(_opened(folder, identify, overwrite=overwrite))
            done = {path: records[path] for path in records}
        except PruningError as error:
            _send({"error": [error.what, error.why, error.todo]}, group)
            raise
        _send({"done": done}, group)
        yield Progress(_fits(done), records)


@contextmanager
def _opened(folder: Path, identify: Callable[[], Identity], *, overwrite: bool) -> Iterator[Records]:
    work = folder / WORK
    with locked(work / NAME):
        if overwrite and not (work / NAME).exists():
            _clear(folder)
        with open_records(work, identify) as records:
            yield records
        shutil.rmtree(work)


def identity_of(source: Path, data: Sequence[Any], how: OneShot, skip: Sequence[str], processes: int) -> Identity:
    """All that decides what is written: every byte of the model's files, the batches, the recipe and the versions."""
    files = {kind: sorted(source.glob(f"*.{kind}")) for kind in ("safetensors", "json")}
    digests = {kind: {file.name: digest(file) for file in some} for kind, some in files.items()}
    return identify(
        {
            "weights": digests["safetensors"],
            "configuration": digests["json"],
            "data": list(data),
            "recipe": how,
            "skip": list(skip),
            "processes": processes,
            "threads": torch.get_num_threads(),
            "transformers version": import_transformers().__version__,
        }
    )


def _clear(folder: Path) -> None:
    """Remove what an earlier run wrote; the folder of this one stays, and its lock in it."""
    for entry in folder.iterdir():
        if entry.name != WORK:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def _fits(done: Mapping[str, Any]) -> dict[str, list[Fit]]:
    try:
        return {path: [Fit(**fit) for fit in payload["fits"]] for path, payload in done.items()}
    except (KeyError, TypeError) as error:
        raise BadInput("a record of the run is no fit", f"{error!r}", "choose another folder") from error


def _send(message: dict[str, Any], group: ProcessGroup) -> None:
    """Tell the other processes."""
    if group.world_size > 1:
        dist.broadcast_object_list([message], src=0)


def _received() -> dict[str, Any]:
    """What the first process has told: the blocks that are done, or why it stops, which is then raised here too."""
    told: list[Any] = [None]
    dist.broadcast_object_list(told, src=0)
    message: dict[str, Any] = told[0]
    if "error" in message:
        raise RequestError(*message["error"])
    done: dict[str, Any] = message["done"]
    return done
