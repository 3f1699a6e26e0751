"""The folder of a run: a complete file for every training that is done, and a journal that says which are."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prunella.errors import BadInput, RequestError
from prunella.io.files import digest
from prunella.io.identity import Identity
from prunella.io.journal import FORMER, NAME, Records, open_records
from prunella.io.nested import load_state, save_state


class Steps:
    """Results by name, made once: from the file that the journal names, else by the function, and then written."""

    def __init__(self, path: Path | None, records: Records) -> None:
        self._path, self._records = path, records

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """The result of that name. Errors: BadInput when its file is not the one that was written."""
        if self._path is None:
            return make()
        file = self._path / f"{name}.safetensors"
        if name in self._records and file.exists():
            if digest(file) != self._records[name].get("digest"):
                why = "it does not have the recorded digest"
                raise BadInput(f"{file} is no sound state", why, "remove the file to make it again")
            return load_state(file)
        made = make()
        save_state(made, file)
        self._records.add(name, {"digest": digest(file)})
        return made


@contextmanager
def open_steps(folder: str | os.PathLike[str] | None, identify: Callable[[], Identity]) -> Iterator[Steps]:
    """The steps of the run in a folder, locked while the block runs. Without a folder nothing is written.

    Errors: RequestError when the folder holds another run, or something that is none; those of `open_journal`.
    """
    path = None if folder is None else Path(folder)
    if path is not None and _is_other(path):
        todo = "choose a new folder, or that of a ticket run to go on with it"
        raise RequestError(f"{path} holds something that is no ticket run", f"it has no {NAME}", todo)
    with open_records(path, identify) as records:
        yield Steps(path, records)


def _is_other(path: Path) -> bool:
    """Whether something is there that is neither an empty folder, a run, nor what a run leaves when it is killed."""
    if not path.is_dir():
        return path.exists()
    names = [file.name for file in path.iterdir()]
    return not {NAME, *FORMER} & set(names) and any(not name.startswith(f".{NAME}") for name in names)
