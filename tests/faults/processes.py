"""A verb in a forked process of its own: what it is called with, how it ended, what it said and what it took.

A verb is called once before all forks, so that no call pays anew for its imports and caches. What the calls read is
made once and copied.
"""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.faults.verbs import Verb, make_source

Work = Callable[[], object]
_CALLS = iter(range(1 << 62))
_PREPARED = set[Path]()


@dataclass(frozen=True)
class Ended:
    """How a process ended. code: its exit code, minus the signal that killed it. memory: its peak in kilobytes."""

    code: int
    said: str
    seconds: float
    cpu: float
    memory: int


@dataclass(frozen=True)
class Started:
    """A process that runs."""

    pid: int
    said: Path
    began: float

    def wait(self) -> Ended:
        """Until it ends."""
        _, status, used = os.wait4(self.pid, 0)
        seconds, said = time.monotonic() - self.began, self.said.read_text(errors="replace")
        self.said.unlink()
        return Ended(os.waitstatus_to_exitcode(status), said, seconds, used.ru_utime + used.ru_stime, used.ru_maxrss)


def start(work: Work, home: Path, *, first: Work = lambda: None, last: Work = lambda: None) -> Started:
    """Start work in `home`, as the command line does it. first, last: called in the process, around the work."""
    said = home.parent / f"said-{next(_CALLS)}"
    said.touch()
    gc.freeze()
    began = time.monotonic()
    child = os.fork()
    if child:
        return Started(child, said, began)
    try:
        with said.open("w") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        os.chdir(home)
        sys.path.insert(0, str(home))
        first()
        code = code_of(work)
        last()
    except BaseException:
        with contextlib.suppress(BaseException):  # a limit of the size of files holds for what is said too
            traceback.print_exc()
        code = 71
    with contextlib.suppress(BaseException):
        sys.stdout.flush()
    os._exit(code)


def code_of(work: Work) -> int:
    """The exit code that the command line gives to what the work raises, which is shown."""
    from prunella.cli.console import explain_error

    try:
        work()
    except SystemExit as error:
        return int(error.code or 0)
    except BaseException as error:
        code = explain_error(error).code
        with contextlib.suppress(OSError):
            if code == 70:
                traceback.print_exc()
            print(f"{type(error).__name__}: {error}", flush=True)
        return code
    return 0


def warm_up(work: Work, home: Path) -> None:
    """Work in this process: what it imports, registers and keeps is there in every fork from then on."""
    before, said = os.getcwd(), (home.parent / "said").open("w")
    os.chdir(home)
    sys.path.insert(0, str(home))
    try:
        with said, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), contextlib.suppress(SystemExit):
            work()
    finally:
        os.chdir(before)
        sys.path.remove(str(home))
        for name in [name for name in sys.modules if name.partition(".")[0] == "source"]:
            del sys.modules[name]


def prepared(verb: Verb, home: Path) -> Path:
    """What the verb finds when it starts, made once; the verb is warm."""
    kept = home.parent / "prepared"
    if kept in _PREPARED:
        restore(kept, home)
        return kept
    _PREPARED.add(kept)
    make_source(home)
    start(verb.prepare, home).wait()
    home.rename(kept)
    restore(kept, home)
    warm_up(verb.call, home)
    restore(kept, home)
    return kept


def restore(kept: Path, home: Path) -> None:
    """The home as the verb finds it when it starts."""
    shutil.rmtree(home, ignore_errors=True)
    shutil.copytree(kept, home, symlinks=True)


@contextlib.contextmanager
def working_folder() -> Iterator[Path]:
    """A folder for homes, in memory where there is such a place."""
    import tempfile

    memory = Path("/dev/shm")
    where = memory if os.access(memory, os.W_OK) and "TMPDIR" not in os.environ else None
    place = Path(tempfile.mkdtemp(prefix="prunella-faults-", dir=where)).resolve()
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)
