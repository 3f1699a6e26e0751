"""The kind of file or folder at a path, and the verb that opens it: for errors about a path of the wrong kind."""

from __future__ import annotations

import os
from pathlib import Path

_FOLDERS = (
    ("manifest.json", "a folder that prunella saved", "verify, report and inspect open it"),
    ("config.json", "a Hugging Face folder", "inspect, plan, run and llm open it"),
    ("journal.sqlite", "the folder of a run that resumes", "the call that made it goes on in it"),
)
_MAGIC = (
    (b"SQLite format 3", "the journal of a run", "the call that made it goes on with its folder"),
    (b"PK", "an archive of torch, a program or a checkpoint", "inspect opens FILE.pt2, and --weights takes FILE.pt"),
    (b"GGUF", "a GGUF file", "inspect and plan open it"),
)


def described_path(path: str | os.PathLike[str]) -> str:
    """`it is a plan: show opens it`; `no such file or folder` for a path that does not exist."""
    place = Path(path)
    try:
        kind, verbs = _folder(place) if place.is_dir() else _file(place)
    except OSError as error:
        return "no such file or folder" if not os.path.lexists(place) else f"it cannot be read ({error.strerror})"
    return f"it is {kind}: {verbs}" if verbs else f"it is {kind}"


def _folder(place: Path) -> tuple[str, str]:
    known = next(((kind, verbs) for name, kind, verbs in _FOLDERS if (place / name).is_file()), None)
    return known or ("a folder that holds no model", "")


def _file(place: Path) -> tuple[str, str]:
    if place.exists() and not place.is_file():
        return "no file but a device or a pipe", ""
    with place.open("rb") as file:
        head = file.read(4096)
    if not head:
        return "an empty file", ""
    for magic, kind, verbs in _MAGIC:
        if head.startswith(magic):
            return kind, verbs
    if head[8:9] == b"{" and b'"prunella.plan"' in head:
        return "a plan", "show opens it"
    if head[8:9] == b"{":
        return "a safetensors file", "--weights takes it"
    return "a file of another kind", ""
