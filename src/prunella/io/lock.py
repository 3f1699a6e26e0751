"""Locks: one process at a time writes to a folder or a file; a lock file next to it names the process.

The lock itself is one of the operating system (`lockf`, on Windows `msvcrt.locking`), which is released when a process
is killed. The text in the file names the holder, for error messages and for other machines, which may not see the lock
on a shared disk. A process loses such a lock by closing any handle of the file, so the file is never opened twice.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from prunella.errors import Locked, RequestError, system_error
from prunella.io.temporary import check_name, followed
from prunella.measure.clock import timestamp

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

_TAKEN = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_PLAIN = getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
"""Bytes as they are, on Windows; and of this name alone, on POSIX."""
_FAR = 1 << 20
"""The byte that Windows locks: behind the text, which other processes have to read."""


@dataclass(frozen=True)
class Holder:
    """The process that writes. started: in seconds since 1970."""

    pid: int
    host: str
    started: float

    def text(self) -> str:
        """The text of the lock file, a line for each field."""
        return f"{self.pid}\n{self.host}\n{self.started}\n"

    def __str__(self) -> str:
        since = datetime.fromtimestamp(self.started).strftime("%Y-%m-%d %H:%M:%S")
        return f"process {self.pid} on {self.host} has been writing there since {since}"


@dataclass
class _Held:
    """A lock of this process: its thread, how many times the thread holds it, and the open file."""

    holder: Holder
    thread: int
    handle: int
    depth: int = 0


_held: dict[tuple[int, str], _Held] = {}
"""Locks by process and lock file, since a forked child holds none."""
_guard = threading.Lock()


def lock_file(path: str | os.PathLike[str]) -> Path:
    """The lock file of a folder or a file, the same by any link: hidden, next to it.

    Errors: RequestError for a name that is too long.
    """
    whole = followed(path).absolute()
    check_name(whole)
    return whole.parent / f".{whole.name}.lock"


@contextmanager
def locked(path: str | os.PathLike[str]) -> Iterator[None]:
    """Hold the lock of `path` while the block runs; the same thread may take it again inside.

    The lock of a process that was killed on this machine is taken over. Errors: Locked, immediately, while another run
    holds it; RequestError if the lock file cannot be written.
    """
    file = lock_file(path)
    key = (os.getpid(), os.path.realpath(file))
    with _guard:
        held = _held.get(key) or _take(file)
        if held.thread != threading.get_ident():
            raise _refused(file, held.holder)
        held.depth += 1
        _held[key] = held
    try:
        yield
    finally:
        with _guard:
            held.depth -= 1
            if not held.depth:
                del _held[key]
                _release(file, held.handle)


def _take(file: Path) -> _Held:
    """Open and lock the file, and write the holder to it."""
    me = Holder(os.getpid(), socket.gethostname(), timestamp())
    try:
        if file.is_symlink():  # its target may be anything, and would be emptied
            todo = "remove it, or choose another name"
            raise RequestError(f"cannot write {_locked_path(file)}", f"its lock {file} is a link", todo)
        file.parent.mkdir(parents=True, exist_ok=True)
        handle = _opened(file)
        try:
            os.ftruncate(handle, 0)
            os.lseek(handle, 0, os.SEEK_SET)
            os.write(handle, me.text().encode())
        except BaseException:
            _release(file, handle)
            raise
    except OSError as error:
        todo = "check the folder and its permissions"
        raise system_error(error, f"cannot write {_locked_path(file)}", todo, kind=RequestError) from error
    return _Held(me, threading.get_ident(), handle)


def _opened(file: Path) -> int:
    """A handle of the lock file with the lock. Errors: Locked."""
    while True:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | _PLAIN, 0o666)
        try:
            shared = _lock(handle)
            before = _read(handle)
            if shared is False or (before and _elsewhere_or_alive(before, unsure=shared is None)):
                raise _refused(file, before)
            if _is_still(file, handle):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its holder removed the file in between


def _lock(handle: int) -> bool | None:
    """Whether the lock was free and is now held; None if the file system has no locks."""
    try:
        if sys.platform == "win32":
            os.lseek(handle, _FAR, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _TAKEN:
            return False
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


def _elsewhere_or_alive(before: Holder, *, unsure: bool) -> bool:
    """Whether the holder is on another machine or, if only the text of the file is known, a live process."""
    if before.host != socket.gethostname():
        return True
    if not unsure or before.pid == os.getpid():
        return False
    try:
        os.kill(before.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _read(handle: int) -> Holder | None:
    """The holder named in the file; None if there is none, as after a kill during the write."""
    os.lseek(handle, 0, os.SEEK_SET)
    try:
        pid, host, started = os.read(handle, 4096).decode().splitlines()
        return Holder(int(pid), host, float(started))
    except ValueError:
        return None


def _is_still(file: Path, handle: int) -> bool:
    """Whether the open file still has that name."""
    try:
        return os.path.samestat(os.stat(file), os.fstat(handle))
    except FileNotFoundError:
        return False


def _release(file: Path, handle: int) -> None:
    """Remove the file while it is locked, so that no process locks a file about to be removed; Windows cannot."""
    if sys.platform == "win32":
        os.close(handle)
        with suppress(OSError):
            file.unlink()
        return
    with suppress(OSError):  # the folder may have been removed with the lock
        file.unlink()
    os.close(handle)


def _locked_path(file: Path) -> Path:
    """The folder or file of a lock file."""
    return file.with_name(file.name[1:].removesuffix(".lock"))


def _refused(file: Path, holder: Holder | None) -> Locked:
    why = str(holder) if holder else "another process is about to write there"
    far = holder is not None and holder.host != socket.gethostname()
    todo = "wait for it, or choose another name" + (f"; if it has ended, remove {file}" if far else "")
    return Locked(f"{_locked_path(file)} is in use", why, todo)
