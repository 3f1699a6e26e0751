"""Every fault at every call of every verb, under the shim; a line for each that is not survived.

    LD_PRELOAD=shim.so python -m tests.faults.grid [--verbs save,run] [--stride 1] [--most 0]

Each call is a forked process, in which the shim is armed; the second call is not disturbed. A verb is called once
before all forks, so that no call pays anew for its imports and caches. What the calls read is made once and copied.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import gc
import os
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.faults.contents import bytes_of, contents
from tests.faults.verbs import VERBS, Verb, make_source

KINDS = ("write", "fsync", "rename", "unlink", "mkdir")
ACTIONS = {"kill": (0, 0), "EIO": (1, errno.EIO), "ENOSPC": (1, errno.ENOSPC), "half": (2, 0)}
NEVER = 1 << 40
CODES = {"EIO": (0, 2, 3), "ENOSPC": (0, 5)}
"""How a verb may end whose call was refused; 0 where the call did not matter, as in cleaning up."""


@dataclass(frozen=True)
class Fault:
    """The call of that number, of that kind, ends so."""

    kind: str
    at: int
    action: str

    def __str__(self) -> str:
        return f"{self.action} at {self.kind} {self.at}"


def shim() -> ctypes.CDLL:
    """The shim, which is loaded already."""
    library = ctypes.CDLL(None)
    library.faults_count.restype = ctypes.c_long
    library.faults_arm.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_long, ctypes.c_int, ctypes.c_int]
    return library


def call(verb: Verb, home: Path, fault: Fault | None, *, prepare: bool = False) -> tuple[int, list[int], str]:
    """Call the verb in a process of its own: its exit code, how often each kind was called, and what it said."""
    told, said = home.parent / "told", home.parent / "said"
    told.write_text("")
    gc.freeze()
    child = os.fork()
    if child == 0:
        with said.open("w") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        os.chdir(home)
        sys.path.insert(0, str(home))
        code = _armed(verb.prepare if prepare else verb.call, home, fault, told)
        sys.stdout.flush()
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, [int(word) for word in told.read_text().split()], said.read_text()


def _armed(function: object, home: Path, fault: Fault | None, told: Path) -> int:
    from prunella.cli.console import explain_error

    library = shim()
    kind, at = (KINDS.index(fault.kind), fault.at) if fault else (0, NEVER)
    action, number = ACTIONS[fault.action] if fault else (0, 0)
    library.faults_arm(os.fsencode(home), kind, at, action, number)
    code = 0
    try:
        function()  # type: ignore[operator]
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException as error:
        traceback.print_exc()
        code = explain_error(error).code
    told.write_text(" ".join(str(library.faults_count(k)) for k in range(len(KINDS))))
    return code


def warm_up(verb: Verb, home: Path) -> None:
    """Call the verb in this process: what it imports, registers and keeps is there in every fork from then on."""
    before, said = os.getcwd(), (home.parent / "said").open("w")
    os.chdir(home)
    sys.path.insert(0, str(home))
    try:
        with said, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), contextlib.suppress(SystemExit):
            verb.call()
    finally:
        os.chdir(before)
        sys.path.remove(str(home))
        for name in [name for name in sys.modules if name.partition(".")[0] == "source"]:
            del sys.modules[name]


def prepared(verb: Verb, home: Path) -> Path:
    """What the verb finds when it starts, made once."""
    kept = home.parent / "prepared"
    shutil.rmtree(kept, ignore_errors=True)
    make_source(home)
    call(verb, home, None, prepare=True)
    home.rename(kept)
    return kept


def restore(kept: Path, home: Path) -> None:
    """The home as the verb finds it when it starts."""
    shutil.rmtree(home, ignore_errors=True)
    shutil.copytree(kept, home, symlinks=True)


def faults(counts: list[int], stride: int, most: int) -> Iterator[Fault]:
    """Every action at every `stride`-th call, `most` calls of a kind at most (0: all)."""
    for kind, count in zip(KINDS, counts, strict=True):
        places = list(range(1, count + 1))[::stride]
        if most and len(places) > most:
            places = [places[k * (len(places) - 1) // max(1, most - 1)] for k in range(most)]
        for at in dict.fromkeys(places):
            yield Fault(kind, at, "kill")
            if kind == "write":
                yield Fault(kind, at, "half")
            if kind in ("write", "fsync", "rename", "mkdir"):
                yield Fault(kind, at, "ENOSPC" if at % 2 else "EIO")


def tried(verb: Verb, home: Path, kept: Path, fault: Fault, expected: dict[str, str]) -> str:
    """What is wrong after a fault and a second call; empty if nothing is."""
    restore(kept, home)
    source, before = bytes_of(home / "source"), contents(home)
    code, _, said = call(verb, home, fault)
    if bytes_of(home / "source") != source:
        return "the source was changed"
    if code == 0 and fault.action in ("kill", "half"):
        return ""  # another way through: the call of that number was not reached
    if fault.action in CODES and code not in CODES[fault.action]:
        return f"exit code {code}: {said[-300:]}"
    if wrong := _lost(before, contents(home), expected):
        return wrong
    code, _, said = call(verb, home, None)
    if code not in verb.again:
        return f"the second call ends with {code}: {said[-600:]}"
    after = contents(home)
    differ = sorted(name for name in {*after, *expected} if after.get(name) != expected.get(name))
    return f"after the second call these differ: {', '.join(differ)}" if differ else ""


def _lost(before: dict[str, str], after: dict[str, str], expected: dict[str, str]) -> str:
    """A result that stood there before is whole, or the new one is."""
    mine = {name: value for name, value in before.items() if name.partition("/")[0] == "out"}
    now = {name: value for name, value in after.items() if name in mine}
    new = {name: expected.get(name) for name in mine}
    return "" if now in (mine, new) else "the old result is neither whole nor replaced"


def main() -> int:
    """Exit code 1 if anything was not survived."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--verbs", default=",".join(verb.name for verb in VERBS))
    parser.add_argument("--stride", type=int, default=1)
    parser.add_argument("--most", type=int, default=0)
    asked = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    import prunella as pr
    import prunella.cli.app

    torch.set_num_threads(1)
    _ = pr.plan, pr.lottery.imp, pr.experiments.pareto, pr.llm.solve_folder, prunella.cli.app
    place = Path(tempfile.mkdtemp(prefix="prunella-faults-")).resolve()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    failures = 0
    try:
        for verb in (verb for verb in VERBS if verb.name in asked.verbs.split(",")):
            failures += survived(verb, place / "home", asked.stride, asked.most)
    finally:
        shutil.rmtree(place)
    return int(failures > 0)


def survived(verb: Verb, home: Path, stride: int, most: int) -> int:
    """All faults of one verb; how many were not survived."""
    kept = prepared(verb, home)
    restore(kept, home)
    warm_up(verb, home)
    restore(kept, home)
    code, counts, said = call(verb, home, None)
    if code:
        print(f"{verb.name}: exit code {code} without any fault: {said[-1000:]}", flush=True)
        return 1
    expected, failures, all_faults = contents(home), 0, list(faults(counts, stride, most))
    for number, fault in enumerate(all_faults):
        if number % 50 == 0:
            print(f"{verb.name}: {number} of {len(all_faults)}", file=sys.stderr, flush=True)
        if wrong := tried(verb, home, kept, fault, expected):
            failures += 1
            print(f"{verb.name}, {fault}: {wrong}", flush=True)
    print(f"{verb.name}: {len(all_faults)} faults, {failures} not survived", flush=True)
    return failures


if __name__ == "__main__":
    sys.exit(main())
