"""Manifests that are changed by hand and given their digest again: what is tested then is not the digest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prunella.io.files import MARKER
from prunella.io.manifest import write_sealed


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest of a folder, and seal it again."""
    manifest = json.loads((folder / MARKER).read_text())
    manifest.pop("sha256")
    change(manifest)
    write_sealed(folder / MARKER, manifest)


def to_format_1(folder: Path) -> None:
    """Make of an artifact what format 1 was: no digest of the manifest, and nothing of what `run` adds in it."""
    manifest = json.loads((folder / MARKER).read_text())
    manifest.pop("sha256")
    files = {name: entry for name, entry in manifest["files"].items() if name not in ("run.json", "report.html")}
    (folder / MARKER).write_text(json.dumps({**manifest, "format": 1, "files": files}, indent=1))
