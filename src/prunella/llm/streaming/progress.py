"""The finished blocks of a run: a journal in the output folder, from which a killed run resumes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from prunella.errors import BadInput, PruningError, RequestError
from prunella.io.files import check_free, digest, make_folder, reading, swap_in
from prunella.io.identity import Identity, identify
from prunella.io.journal import NAME, Records, open_records
from prunella.io.load import import_transformers
from prunella.io.lock import locked
from prunella.io.record import read_record
from prunella.io.temporary import clean_up, remove_folder
from prunella.io.tensor_file import open_tensors
from prunella.llm.block_problem import Fit
from prunella.llm.distributed import ProcessGroup
from prunella.llm.recipe import OneShot
from prunella.model.device import CPU, device_name

WORK = ".prunella"
"""The folder inside the output that holds the journal while a run is not finished."""
RECORD, CONFIG = "run.json", "config.json"


@dataclass(frozen=True)
class DoneBlock:
    """The journal's record of a finished block: everything that `run.json` says about it, and the digest of its shard.

    refined: errors before and after the gradient steps. strength: the factor of the change, chosen on held-out text.
    """

    fits: tuple[Fit, ...]
    refined: tuple[float, float] | None = None
    strength: float | None = None
    sha256: str = ""


class BlockProgress:
    """The finished blocks; the first process records them.

    folder: the folder of the shards: the output, or a folder next to it while the output holds a finished result.
    """

    def __init__(self, folder: Path, done: Mapping[str, Mapping[str, Any]], records: Records | None) -> None:
        self.folder, self._records = folder, records
        self._done = {path: _read(payload) for path, payload in done.items()}

    def done(self, path: str) -> DoneBlock | None:
        """The record of a block; None if it is not done."""
        return self._done.get(path)

    def check(self, path: str, shard: Path) -> None:
        """Errors: BadInput unless the shard of a finished block is unchanged."""
        what, todo = f"{shard} is damaged", f"remove {self.folder} to start again"
        open_tensors(shard, what=what, todo=todo)  # first: the digest of a 2 GB hole or of a device takes too long
        with reading(shard):
            changed = digest(shard) != self._done[path].sha256
        if changed:
            raise BadInput(what, "it does not have the recorded digest", todo)

    def add(self, path: str, done: DoneBlock, shard: Path) -> None:
        """Record a finished block; its shard is on the disk."""
        self._done[path] = replace(done, sha256=digest(shard))
        if self._records is not None:
            self._records.add(path, asdict(self._done[path]))


@contextmanager
def open_progress(
    output: Path, identify: Callable[[], Identity], group: ProcessGroup, *, overwrite: bool
) -> Iterator[BlockProgress]:
    """The progress of the run that writes `output`, which is locked; the run is complete if the block succeeds.

    overwrite: an existing result is replaced when the new one is complete. Errors, in all processes: RequestError for
    another run, Locked (the first process) for a running one, BadInput for a damaged journal.
    """
    if not group.is_main:
        message = _received()
        yield BlockProgress(Path(message["folder"]), message["done"], None)
        return
    with ExitStack() as stack:
        try:
            folder, records = stack.enter_context(_opened(output, identify, overwrite=overwrite))
            done = {path: records[path] for path in records}
            progress = BlockProgress(folder, done, records)
        except PruningError as error:
            _send({"error": [error.what, error.why, error.todo]}, group)
            raise
        _send({"done": done, "folder": str(folder)}, group)
        yield progress


@contextmanager
def _opened(output: Path, identify: Callable[[], Identity], *, overwrite: bool) -> Iterator[tuple[Path, Records]]:
    make_folder(output.parent)
    with locked(output):
        clean_up(output.parent, of=output)
        beside = folder_beside(output)
        _remove_rests(output, beside)
        check_output(output, overwrite=overwrite)
        folder = beside if is_finished(output) and not (output / WORK).is_dir() else output
        with open_records(folder / WORK, identify) as records:
            yield folder, records
        if folder != output:
            swap_in(folder, output)
        shutil.rmtree(output / WORK)


def folder_beside(output: Path) -> Path:
    """The folder of a new result while the output holds a finished one."""
    absolute = output.absolute()
    return absolute.with_name(f".{absolute.name}.new")


def is_finished(folder: Path) -> bool:
    """Whether a folder holds a complete result: the configuration is written last."""
    return (folder / RECORD).is_file() and (folder / CONFIG).is_file()


def check_output(folder: Path, *, overwrite: bool) -> None:
    """Errors: RequestError unless the folder is empty, belongs to an unfinished run, or may be overwritten."""
    if not (folder / WORK).is_dir():
        check_free(folder, overwrite=overwrite, marker=RECORD)


def _remove_rests(output: Path, beside: Path) -> None:
    """Remove the folders of a run that was killed after its result was complete: its own, or the earlier result."""
    if is_finished(output) and (output / WORK).is_dir() and not (output / WORK / NAME).exists():
        shutil.rmtree(output / WORK)
    if beside.is_dir() and not (beside / WORK / NAME).exists():
        if any(beside.iterdir()) and not (beside / WORK).is_dir() and not (beside / RECORD).is_file():
            raise RequestError(
                f"{beside} is in the way", "prunella did not write it", "move it, or choose another output"
            )
        remove_folder(beside, of=output)


def identity_of(
    source: Path,
    data: Sequence[Any],
    how: OneShot,
    skip: Sequence[str],
    processes: int,
    held_out: Sequence[Any] = (),
    device: torch.device = CPU,
) -> Identity:
    """Everything that determines the result: every byte of the model's files, batches, recipe and versions."""
    files = {kind: sorted(source.glob(f"*.{kind}")) for kind in ("safetensors", "json")}
    digests = {kind: {file.name: digest(file) for file in some if file.is_file()} for kind, some in files.items()}
    others: dict[str, Any] = {"held-out data": list(held_out)} if held_out else {}
    if device != CPU:
        others["device"] = device_name(device)
    return identify(
        {
            **others,
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


def _read(payload: Mapping[str, Any]) -> DoneBlock:
    try:
        fits = tuple(read_record(Fit, fit) for fit in payload["fits"])
        return replace(read_record(DoneBlock, {**payload, "fits": ()}), fits=fits)
    except (KeyError, TypeError, ValueError) as error:
        why = f"{type(error).__name__}: {error}"
        raise BadInput("a record of the run is not a block", why, "choose another folder") from error


def _send(message: dict[str, Any], group: ProcessGroup) -> None:
    """Send a message to the other processes."""
    if group.world_size > 1:
        dist.broadcast_object_list([message], src=0)


def _received() -> dict[str, Any]:
    """The message of the first process: the folder and the finished blocks, or its error, which is raised here too."""
    told: list[Any] = [None]
    dist.broadcast_object_list(told, src=0)
    message: dict[str, Any] = told[0]
    if "error" in message:
        raise RequestError(*message["error"])
    return message
