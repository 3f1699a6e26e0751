"""One process at a time writes: a second one is told who does, and a lock that a kill has left is taken over."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from prunella.errors import Locked, OutOfResources, RequestError
from prunella.io import lock
from prunella.io.files import new_folder
from prunella.io.lock import Holder, lock_file, locked

HOLDER = """
import sys
from prunella.io.lock import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.readline()
"""


def holder(file: Path) -> Holder:
    """Whom the file names."""
    pid, host, started = file.read_text().splitlines()
    return Holder(int(pid), host, float(started))


@contextmanager
def another_process(path: Path) -> Iterator[subprocess.Popen[str]]:
    """One that holds the lock until it is told to end."""
    words = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_second_process_is_refused_at_once_and_told_who_writes(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with another_process(path) as process:
        said = rf"out is in use\nprocess {process.pid} on {socket.gethostname()} has been writing there since 20"
        with pytest.raises(Locked, match=said) as caught, locked(path):
            pytest.fail("two processes hold one lock")
        assert caught.value.exit_code == 2 and isinstance(caught.value, RequestError)
        with pytest.raises(Locked), new_folder(path):
            pytest.fail("a folder is written under the lock of another process")
        process.communicate("end\n")
    assert list(tmp_path.iterdir()) == []
    with new_folder(path) as folder:
        assert lock_file(path).exists()
        (folder / "x").touch()
    assert list(tmp_path.iterdir()) == [path]


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with another_process(path) as process:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert holder(lock_file(path)).pid == process.pid
    with locked(path):
        me = holder(lock_file(path))
        assert (me.pid, me.host) == (os.getpid(), socket.gethostname()) and me.started > 1.6e9
    assert not lock_file(path).exists()


@pytest.mark.parametrize("text", ["", "7", "x\ny\nz\n", "1\n2\n3\n4\n", "\x00" * 5000])
def test_a_file_that_names_nobody_holds_nothing(tmp_path: Path, text: str) -> None:
    lock_file(tmp_path / "out").write_text(text)
    with locked(tmp_path / "out"):
        pass


def test_a_lock_that_is_a_link_empties_nothing(tmp_path: Path) -> None:
    thesis = tmp_path / "thesis.tex"
    thesis.write_text("years")
    lock_file(tmp_path / "out").symlink_to(thesis)
    lock_file(tmp_path / "other").symlink_to("nowhere")
    for name in ("out", "other"):
        with pytest.raises(RequestError, match=r"\.lock is a link"), locked(tmp_path / name):
            pass
    assert thesis.read_text() == "years" and not (tmp_path / "nowhere").exists()


def test_a_lock_of_another_machine_is_not_taken_over(tmp_path: Path) -> None:
    file = lock_file(tmp_path / "out")
    file.write_text(Holder(7, "elsewhere", 1.7e9).text())
    said = rf"process 7 on elsewhere .*\n.*if it has ended, remove {file}"
    with pytest.raises(Locked, match=said), locked(tmp_path / "out"):
        pytest.fail("the lock of another machine was taken")
    assert holder(file).host == "elsewhere"


def test_a_lock_that_does_not_fit_on_the_disk_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OutOfResources), locked(tmp_path / "out"):
            pytest.fail("there was no room for the lock")
    assert list(tmp_path.iterdir()) == []
    with locked(tmp_path / "out"):
        assert lock_file(tmp_path / "out").exists()


def test_where_there_are_no_locks_the_process_that_is_named_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "_lock", lambda handle: None)
    file = lock_file(tmp_path / "out")
    with another_process(tmp_path / "other") as process:
        text = Holder(process.pid, socket.gethostname(), 1.7e9).text()
        file.write_text(text)
        with pytest.raises(Locked, match=f"process {process.pid}"), locked(tmp_path / "out"):
            pytest.fail("the lock of a live process was taken")
    file.write_text(text)
    with locked(tmp_path / "out"):
        assert holder(file).pid == os.getpid()


def test_the_thread_that_holds_it_takes_it_again_and_another_thread_does_not(tmp_path: Path) -> None:
    caught: list[BaseException] = []

    def other() -> None:
        try:
            with locked(tmp_path / "out"):
                pass
        except Locked as error:
            caught.append(error)

    with locked(tmp_path / "out"):
        with locked(tmp_path / "." / "out"):
            pass
        assert lock_file(tmp_path / "out").exists()
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        with pytest.raises(subprocess.CalledProcessError):  # still locked for others after all of that
            subprocess.run([sys.executable, "-c", HOLDER, str(tmp_path / "out")], check=True, capture_output=True)
    assert f"process {os.getpid()}" in str(caught[0])
    other()
    assert len(caught) == 1


def test_it_is_released_after_an_error_and_the_folder_may_be_gone(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "out"):
        raise ZeroDivisionError
    assert not lock_file(tmp_path / "out").exists()
    with locked(tmp_path / "deep" / "out"):
        lock_file(tmp_path / "deep" / "out").unlink()
        (tmp_path / "deep").rmdir()
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match="cannot write"), locked(tmp_path / "file" / "out"):
        pytest.fail("a file holds a lock file")
