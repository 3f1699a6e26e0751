"""Atomic writes: a file is complete or absent, by a temporary name, fsync and rename.

A name read from a file such as a manifest is data: `plain_name` refuses one that would be a path.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import io
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from prunella.errors import (
    BadInput,
    OutOfResources,
    PruningError,
    RequestError,
    error_number,
    out_of_resources,
    system_error,
)
from prunella.io.lock import lock_file, locked
from prunella.io.temporary import (
    check_name,
    clean_up,
    discard,
    followed,
    name_aside,
    remove_folder,
    temporary_file,
    temporary_folder,
)

MARKER = "manifest.json"
"""The file that marks a folder as an artifact; it is written last, so a folder without it is incomplete."""

_BLOCK = 1 << 20
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_NO_FSYNC = {errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.EPERM, errno.EISDIR, errno.EBADF}
"""Error numbers of file systems that refuse fsync on a folder."""


def digest(path: Path) -> str:
    """`sha256:` and the hexadecimal digest of a file's bytes."""
    state = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            state.update(block)
    return f"sha256:{state.hexdigest()}"


def plain_name(name: object) -> str:
    """`name` if it names a file of one folder; `BadInput` if it is a path, hidden, or no text at all."""
    if not isinstance(name, str) or not name or name.startswith(".") or any(c in name for c in "/\\:\0"):
        raise BadInput(f"the file name {name!r} is refused", "names in a manifest are plain file names, never paths")
    return name


@contextmanager
def reading(path: str | os.PathLike[str], what: str = "") -> Iterator[None]:
    """Turn errors of the operating system in the block into errors about the file `path`.

    what: the first line of the error, "FILE cannot be read" by default. Errors: BadInput, or OutOfResources where
    memory is short.
    """
    try:
        yield
    except (OSError, MemoryError) as error:
        todo = "check the path and its permissions"
        raise system_error(error, what or f"{os.fspath(path)} cannot be read", todo) from error


@contextmanager
def writing(path: str | os.PathLike[str], *, needed: int | None = None) -> Iterator[None]:
    """Turn errors of the operating system in the block into errors about the file or folder `path`.

    needed: the bytes that are written, for the error of a full disk. Errors: RequestError for a path that cannot be
    written, OutOfResources for a full disk, also where a library hides the system's error in one of its own.
    """
    try:
        yield
    except PruningError:
        raise
    except Exception as error:
        if isinstance(error, OSError) or error_number(error) is not None or out_of_resources(error) is not None:
            todo = "check the folder and its permissions"
            told = system_error(error, f"cannot write {os.fspath(path)}", todo, kind=RequestError)
            if needed is not None and isinstance(told, OutOfResources):
                told = OutOfResources(told.what, f"{told.why}; {needed:,} bytes are needed", told.todo)
            raise told from error
        raise


class ErrorDeferringStream(io.RawIOBase):
    """Writes to another stream; a system error is stored for `check`, and later writes are discarded.

    torch's archive writer terminates the process if a write raises.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._errors = stream, list[OSError]()

    def writable(self) -> bool:
        """True: `write` is always possible."""
        return True

    def seekable(self) -> bool:
        """Whether the wrapped stream is seekable."""
        return self._stream.seekable()

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move to a position of the stream."""
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        """The position in the stream."""
        return self._stream.tell()

    def write(self, data: Any) -> int:
        """Write, or discard the data after an error."""
        try:
            if not self._errors:
                self._stream.write(data)
        except OSError as error:
            self._errors.append(error)
        return len(data)

    def check(self) -> None:
        """Raise the stored system error, if there was one."""
        if self._errors:
            raise self._errors[0]
        self._stream.flush()


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Create the folder `path` with its parents if necessary, flushed to the disk. Errors: as `writing`."""
    with writing(path):
        whole = Path(path).absolute()
        missing = [place for place in (whole, *whole.parents) if not place.exists()]
        whole.mkdir(parents=True, exist_ok=True)
        for place in reversed(missing):
            flush(place.parent)
    return Path(path)


def write_atomic(
    path: str | os.PathLike[str], content: bytes | Callable[[Path], object], *, size: int | None = None
) -> Path:
    """Write a file so that readers see the old one or the complete new one.

    `content` is the bytes, or a function that writes the given file. size: its number of bytes, if known. A new file
    gets its mode from the umask, and an existing one keeps its mode; a link stays, and its target is written. Temporary
    files of killed processes in the folder are removed. Errors: RequestError if `path` is a folder, a pipe or a device,
    or its folder is not writable; OutOfResources if the disk is full; those of `content`. A failure leaves an existing
    file unchanged.
    """
    final = followed(path)
    check_file_name(final)
    needed = len(content) if isinstance(content, bytes) else size
    with writing(final, needed=needed):
        clean_up(final.parent)
        temporary = temporary_file(final)
        try:
            mode = (final if final.exists() else temporary).stat().st_mode & 0o7777
            if callable(content):
                content(temporary)
            else:
                temporary.write_bytes(content)
            temporary.chmod(mode)
            flush(temporary)
            temporary.replace(final)
            flush(final.parent)
        finally:
            discard(temporary)
    return final


def check_file_name(final: Path) -> None:
    """Errors: RequestError where no file can have that name: too long, or of a folder, a pipe or a device."""
    check_name(final)
    if final.is_dir():
        raise RequestError(f"cannot write {final}", "a folder of that name exists", "choose another file name")
    if final.exists() and not final.is_file():
        why = "it is a pipe or a device, which a file would replace"
        raise RequestError(f"cannot write {final}", why, "choose another file name")


def copy_file(source: Path, path: Path) -> Path:
    """Copy the contents of a file, as `write_atomic` writes."""
    return write_atomic(path, lambda temporary: shutil.copyfile(source, temporary), size=source.stat().st_size)


@contextmanager
def new_folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder next to `path`; it becomes `path` if the block succeeds, and is removed otherwise.

    Errors: before the block runs, RequestError if `path` is not empty or cannot be created, Locked while another run
    writes it; OutOfResources if the disk is full.
    """
    final = followed(path)
    clean_up_after_kill(final)
    check_free(final, overwrite=overwrite)
    make_folder(final.parent)
    with locked(final), writing(final):
        clean_up(final.parent, of=final)
        check_free(final, overwrite=overwrite)
        temporary = temporary_folder(final)
        try:
            yield temporary
            publish_folder(temporary, final, overwrite=overwrite)
        finally:
            discard(temporary)


def clean_up_after_kill(final: Path) -> None:
    """Release the lock of a killed writer of `final`, and remove its temporary folder."""
    final = followed(final)
    if lock_file(final).exists():
        with suppress(PruningError), locked(final):
            clean_up(final.parent, of=final)


def publish_folder(temporary: Path, final: Path, *, overwrite: bool = False) -> Path:
    """Rename a finished folder to its final name, everything in it on the disk first, the marker last.

    With `overwrite`, an older artifact of that name is exchanged in one step where the system can do that, else moved
    aside first and moved back if anything fails. Only an empty folder or one with a marker is ever replaced.
    """
    check_free(final, overwrite=overwrite)
    flush_all(temporary)
    swap_in(temporary, final)
    return final


def swap_in(temporary: Path, final: Path) -> None:
    """Give a finished folder its final name; the old folder, which was checked before, is removed last."""
    if final.exists():
        _replace_folder(temporary, final)
    else:
        temporary.rename(final)
    flush(final.parent)


def flush_all(folder: Path) -> None:
    """Flush everything in a folder to the disk, the marker last."""
    inside = sorted(folder.rglob("*"))
    for file in sorted((file for file in inside if file.is_file()), key=lambda file: file.name == MARKER):
        flush(file)
    for place in (*(place for place in inside if place.is_dir()), folder):
        flush(place)


def check_free(final: Path, *, overwrite: bool = False, marker: str = MARKER) -> None:
    """Errors: RequestError unless a folder may be written at `final`. marker: a file that prunella's folders have."""
    if not final.exists():
        return
    if not final.is_dir():
        raise RequestError(f"cannot write the folder {final}", "a file of that name exists", "choose another name")
    if not any(final.iterdir()):
        return
    if not overwrite:
        todo = "choose another name, or pass overwrite=True (--overwrite) to replace it"
        raise RequestError(f"the output folder {final} exists", "it is not empty, and nothing is overwritten", todo)
    if not (final / marker).is_file():
        why = f"it has no {marker}, so prunella did not write it"
        raise RequestError(f"the output folder {final} is not replaced", why, "remove it yourself, or choose another")


def _replace_folder(temporary: Path, final: Path) -> None:
    """Replace the old folder; after a kill either folder is there, or the old one aside, which `clean_up` restores."""
    if _exchange(temporary, final):
        flush(final.parent)  # the new folder is durable before the old one is removed
        remove_folder(temporary, of=final)
        return
    aside = name_aside(final)
    final.replace(aside)
    try:
        temporary.rename(final)
    except BaseException:
        aside.rename(final)
        raise
    flush(final.parent)
    remove_folder(aside, of=final)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step by Linux's renameat2; False where there is no such call."""
    if not sys.platform.startswith("linux"):
        return False
    with suppress(OSError, AttributeError):
        call = ctypes.CDLL(None, use_errno=True).renameat2
        return bool(call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)
    return False


def flush(path: Path) -> None:
    """Flush the content of a file, or the entries of a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if path.is_file() or error.errno not in _NO_FSYNC:
            raise
    finally:
        os.close(handle)
