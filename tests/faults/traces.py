"""What a finished run leaves besides its result: modes, names of this machine, and nothing where it may not write.

    python -m tests.faults.traces [--verbs run,llm]

Every verb runs under several umasks; its files are searched for the place, the host and the user; a folder that cannot
be written is found before the user's own code is called; a file that was there keeps its mode.
"""

from __future__ import annotations

import getpass
import os
import re
import socket
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.faults.contents import bytes_of
from tests.faults.processes import prepared, restore, start
from tests.faults.rounds import Cases, Effort, Round, main
from tests.faults.verbs import JOB, Verb

UMASKS = (0o022, 0o077, 0o027, 0o002)
OWN_MODE = 0o640
NOBODY = 65534
WORKED = "the work began"
LOUD = JOB + f"\nprint({WORKED!r})\n"
FILES = ("out.plan", "out.safetensors", "out.html")


def written(home: Path) -> list[Path]:
    """What a verb has written, files and folders."""
    return [place for place in sorted(home.rglob("*")) if place.relative_to(home).parts[0] != "source"]


def modes(verb: Verb, home: Path, umask: int) -> str:
    """What is wrong with the modes of what is written under an umask."""
    ended = start(verb.call, home, first=lambda: os.umask(umask)).wait()
    if ended.code:
        return f"exit code {ended.code}: {ended.said[-500:]}"
    for place in written(home):
        wanted = (0o777 if place.is_dir() else 0o666) & ~umask
        if (mode := place.stat().st_mode & 0o7777) != wanted and place.relative_to(home).parts[0] not in existed(home):
            return f"{place.relative_to(home)} has mode {mode:o}, not {wanted:o}"
    return ""


def existed(home: Path) -> set[str]:
    """What was there before the verb ran."""
    return {place.name for place in (home.parent / "prepared").iterdir()}


def kept_mode(verb: Verb, home: Path) -> str:
    """Whether a file that is replaced keeps its own mode."""
    file = next((home / name for name in FILES if (home / name).exists()), None)
    if file is None:
        return ""
    file.chmod(OWN_MODE)
    ended = start(verb.call, home).wait()
    mode = file.stat().st_mode & 0o7777
    return "" if mode == OWN_MODE or ended.code else f"{file.name} has mode {mode:o}, not {OWN_MODE:o}"


def leaks(home: Path) -> str:
    """The first name of this machine in what was written."""
    names = {str(home), str(home.parent), socket.gethostname(), str(Path.home())} - {"/", "localhost"}
    user = getpass.getuser()
    patterns = [re.escape(name.encode()) for name in names] + [rb"(?<![\w.])" + re.escape(user.encode()) + rb"@"]
    for file in (place for place in written(home) if place.is_file()):
        data = file.read_bytes()
        if found := next((match for one in patterns if (match := re.search(one, data))), None):
            around = data[max(0, found.start() - 40) : found.end() + 40]
            return f"{file.relative_to(home)} holds {around!r}"
    return ""


def unwritable(verb: Verb, home: Path, protect: Callable[[], object]) -> str:
    """What is wrong where nothing can be written in the home: it is found before the user's code is read."""
    job = home / "source" / "job.py"
    if job.is_file():
        job.write_text(LOUD)
    before = bytes_of(home)
    ended = start(verb.call, home, first=protect).wait()
    if ended.code not in (2, 5) or "Traceback" in ended.said:
        return f"exit code {ended.code}: {ended.said[-500:]}"
    if WORKED in ended.said and verb.name in FROM_THE_LINE:
        return f"found after the work began: {ended.said[-500:]}"
    return "something was written" if bytes_of(home) != before else ""


FROM_THE_LINE = ("plan", "export", "inspect", "scan", "llm", "llm auto", "run", "run over")


def as_nobody() -> None:
    """A user who may read everything here, and write nothing."""
    os.setgid(NOBODY)
    os.setuid(NOBODY)


def round_of(verb: Verb, home: Path, effort: Effort) -> Cases:
    """Each trace, and what was wrong."""
    kept = prepared(verb, home)
    for umask in UMASKS[: effort.most or None]:
        restore(kept, home)
        yield f"umask {umask:03o}", partial(modes, verb, home, umask)
    yield "names of this machine", partial(leaks, home)
    yield "a mode of its own", partial(kept_mode, verb, home)
    if os.getuid() == 0:
        restore(kept, home)
        for place in (home.parent, home, home / "source"):
            place.chmod(0o755)
        yield "a folder of somebody else", partial(unwritable, verb, home, as_nobody)


ROUND = Round("traces", round_of)

if __name__ == "__main__":
    sys.exit(main([ROUND], __doc__))
