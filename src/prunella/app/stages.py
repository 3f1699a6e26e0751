"""The finished stages of a run, in a folder: a killed run resumes from the last of them.

The folder holds a journal, the plan, the state of the model after each step of recovery, and checkpoints of training.
The folder of `run` is hidden next to the output, as `.NAME.run`. It is removed when the run has succeeded or has failed
with a verdict; a kill, Ctrl-C and a full disk leave it. The folder of `prune` is named by the caller and not removed.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from prunella.app.job import Job, Quality
from prunella.app.prune_stages import StageTimer
from prunella.app.record import RECORD
from prunella.errors import (
    BadInput,
    CheckFailed,
    NotSupported,
    OutOfResources,
    PruningError,
    RequestError,
    TargetMissed,
)
from prunella.io.files import check_free, clean_up_after_kill, digest, plain_name
from prunella.io.identity import Identity, identify, model_parts
from prunella.io.journal import NAME, Records, open_journal, open_records
from prunella.io.json import Fields
from prunella.io.lock import locked
from prunella.io.manifest import check_files, entry_of
from prunella.io.nested import load_state, save_state
from prunella.io.plan_file import load_plan, save_plan
from prunella.io.temporary import clean_up, followed
from prunella.model.rng import restore_rng_, rng_state
from prunella.planning.plan import Plan
from prunella.recovery.checkpoint import named_tensors, put_tensors_
from prunella.types import Inputs

FINISHED = "finished"
"""The key of the record written just before the output gets its final name."""
BLOCKS = "blocks"
"""A folder for the work of a planner."""
_OURS = re.compile(
    rf"\.?({re.escape(NAME)}|plan\.safetensors|{BLOCKS}(\.lock|\.new)?|(recovered|random|training|best)-\d+\.safetensors)"
)
"""Names in the folder of the stages; hidden ones are temporary."""
_VERDICTS = (TargetMissed, CheckFailed, RequestError, NotSupported)
"""Errors that the same call would raise again: its stages are removed."""


class Stages:
    """The finished stages, and the means to record more. Without a folder nothing is recorded or read."""

    def __init__(self, folder: Path | None, records: Records, data: Iterable[Any] | None) -> None:
        self._folder, self.records, self._data = folder, records, data

    @property
    def blocks(self) -> Path | None:
        """Where a planner keeps its own unfinished work."""
        return None if self._folder is None else self._folder / BLOCKS

    def plan(self, make: Callable[[], Plan], inputs: Inputs, timer: StageTimer | None = None) -> Plan:
        """The plan, computed or read. timer: receives the entries of its history that belong to the plan."""
        if self._folder is None:
            return make()
        file, timer = self._folder / "plan.safetensors", timer or StageTimer()
        if self._is_done("plan"):
            self._go_on("plan", timer)
            return replace(load_plan(file), inputs=inputs)
        plan = make()
        save_plan(plan, file)
        self._record("plan", file, timer.recorded(0))
        return plan

    def quality(self, name: str, make: Callable[[], Quality]) -> Quality:
        """The quality of a model, evaluated or read."""
        key = f"quality of the {name} model"
        if self._is_done(key):
            self._go_on(key)
            return {name: value.number() for name, value in self.records.fields(key).section("values").values()}
        quality = make()
        self._record(key, None, {"values": dict(quality)})
        return quality

    def recover(
        self,
        number: int,
        small: nn.Module,
        make: Callable[[], Mapping[str, Any]],
        timer: StageTimer | None = None,
    ) -> Mapping[str, Any]:
        """The result of a step of recovery, computed or read, with the model after it; `make` works in place."""
        if self._folder is None:
            return make()
        key, timer = f"recovery {number}", timer or StageTimer()
        file = self._folder / f"recovered-{number:02d}.safetensors"
        if self._is_done(key):
            state = load_state(file)
            put_tensors_(small, state["model"])
            self._go_on(key, timer)
            result = dict(state["told"])
        else:
            before = len(timer.history)
            result = dict(make())
            save_state({"told": result, "model": named_tensors(small)}, file)
            self._record(key, file, timer.recorded(before))
        for unfinished in (self.checkpoint(number), self.best(number)):
            if unfinished is not None:
                unfinished.unlink(missing_ok=True)
        return result

    def checkpoint(self, number: int) -> Path | None:
        """The checkpoint file of a training step."""
        return None if self._folder is None else self._folder / f"training-{number:02d}.safetensors"

    def best(self, number: int) -> Path | None:
        """The file for the best state of a training step so far."""
        return None if self._folder is None else self._folder / f"best-{number:02d}.safetensors"

    def finish(self, record: Path) -> None:
        """Record that the output lacks only its final name; the file `record` in it identifies the output."""
        if self._folder is not None:
            self.records.add(FINISHED, {"record": digest(record)})

    def _is_done(self, key: str) -> bool:
        """Whether a stage was recorded and its files exist. Errors: BadInput if one of them has changed."""
        if self._folder is None or key not in self.records:
            return False
        what, todo = f"a stage in {self._folder} is damaged", f"remove {self._folder} to start again"
        files = Fields(self.records[key], what, todo)
        if not all((self._folder / name).is_file() for name, _ in files.section("files").values()):
            return False
        check_files(self._folder, files)
        return True

    def _record(self, key: str, file: Path | None, payload: Mapping[str, Any]) -> None:
        """Record a finished stage, with its result, the digest of its file and the random states.

        A stage whose files had gone, as with a journal that is newer than they are, is done again; its record stays.
        """
        if self._folder is None:
            return
        random = self._folder / self._random_name(key)
        save_state(rng_state(self._data), random)
        files = {f.name: entry_of(f) for f in (file, random) if f is not None}
        if key in self.records:
            before = self._files_of(key)
            if before == files:
                return
            self._check_again(key, file is not None and before.get(file.name) not in (None, files[file.name]))
        self.records.add(key, {**payload, "files": files, "random": random.name})

    def _random_name(self, key: str) -> str:
        """The file of the random states after a stage, the same whenever the stage is done."""
        if key in self.records:
            return plain_name(self.records.fields(key).text("random"))
        return f"random-{len(list(self.records)):02d}.safetensors"

    def _files_of(self, key: str) -> Mapping[str, Any]:
        return self.records.fields(key).section("files").data

    def _check_again(self, key: str, changed: bool) -> None:
        """Errors: BadInput if a stage came out otherwise than before, and others were done with its result."""
        stages = [name for name in self.records if "random" in self.records[name]]
        if changed and stages[-1] != key:
            what, why = (
                f"the stages in {self._folder} do not fit each other",
                f"the {key} came out otherwise than before",
            )
            raise BadInput(what, why, f"remove {self._folder} to start again")

    def _go_on(self, key: str, timer: StageTimer | None = None) -> None:
        """Restore the random states and the history to those after the stage."""
        if self._folder is not None:
            random = plain_name(self.records.fields(key).text("random"))
            restore_rng_(load_state(self._folder / random), self._data)
        if timer is not None and self._folder is not None:
            timer.go_on(self.records.fields(key))


@contextmanager
def open_kept_stages(folder: Path | None, identify: Callable[[], Identity]) -> Iterator[Stages]:
    """The stages of a call with a folder of the caller; without a folder nothing is stored.

    Errors: those of `open_records`.
    """
    with open_records(folder, identify) as records:
        if folder is not None:
            clean_up(folder)
        yield Stages(folder, records, ())


@contextmanager
def open_stages(output: Path, model: nn.Module, inputs: Inputs, job: Job, *, overwrite: bool) -> Iterator[Stages]:
    """The stages of the run that will write `output`, which is locked.

    Errors: RequestError if another run was not finished, with the differences; those of `open_journal`.
    """
    work = folder_of(output)
    clean_finished(output)
    check_free(output, overwrite=overwrite)
    try:
        identity = identity_of(model, inputs, job)
    except NotSupported:  # data without readable bytes has no identity
        yield Stages(None, Records(None, None), job.data)
        return
    with ExitStack() as stack:
        fresh = not work.exists()
        try:
            records = stack.enter_context(open_records(work, lambda: identity))
        except OutOfResources:
            if fresh:
                shutil.rmtree(work, ignore_errors=True)
            raise
        try:
            yield Stages(work, records, job.data)
        except BaseException as error:
            if not list(records) or isinstance(error, _VERDICTS):
                shutil.rmtree(work)
            raise
        shutil.rmtree(work)


def folder_of(output: Path) -> Path:
    """The folder of the stages of a run."""
    whole = followed(output).absolute()
    return whole.with_name(f".{whole.name}.run")


def identity_of(model: nn.Module, inputs: Inputs, job: Job) -> Identity:
    """Everything that determines the result of a run, each part by its name."""
    how = job.recovery
    asked: dict[str, object] = {"inputs": inputs, "recipe": job.recipe, "target": repr(job.target), "data": job.data}
    asked |= {"loss": job.loss, "recovery": " ".join(map(str, how.steps)), "recovery data": how.data, "lr": how.lr}
    asked |= {"ridge": how.ridge, "imitate": how.imitate, "metric": job.metric, "max_drop": repr(job.max_drop)}
    asked |= {"skip": list(job.skip), "only": list(job.only), "factory": str(job.factory), "source": str(job.source)}
    asked |= {f"planner: {name}": value for name, value in (job.planner.asked if job.planner else {}).items()}
    asked |= {"loadable": job.loadable} if job.loadable else {}
    asked |= {"auto": job.auto, "by hand": {name: dict(chosen) for name, chosen in vars(job.by_hand).items()}}
    return identify({**model_parts(model), **asked})


def clean_finished(output: Path) -> None:
    """Remove the stages of a run that was killed after its output got its name, or before its journal existed."""
    clean_up_after_kill(output)
    work = folder_of(output)
    if not work.is_dir():
        return
    record = output / RECORD
    _check_ours(work)
    with suppress(PruningError), locked(output), locked(work / NAME):
        if not (work / NAME).exists() or (record.is_file() and _finished(work) == digest(record)):
            shutil.rmtree(work)


def _check_ours(work: Path) -> None:
    """Errors: RequestError if the folder holds files that no run wrote: they would be removed with it."""
    foreign = sorted(file.name for file in work.iterdir() if not _OURS.match(file.name))
    if foreign:
        why = f"it holds {foreign[0]}, which prunella did not write"
        raise RequestError(f"{work} is in the way", why, "move it, or choose another output")


def _finished(work: Path) -> str:
    with open_journal(work) as journal:
        known = [journal.known(identity, FINISHED) for identity in journal.identities.values()]
    return next((str(entry["record"]) for entry in known if entry), "")
