"""Temporary files and folders, with the writing process in their names.

`.NAME.SPACE-PID-MARK.part` is written and then renamed to `NAME`; `.NAME.SPACE-PID-MARK.old` was `NAME` and makes room
for the new one if the system cannot exchange the two. SPACE stands for the machine and its process numbers. A killed
process leaves such names, and the next process that writes to the folder cleans them up: a file moved aside is moved
back if its name is free, and all others are removed. Names of a live process are kept.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Literal

from prunella.errors import RequestError

_NAME = re.compile(
    r"\.(?P<final>.+)\.(?P<space>[0-9a-f]{8})-(?P<pid>\d+)-[0-9a-f]{8}\.(?P<kind>part|old)(-\w+)?", re.DOTALL
)
_LONGEST = 200
"""Bytes of the final name that a temporary one repeats: names have at most 255."""
_LONGEST_NAME = 240
"""The most bytes of a name, so that names such as `.NAME.lock` are valid too."""
_LONGEST_PART, _LONGEST_PATH = 255, 4095
"""The most bytes of a name in a path, and of the path, that systems accept."""
_ours: set[str] = set()
"""Names that this process has created and not yet removed."""


def check_name(path: str | os.PathLike[str]) -> None:
    """Errors: RequestError for a path that can have no lock and temporary files next to it.

    That is a name without room for theirs, a path that is too long for the system, the root of the file system, and a
    link that leads to itself.
    """
    whole = os.path.abspath(path)
    *_, name = parts = whole.split(os.sep)
    size, longest = len(os.fsencode(name)), max(len(os.fsencode(part)) for part in parts)
    if size > _LONGEST_NAME:
        todo = f"choose a name of at most {_LONGEST_NAME} bytes"
        raise RequestError(f"cannot write {name[:40]}...", f"its name has {size} bytes, which is too long", todo)
    if longest > _LONGEST_PART or len(os.fsencode(whole)) > _LONGEST_PATH:
        why = f"its path has {len(os.fsencode(whole))} bytes, the longest name in it {longest}, which is too long"
        raise RequestError(f"cannot write {whole[:40]}...", why, "choose a shorter path")
    if not name:
        raise RequestError(f"cannot write {whole}", "it is the root of the file system", "choose a name in it")
    if os.path.islink(whole) and os.path.islink(os.path.realpath(whole)):
        raise RequestError(
            f"cannot write {os.fspath(path)}", "it is a link that leads to itself", "choose another name"
        )


def followed(path: str | os.PathLike[str]) -> Path:
    """The path, or for a link where it leads, so that its target is written and locked, and the link stays."""
    return Path(os.path.realpath(path) if os.path.islink(path) else path)


def temporary_file(final: Path) -> Path:
    """A new, empty file next to `final`, with its mode from the umask."""
    path = _new_name(final, "part")
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    return path


def temporary_folder(final: Path) -> Path:
    """A new, empty folder next to `final`, with its mode from the umask."""
    path = _new_name(final, "part")
    path.mkdir()
    return path


def name_aside(final: Path) -> Path:
    """A free name to which the file at `final` is moved while it is replaced."""
    return _new_name(final, "old")


def discard(path: Path) -> None:
    """Remove a temporary file or folder, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
    _ours.discard(path.name)


def remove_folder(folder: Path, *, of: Path) -> None:
    """Remove a folder that has a name of its own, after it has lost that name: a kill leaves no half of it there.

    of: the locked path whose next writer removes what a kill has left.
    """
    nameless = _new_name(of, "part")
    with suppress(OSError):  # it is removed all the same
        folder.rename(nameless)
    discard(folder)
    discard(nameless)


def clean_up(folder: Path, *, of: Path | None = None) -> None:
    """Clean up temporary files of killed processes in a folder. of: a locked path; all its temporary files go."""
    for entry, match in list(_left(folder)):
        locked_name = of is not None and match["final"] == _shortened(of)
        if entry.name not in _ours and (locked_name or _is_dead(match["space"], int(match["pid"]))):
            with suppress(OSError):
                _clean(entry, folder / match["final"], match["kind"])


def _clean(entry: Path, final: Path, kind: str) -> None:
    if kind == "old" and not os.path.lexists(final):
        entry.rename(final)
    else:
        discard(entry)


def _left(folder: Path) -> Iterator[tuple[Path, re.Match[str]]]:
    try:
        names = os.listdir(folder)
    except OSError:
        return
    for name in names:
        if match := _NAME.fullmatch(name):
            yield folder / name, match


def _new_name(final: Path, kind: Literal["part", "old"]) -> Path:
    mark = secrets.token_hex(4)
    short = final.name if kind == "old" else _shortened(final)
    path = final.with_name(f".{short}.{_space()}-{os.getpid()}-{mark}.{kind}")
    _ours.add(path.name)
    return path


def _shortened(final: Path) -> str:
    return os.fsencode(final.name)[:_LONGEST].decode(errors="ignore")


@cache
def _space() -> str:
    """Eight digits for this machine, its present start, and the name space of its process numbers."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return sha256("\n".join(parts).encode()).hexdigest()[:8]


def _is_dead(space: str, pid: int) -> bool:
    """Whether the process has certainly ended; one of another machine may live. Our own number may be reused."""
    if space != _space():
        return False
    if pid == os.getpid():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False
