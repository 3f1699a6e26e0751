"""Too little room: a limit of the size of files at every power of two, and a small disk that is full at any moment.

    LD_PRELOAD=shim.so python -m tests.faults.room [--verbs run,llm] [--most 8] [--seed 0]

The exit code is 5 and the bytes that are needed are said; nothing half written is left, what was there before is whole,
and with more room the same call ends as if nothing had happened. The small disk is a file system in memory, which only
root can mount: it is left out where that is refused.
"""

from __future__ import annotations

import os
import random
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tests.faults.aftermath import lost, second_call
from tests.faults.contents import bytes_of, contents
from tests.faults.moments import LEFT
from tests.faults.processes import Ended, prepared, restore, start
from tests.faults.rounds import Cases, Effort, Round, main
from tests.faults.states import undisturbed
from tests.faults.verbs import Verb

FULL = 5
SIZES = tuple(1 << power for power in range(22))
TOLD = re.compile(r"[\d,]+ bytes|the disk is full")
"""The bytes that are needed, or for a journal, whose size nobody knows before, what is full."""
PAGE = 4096


def wrong_end(
    home: Path, ended: Ended, before: dict[str, str], expected: dict[str, str], *, limit: int | None = None
) -> str:
    """What is wrong with a call that had too little room. limit: of the size of files, that of its messages too."""
    if ended.code not in (0, FULL) or "Traceback" in ended.said:
        return f"exit code {ended.code}: {ended.said[-800:]}"
    complete = ended.said.endswith("\n") and (limit is None or len(ended.said.encode()) < limit)
    if ended.code == FULL and complete and not TOLD.search(ended.said):
        return f"it does not say what is full: {ended.said[-300:]}"
    left = [name for name in contents(home) if LEFT.search(name)]
    return f"it left {', '.join(left)}" if left else lost(before, contents(home), expected)


def limited(verb: Verb, home: Path, size: int, expected: dict[str, str]) -> str:
    """What is wrong where no file may be larger than that."""
    source, before = bytes_of(home / "source"), contents(home)
    limit = (size, resource.RLIM_INFINITY)
    ended = start(
        verb.call, home, first=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
        last=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2),
    ).wait()  # fmt: skip
    wrong = "the source was changed" if bytes_of(home / "source") != source else ""
    return wrong or wrong_end(home, ended, before, expected, limit=size) or second_call(verb, home, expected)


@contextmanager
def small_disk(place: Path, free: int) -> Iterator[Path | None]:
    """A disk of its own with so many bytes free besides a copy of the prepared home; None where none can be mounted."""
    place.mkdir(parents=True, exist_ok=True)
    used = int(
        subprocess.run(["du", "-sk", place.parent / "prepared"], capture_output=True, text=True).stdout.split()[0]
    )
    size = used * 1024 + 64 * PAGE + free
    line = ["mount", "-t", "tmpfs", "-o", f"size={-(-size // PAGE) * PAGE}", "none", str(place)]
    if not shutil.which("mount") or subprocess.run(line, capture_output=True).returncode:
        yield None
        return
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=False)


def on_small_disk(verb: Verb, kept: Path, free: int, expected: dict[str, str]) -> str:
    """What is wrong where the disk has only so much room; nothing where there is no such disk."""
    with small_disk(kept.parent / "disk", free) as disk:
        if disk is None:
            return ""
        home = disk / "home"
        restore(kept, home)
        _fill(disk, free)
        before = contents(home)
        ended = start(verb.call, home).wait()
        (disk / "filler").unlink(missing_ok=True)
        if wrong := wrong_end(home, ended, before, expected):
            return wrong
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        return second_call(verb, home, expected)


def _fill(disk: Path, free: int) -> None:
    """Leave so many bytes free."""
    there = os.statvfs(disk)
    extra = there.f_bavail * there.f_bsize - free
    if extra > 0:
        (disk / "filler").write_bytes(bytes(extra))


def round_of(verb: Verb, home: Path, effort: Effort) -> Cases:
    """Each limit, and what was wrong."""
    kept, rng = prepared(verb, home), random.Random(f"{verb.name} {effort.seed}")
    finished = undisturbed(verb, home, kept).state
    expected = finished.expected
    written = sum(file.stat().st_size for file in finished.home.rglob("*") if file.is_file())
    for size in SIZES[:: max(1, len(SIZES) // max(1, effort.most))]:
        restore(kept, home)
        yield f"files of {size} bytes at most", partial(limited, verb, home, size, expected)
    for k in range(effort.most):
        free = int(written * 1.2 * (k + rng.random()) / effort.most)
        yield f"a disk with {free} bytes free", partial(on_small_disk, verb, kept, free, expected)


ROUND = Round("room", round_of, most=len(SIZES))

if __name__ == "__main__":
    sys.exit(main([ROUND], __doc__))
