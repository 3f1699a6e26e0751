"""Checks of a file or a folder before anything in it is read: it is a regular file, and no link leads out of it.

A folder from a stranger may hold symbolic links. They are followed inside the folder, and in the cache of Hugging Face,
where the files of `snapshots/REVISION` are links to `../../blobs`. Any other link is refused, since its target would be
read and copied as a part of the model.
"""

from __future__ import annotations

import os
import re
import stat
import zipfile
from pathlib import Path

from prunella.errors import BadInput, PruningError, out_of_resources

_BYTES = re.compile(r"allocate (\d+) bytes")
_SMALL = 1 << 26
"""Files up to this size, in bytes, fit into the memory of any machine: one that takes too much memory is broken."""


def check_regular(file: Path, what: str) -> Path:
    """The file. Errors: BadInput for a pipe or a device, since reading one could block or never end.

    A folder passes this check: the system refuses to open it.
    """
    mode = file.stat().st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise BadInput(what, "it is a pipe or a device, not a file", "give a file")
    return file


def check_links(folder: Path) -> None:
    """Errors: BadInput if a file of the folder is a link that leads out of it; see above for what is allowed."""
    home = Path(os.path.realpath(folder))
    roots = [home, *(parent.parent / "blobs" for parent in (home, *home.parents) if parent.name == "snapshots")]
    for entry in sorted(home.iterdir()) if home.is_dir() else ():
        target = Path(os.path.realpath(entry))
        if entry.is_symlink() and not target.is_dir() and not any(target.is_relative_to(root) for root in roots):
            todo = "put the file itself there; only the cache of Hugging Face is made of links"
            raise BadInput(f"{folder} is not read", f"{entry.name} is a link that leads out of the folder", todo)


def check_archive(file: Path, *, todo: str) -> None:
    """Errors: BadInput if an archive of torch would be larger in memory than it is on disk; any other file passes.

    torch stores the parts of an archive uncompressed. A compressed part, or parts that share their bytes, can have any
    size in memory.
    """
    what = f"cannot read {file}"
    try:
        if not zipfile.is_zipfile(file):
            return
        with zipfile.ZipFile(file) as archive:
            parts = archive.infolist()
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError, OSError) as error:
        raise BadInput(what, f"truncated or damaged: {error}", todo) from error
    packed = next((part for part in parts if part.compress_type != zipfile.ZIP_STORED), None)
    if packed is not None:
        why = f"{packed.filename[:60]} is compressed to {packed.compress_size} bytes of {packed.file_size}"
        raise BadInput(what, f"{why}, and torch writes such files uncompressed", todo)
    total, whole = sum(part.file_size for part in parts), file.stat().st_size
    if total > whole:
        raise BadInput(what, f"its parts take {total} bytes, and the file has {whole}", todo)
    if len({part.filename for part in parts}) < len(parts):
        raise BadInput(what, "it holds two parts of one name", todo)


def unreadable(error: BaseException, file: Path, what: str, todo: str) -> PruningError:
    """The error of a file that a reader of torch failed on, also if a broken file requested too much memory.

    Too little memory for an intact file is `OutOfResources`. Raise the error `from None`: with a memory error as its
    cause, the command line would report it as one.
    """
    full, asked, size = out_of_resources(error), _BYTES.search(str(error)), file.stat().st_size
    if full is not None and not (int(asked[1]) > 2 * size if asked else size < _SMALL):
        return full
    why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return BadInput(what, f"truncated or damaged: {why}", todo)
