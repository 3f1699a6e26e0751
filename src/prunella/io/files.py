"""Files that are either there and complete, or not there: temporary name, fsync, rename.

A name that comes out of a file (a manifest, say) is data: `plain_name` refuses one that would be a path.
"""

from __future__ import annotations

import ctypes
import hashlib
import io
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from prunella.errors import BadInput, PruningError, RequestError, error_number, out_of_resources, system_error
from prunella.io.lock import locked

MARKER = "manifest.json"
"""The file that makes a folder an artefact; it is written last, so a folder without it is not finished."""

_BLOCK = 1 << 20
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


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
    """What the system refuses in the block is told as an error of the file `path`.

    what: the first line of the error, "FILE cannot be read" by default. Errors: BadInput, or OutOfResources where
    memory is short.
    """
    try:
        yield
    except (OSError, MemoryError) as error:
        todo = "check the path and its permissions"
        raise system_error(error, what or f"{os.fspath(path)} cannot be read", todo) from error


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """What the system refuses in the block is told as an error of the file or folder `path`.

    Errors: RequestError for a path that cannot be written, OutOfResources for a full disk, also where a library hides
    the system's error in one of its own.
    """
    try:
        yield
    except PruningError:
        raise
    except Exception as error:
        if isinstance(error, OSError) or error_number(error) is not None or out_of_resources(error) is not None:
            todo = "check the folder and its permissions"
            raise system_error(error, f"cannot write {os.fspath(path)}", todo, kind=RequestError) from error
        raise


class ErrorDeferringStream(io.RawIOBase):
    """Writes to another stream; an error of the system is kept for `check`, and what is written after it is dropped.

    torch's archive writer ends the process when a write raises.
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream, self._errors = stream, list[OSError]()

    def writable(self) -> bool:
        """Yes."""
        return True

    def seekable(self) -> bool:
        """As the stream is."""
        return self._stream.seekable()

    def seek(self, offset: int, whence: int = 0) -> int:
        """Go to a place in the stream."""
        return self._stream.seek(offset, whence)

    def tell(self) -> int:
        """The place in the stream."""
        return self._stream.tell()

    def write(self, data: Any) -> int:
        """Write, or pass over the data after an error."""
        try:
            if not self._errors:
                self._stream.write(data)
        except OSError as error:
            self._errors.append(error)
        return len(data)

    def check(self) -> None:
        """Raise the error of the system if there was one."""
        if self._errors:
            raise self._errors[0]
        self._stream.flush()


def make_folder(path: str | os.PathLike[str]) -> Path:
    """The folder `path`, made with its parents if it is not there. Errors: as `writing`."""
    with writing(path):
        Path(path).mkdir(parents=True, exist_ok=True)
    return Path(path)


def write_atomic(path: str | os.PathLike[str], content: bytes | Callable[[Path], object]) -> Path:
    """Write a file so that readers see the old one or the whole new one.

    `content` is the bytes, or a function that writes the file it is given. Errors: RequestError when `path` is a
    folder or its folder cannot be written; OutOfResources when the disk is full; whatever else `content` raises. A
    failure leaves an existing file as it was.
    """
    final = Path(path)
    if final.is_dir():
        raise RequestError(f"cannot write {final}", "a folder of that name exists", "choose another file name")
    with writing(final):
        temporary = _temporary_file(final)
        try:
            if callable(content):
                content(temporary)
            else:
                temporary.write_bytes(content)
            temporary.chmod(0o666 & ~_umask())
            _flush(temporary)
            temporary.replace(final)
            _flush(final.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    return final


@contextmanager
def new_folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder next to `path`; becomes `path` when the block ends well, and vanishes when it does not.

    Errors: before the block runs, RequestError when `path` holds something or cannot be made, Locked while another run
    writes it; OutOfResources when the disk is full.
    """
    final = Path(path)
    check_free(final, overwrite=overwrite)
    with locked(final), writing(final):
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".part", dir=final.parent))
        try:
            temporary.chmod(0o777 & ~_umask())
            yield temporary
            publish_folder(temporary, final, overwrite=overwrite)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def publish_folder(temporary: Path, final: Path, *, overwrite: bool = False) -> Path:
    """Rename a finished folder to its final name, everything in it on the disk first, the marker last.

    With `overwrite`, an older artefact of that name is exchanged in one step where the system can do that, else moved
    aside first and moved back if anything fails. Only an empty folder or one with a marker is ever replaced.
    """
    check_free(final, overwrite=overwrite)
    files = [file for file in sorted(temporary.rglob("*")) if file.is_file()]
    for file in sorted(files, key=lambda file: file.name == MARKER):
        _flush(file)
    _flush(temporary)
    if final.exists():
        _replace_folder(temporary, final)
    else:
        temporary.rename(final)
    _flush(final.parent)
    return final


def check_free(final: Path, *, overwrite: bool = False) -> None:
    """`RequestError` unless a folder may be written at `final`; writes nothing."""
    if not final.exists():
        return
    if not final.is_dir():
        raise RequestError(f"cannot write the folder {final}", "a file of that name exists", "choose another name")
    if not any(final.iterdir()):
        return
    if not overwrite:
        todo = "choose another name, or pass overwrite=True (--overwrite) to replace it"
        raise RequestError(f"the output folder {final} exists", "it is not empty, and nothing is overwritten", todo)
    if not (final / MARKER).is_file():
        why = f"it has no {MARKER}, so prunella did not write it"
        raise RequestError(f"the output folder {final} is not replaced", why, "remove it yourself, or choose another")


def _replace_folder(temporary: Path, final: Path) -> None:
    if _exchange(temporary, final):
        shutil.rmtree(temporary, ignore_errors=True)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=".old", dir=final.parent))
    final.replace(aside)
    try:
        temporary.rename(final)
    except BaseException:
        aside.rename(final)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step by Linux's renameat2; False where there is no such call."""
    if not sys.platform.startswith("linux"):
        return False
    with suppress(OSError, AttributeError):
        call = ctypes.CDLL(None, use_errno=True).renameat2
        return bool(call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)
    return False


def _temporary_file(final: Path) -> Path:
    handle, name = tempfile.mkstemp(prefix=f".{final.name}.", suffix=".part", dir=final.parent)
    os.close(handle)
    return Path(name)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:  # some file systems refuse fsync on a folder
        if path.is_file():
            raise
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
