"""The folder of a run: one complete file for every step that is done, and what the run was, to refuse another one."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from prunella.errors import BadInput, RequestError
from prunella.io.files import write_atomic
from prunella.io.nested import load_state, save_state
from prunella.lottery.session import State

RECORD = "ticket.json"


class Folder:
    """Results by name, made once: from the file if it is there, else by the function, and then written.

    Without a path nothing is written. With one, `settings` must be those of the run that the folder holds.
    """

    def __init__(self, path: str | os.PathLike[str] | None, settings: Mapping[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        if self.path is not None:
            self._open(self.path, dict(settings))

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """The result of that name."""
        file = None if self.path is None else self.path / f"{name}.safetensors"
        if file is not None and file.exists():
            return load_state(file)
        made = make()
        if file is not None:
            save_state(made, file)
        return made

    def _open(self, path: Path, settings: dict[str, Any]) -> None:
        record = path / RECORD
        if record.exists():
            self._compare(record, settings)
            return
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            todo = "choose a new folder, or that of a ticket run to go on with it"
            raise RequestError(f"{path} holds something that is no ticket run", f"it has no {RECORD}", todo)
        path.mkdir(parents=True, exist_ok=True)
        write_atomic(record, json.dumps(settings, indent=1).encode())

    def _compare(self, record: Path, settings: dict[str, Any]) -> None:
        try:
            old = json.loads(record.read_text(encoding="utf-8"))
            other = [key for key in settings if old[key] != settings[key]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadInput(f"{record} is broken", f"{type(error).__name__}: {error}", "choose a new folder") from error
        if other:
            key = other[0]
            raise RequestError(
                f"{record.parent} holds another run: its {key} differs",
                f"there {str(old[key])[:80]}, here {str(settings[key])[:80]}",
                "start from the same weights with the same settings, or choose a new folder",
            )


def digest(state: State) -> str:
    """SHA-256 of names, shapes and bytes of a snapshot."""
    made = hashlib.sha256()
    for name, value in state.items():
        made.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        made.update(value.contiguous().flatten().view(dtype=torch.uint8).numpy().tobytes() if value.numel() else b"")
    return made.hexdigest()
