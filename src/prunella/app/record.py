"""`run.json`, the record of a run: it is trusted only if the digests in its folder, or its own digest, agree."""

from __future__ import annotations

from pathlib import Path

from prunella.io.files import MARKER
from prunella.io.json import Fields, read_object
from prunella.io.manifest import check_files, read_manifest, read_sealed

RECORD = "run.json"
FORMAT = 2
"""Format 1 had no such number, and stored the recovery under another name."""


def read_record(folder: Path) -> Fields | None:
    """The record of a folder, None if it has none.

    Errors: BadInput for a changed record, or an unknown format.
    """
    file = folder / RECORD
    if not file.is_file():
        return None
    what, todo = f"{file} cannot be read", "make the folder again"
    if (folder / MARKER).is_file():
        check_files(folder, read_manifest(folder), (RECORD,))
        record = read_object(file, what=what, todo=todo, allow_nan=True)
    else:
        record = read_sealed(file, what=what, todo=todo, required=False)
    record.integer("format", low=1, high=FORMAT, default=1)
    return record
