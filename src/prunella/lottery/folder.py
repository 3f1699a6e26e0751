"""The folder of a run: one complete file for every finished training, and a journal that lists them."""

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
    """Results by name, computed once: read from the file in the journal, or else computed and written."""

    def __init__(self, path: Path | None, records: Records) -> None:
        self._path, self._records = path, records

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """The result of this name. Errors: BadInput if its file has changed."""
        if self._path is None:
            return make()
        file = self._path / f"{name}.safetensors"
        if name in self._records and file.exists():
            if digest(file) != self._records[name].get("digest"):
                why = "it does not have the recorded digest"
                raise BadInput(f"{file} is not a sound state", why, "remove the file to compute it again")
            return load_state(file)
        result = make()
        save_state(result, file)
        self._records.add(name, {"digest": digest(file)})
        return result


@contextmanager
def open_steps(folder: str | os.PathLike[str] | None, identify: Callable[[], Identity]) -> Iterator[Steps]:
    """The steps of the run in a folder, locked inside the `with` block. Without a folder nothing is written.

    Errors: RequestError if the folder holds another run or other files; the errors of `open_journal`.
    """
    path = None if folder is None else Path(folder)
    if path is not None and _is_other(path):
        todo = "choose a new folder, or the folder of a ticket run to resume"
        raise RequestError(f"{path} holds files but no ticket run", f"it has no {NAME}", todo)
    with open_records(path, identify) as records:
        yield Steps(path, records)


def _is_other(path: Path) -> bool:
    """Whether the path exists and is neither an empty folder, a run, nor the remains of a killed run."""
    if not path.is_dir():
        return path.exists()
    names = [file.name for file in path.iterdir()]
    return not {NAME, *FORMER} & set(names) and any(not name.startswith(f".{NAME}") for name in names)
