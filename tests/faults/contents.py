"""What a folder holds, as text that two runs of the same job share: all bytes, but for what tells the time."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

TIMED = {"seconds", "sha256", "report", "text", "predicted_peak", "machine"}
"""Fields of records that say when, how long or how fast; a digest of a file with such a field is one too."""
PAGES = ("report.html",)
RECORD = ": record "
"""Between the name of a journal and that of one of its records."""


def contents(folder: Path) -> dict[str, str]:
    """Path -> digest, of every file and folder but the source, and of every record of a journal."""
    places = sorted(place for place in folder.rglob("*") if place.relative_to(folder).parts[0] != "source")
    found = {str(place.relative_to(folder)): _digest(place) for place in places}
    for place in (place for place in places if place.suffix == ".sqlite" and place.is_file()):
        found |= {f"{place.relative_to(folder)}{RECORD}{name}": text for name, text in _records(place)}
    return found


def bytes_of(folder: Path) -> dict[str, str]:
    """Path -> digest of all bytes, of every file."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _digest(place: Path) -> str:
    if place.is_dir():
        return "a folder"
    if place.name in PAGES:
        return "a page with measured times"
    if place.suffix == ".sqlite":
        content = "\n".join(text for _, text in _records(place)).encode()
    elif place.name in ("run.json", "manifest.json"):
        content = _record(place)
    else:
        content = place.read_bytes()
    return hashlib.sha256(content).hexdigest()


def _record(file: Path) -> bytes:
    """What a record or a manifest says; all its bytes if it is damaged."""
    content = file.read_bytes()
    try:
        data = _timeless(json.loads(content))
        for page in PAGES if "files" in data else ():
            data["files"].pop(page, None)  # its size depends on the digits of times
        if file.name == "manifest.json":
            data["files"].pop("run.json", None)
    except (ValueError, KeyError, AttributeError, TypeError):
        return content
    return json.dumps(data, sort_keys=True).encode()


def _records(file: Path) -> list[tuple[str, str]]:
    """Names and texts of the records; nothing of a journal that a kill has left in the middle of a write."""
    try:
        with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as database:
            rows = database.execute("SELECT identity, key, payload FROM records ORDER BY number").fetchall()
        texts = [(whose, key, json.dumps(_timeless(json.loads(text)), sort_keys=True)) for whose, key, text in rows]
    except sqlite3.OperationalError:
        return []
    except (sqlite3.DatabaseError, ValueError):  # damaged
        return [("", f"cannot be read: {hashlib.sha256(file.read_bytes()).hexdigest()}")]
    return [(f"{key} of {whose}", f"{key} {text}") for whose, key, text in texts]


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if key not in TIMED}
    return [_timeless(item) for item in value] if isinstance(value, list) else value
