"""Evaluations on disk: one JSON line each, on the disk before the next begins, so that a killed search goes on."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunella.errors import BadInput, RequestError


def digest_of(model: nn.Module, asked: object) -> str:
    """Of a question and the weights of a model, so that a journal is not taken for another's."""
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode())
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Journal:
    """Key -> number. Without a folder it remembers for the time of this process only.

    The first line of `journal.jsonl` says what was asked (`identity`); another request finds its folder refused. A last
    line that was cut short by a kill is dropped. Numbers come back bit for bit: JSON has all digits of a float.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, identity: str) -> None:
        self._known: dict[str, float] = {}
        self._path = None if folder is None else Path(folder) / "journal.jsonl"
        self.added = 0
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            sound = self._read(identity) if self._path.exists() else 0
            if self._path.exists():
                os.truncate(self._path, sound)
            if not sound:
                self._append({"asked": identity})
        except OSError as error:
            todo = "check the folder and its permissions"
            raise RequestError(f"cannot write {self._path}", error.strerror or str(error), todo) from error

    def __contains__(self, key: str) -> bool:
        return key in self._known

    def __getitem__(self, key: str) -> float:
        return self._known[key]

    def __setitem__(self, key: str, value: float) -> None:
        self._known[key] = value
        self.added += 1
        if self._path is not None:
            self._append({"key": key, "value": value})

    def _read(self, identity: str) -> int:
        """Read the sound lines; how many bytes they are."""
        assert self._path is not None
        sound = 0
        for number, line in enumerate(self._path.read_bytes().splitlines(keepends=True)):
            try:
                entry: Any = json.loads(line)
                whole = line.endswith(b"\n")
            except ValueError:
                whole = False
            if not whole:
                break
            if number == 0 and entry.get("asked") != identity:
                why = "it holds the results of another model, recipe or question"
                raise RequestError(f"{self._path} is not continued", why, "choose another folder")
            if number:
                try:
                    self._known[entry["key"]] = float(entry["value"])
                except (KeyError, TypeError) as error:
                    raise BadInput(f"{self._path} is damaged in line {number + 1}", str(error), "remove it") from error
            sound += len(line)
        return sound

    def _append(self, entry: dict[str, Any]) -> None:
        assert self._path is not None
        with self._path.open("ab") as file:
            file.write((json.dumps(entry) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
