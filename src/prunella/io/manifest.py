"""The manifest of an artifact: written last, with the digest of every other file and one of itself."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from prunella._version import __version__
from prunella.errors import BadInput
from prunella.io.files import MARKER, digest, plain_name
from prunella.io.json import Fields, encode, read_object, write_json
from prunella.io.kind_of_path import described_path
from prunella.io.untrusted import check_links

FORMAT = 2
"""Format 1 had no digest of the manifest itself, and did not list `run.json` and the report of a run."""
_OWN = "sha256"


def write_sealed(path: str | os.PathLike[str], content: Mapping[str, Any]) -> Path:
    """Write an object with the digest of its own text, under the key `sha256`."""
    return write_json(path, {**content, _OWN: _digest_of(content)}, allow_nan=True)


def read_sealed(path: Path, *, what: str, todo: str, required: bool = True) -> Fields:
    """The object that `write_sealed` wrote. Errors: BadInput if any byte has changed.

    required: False also accepts files of earlier versions, without a digest.
    """
    fields = read_object(path, what=what, todo=todo, allow_nan=True)
    if _OWN not in fields.data and not required:
        return fields
    content = {key: value for key, value in fields.data.items() if key != _OWN}
    told = fields.text(_OWN)
    same_text = path.read_bytes() == f"{encode(fields.data, allow_nan=True)}\n".encode()
    if told != _digest_of(content) or not same_text:
        raise BadInput(what, f"{path.name} does not have the recorded digest of itself: it was changed", todo)
    return Fields(content, what, todo)


def _digest_of(content: Mapping[str, Any]) -> str:
    return f"sha256:{sha256(encode(content, allow_nan=True).encode()).hexdigest()}"


def listed(folder: Path, *, besides: Sequence[str] = ()) -> dict[str, Any]:
    """Size and digest of every file in a folder, except for those written later."""
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.name not in besides)
    return {file.name: entry_of(file) for file in files}


def entry_of(file: Path) -> dict[str, Any]:
    """Size and digest of a file, as `check_files` reads them."""
    return {"sha256": digest(file), "bytes": file.stat().st_size}


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest of a folder that is otherwise complete."""
    content = {**manifest, "format": FORMAT, "files": listed(folder)}
    write_sealed(folder / MARKER, content)


def read_manifest(folder: Path) -> Fields:
    """The manifest of an artifact. Errors: BadInput when there is none, it is broken, changed, or of a newer format."""
    file = folder / MARKER
    check_links(folder)
    if not file.is_file():
        why = described_path(folder) if folder.exists() else "there is no such folder"
        why = f"it has no {MARKER}; {why}" if folder.is_dir() else why
        raise BadInput(f"{folder} is not a finished artifact of prunella", why, "write it again with prunella.save")
    # Configurations of transformers may hold infinities, so a manifest may too.
    what, todo = f"the manifest of {folder} is broken and cannot be read", "write the artifact again with prunella.save"
    version = read_object(file, what=what, todo=todo, allow_nan=True).integer("format", low=1)
    if version > FORMAT:
        why = f"it has format {version}, this prunella ({__version__}) reads up to {FORMAT}"
        raise BadInput(f"{folder} was written by a newer prunella", why, "update prunella")
    return read_sealed(file, what=what, todo=todo, required=version > 1)


def check_files(folder: Path, manifest: Fields, names: tuple[str, ...] | None = None) -> None:
    """Errors: BadInput unless the named files (default: all) exist with the recorded size and digest."""
    for name, value in manifest.section("files").values():
        file = folder / plain_name(name)
        if names is None or name in names:
            _check_file(folder, file, value.fields())


def _check_file(folder: Path, file: Path, entry: Fields) -> None:
    todo, size, recorded = "copy or write it again", entry.integer("bytes", low=0), entry.text("sha256")
    if not file.is_file():
        raise BadInput(f"{folder} is not complete", f"{file.name} is missing", todo)
    if file.stat().st_size != size:
        why = f"{file.name} has {file.stat().st_size} bytes instead of {size}"
        raise BadInput(f"{folder} is damaged", f"cut short or changed: {why}", todo)
    if digest(file) != recorded:
        raise BadInput(f"{folder} is damaged", f"{file.name} does not have the recorded digest", todo)
