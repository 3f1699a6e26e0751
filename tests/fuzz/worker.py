"""Changes files and reads them for a while, in this process: `python -m tests.fuzz.worker SECONDS [READER ...]`.

Prints one line of JSON for each finding, with what makes it again (`--case NUMBER` and the reader). A finding is: an
error that is not the package's own or has an exit code other than 3, more than a second (of the processor) or 200 MB,
and changed tensors that were accepted although a digest covers them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
warnings.simplefilter("ignore")

from prunella.cli.console import explain_error  # noqa: E402
from prunella.errors import PruningError  # noqa: E402
from tests.fuzz.mutate import archive_changed, flipped, header_changed, json_changed  # noqa: E402
from tests.fuzz.readers import READERS, Reader  # noqa: E402

SEED = 20261130
MEMORY = 200 << 20
SECONDS = 1.0
HANGS = 20
"""Seconds after which a read is given up."""
ALLOWED = {2, 3, 6}
"""Exit codes: misuse (a dense folder read as a sparse one), a bad file, and what is sound but not supported."""


class TooLong(BaseException):
    """A read that does not end."""


def _give_up(signal_number: int, frame: object) -> None:
    raise TooLong


def changed(file: Path, rng: random.Random, other: bytes) -> None:
    """Change a file in the manner of its kind, or as bytes."""
    data, blind = file.read_bytes(), rng.random() < 0.4
    try:
        if blind or not data:
            data = flipped(data, rng, other)
        elif data[:2] == b"PK":
            data = archive_changed(data, rng, other)
        elif file.suffix == ".json":
            data = json_changed(data, rng)
        elif file.suffix in (".safetensors", ".plan"):
            data = header_changed(data, rng, (lambda text: json_changed(text, rng)) if rng.random() < 0.7 else None)
        else:
            data = flipped(data, rng, other)
    except (ValueError, AttributeError, TypeError, KeyError):
        data = flipped(data, rng, other)
    file.write_bytes(data)


class Fuzz:
    """One reader with its sound folder."""

    def __init__(self, reader: Reader, home: Path) -> None:
        self.reader, self.sound, self.folder = reader, home / "sound", home / "x"
        shutil.rmtree(home, ignore_errors=True)
        self.sound.mkdir(parents=True)
        reader.build(self.sound)
        self._restore()
        self.tensors = reader.read(self.folder)
        self._restore()
        reader.read(self.folder)  # twice, so that what is loaded at the first read does not count

    def _restore(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.sound, self.folder)

    def case(self, number: int) -> str | None:
        """What is wrong with a case, if anything."""
        rng = random.Random(f"{SEED}:{self.reader.name}:{number}")
        self._restore()
        files = sorted(file for file in self.folder.rglob("*") if file.is_file())
        file = rng.choice(files)
        changed(file, rng, rng.choice(files).read_bytes())
        signed = self.reader.resign is not None and rng.random() < 0.5
        if signed and self.reader.resign is not None:
            self.reader.resign(self.folder)
        start = time.process_time()
        signal.alarm(HANGS)
        try:
            tensors = self.reader.read(self.folder)
        except PruningError as error:
            code = explain_error(error).code
            wrong = f"exit {code}: {error}" if code not in ALLOWED else None
        except TooLong:
            wrong = f"no end within {HANGS} s\n{traceback.format_exc()[-1500:]}"
        except BaseException as error:
            wrong = f"{type(error).__name__}: {error}\n{traceback.format_exc()[-1500:]}"
        else:
            wrong = None if signed or not self.reader.covered else self._difference(tensors)
        finally:
            signal.alarm(0)
        took = time.process_time() - start
        return wrong or (f"{took:.1f} s" if took > SECONDS * (3 if self.reader.slow else 1) else None)

    def _difference(self, tensors: object) -> str | None:
        wanted = self.tensors or {}
        if not isinstance(tensors, dict) or tensors.keys() != wanted.keys():
            return "other tensors were accepted"
        different = [n for n, t in wanted.items() if tensors[n].shape != t.shape or not tensors[n].equal(t)]
        return f"changed and accepted: {different[0]}" if different else None


def cases(seconds: float, names: list[str], first: int) -> Iterator[dict[str, object]]:
    """Findings, reader by reader in turns until the time is over."""
    with tempfile.TemporaryDirectory() as home:
        fuzzes = [Fuzz(r, Path(home, r.name.replace(" ", "_"))) for r in READERS if not names or r.name in names]
        pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (pages + MEMORY + (64 << 20), resource.RLIM_INFINITY))
        signal.signal(signal.SIGALRM, _give_up)
        end, number, done = time.monotonic() + seconds, first, 0
        while time.monotonic() < end:
            for fuzz in fuzzes:
                for step in range(1 if fuzz.reader.slow else 8):
                    done += 1
                    if wrong := fuzz.case(8 * number + step):
                        yield {"reader": fuzz.reader.name, "case": 8 * number + step, "wrong": wrong}
                if time.monotonic() > end:
                    break
            number += 1
        yield {"done": done}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("seconds", type=float)
    parser.add_argument("readers", nargs="*")
    parser.add_argument("--first", type=int, default=0, help="number of the first round")
    parser.add_argument("--case", type=int, help="only this case of one reader")
    words = parser.parse_args()
    if words.case is not None:
        with tempfile.TemporaryDirectory() as home:
            signal.signal(signal.SIGALRM, _give_up)
            fuzz = Fuzz(next(r for r in READERS if r.name == words.readers[0]), Path(home))
            print(fuzz.case(words.case))
        return
    for found in cases(words.seconds, words.readers, words.first):
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
    sys.exit(0)
