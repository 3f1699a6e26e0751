"""A full disk is exit 5 whatever verb meets it, and whatever library reports it; nothing half written is left."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

from prunella.cli.console import explain_error
from prunella.errors import NotSupported
from prunella.io import nested, state
from tests.cli.conftest import Run

IMAGE = ("--inputs", "1x3x8x8")
HALF = ("--target", "macs=0.5")
VERBS = [
    ("plan", "{shop}:net", *IMAGE, *HALF, "-o", "x.plan"),
    ("run", "{shop}:net", *IMAGE, *HALF, "-o", "out"),
    ("export", "{shop}:net", *IMAGE, "-o", "x.safetensors"),
    ("export", "{shop}:net", *IMAGE, "-o", "x.pt2"),
    ("inspect", "{shop}:net", *IMAGE, "--html", "x.html"),
]


def left() -> list[str]:
    return sorted(path.name for path in Path.cwd().iterdir() if path.name != "__pycache__" and path.suffix != ".py")


@pytest.mark.parametrize("words", VERBS)
def test_the_system_says_so(prunella: Run, shop: str, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    result = prunella(*(word.replace("{shop}", shop) for word in words), "--json")
    assert result.code == 5 and "the disk is full" in result.err and "Traceback" not in result.err, result.err
    assert result.data["exit"] == 5 and left() == []


@pytest.mark.parametrize("words", VERBS[:3])
def test_a_library_says_so(prunella: Run, shop: str, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(nested, "save_file", full)
    monkeypatch.setattr(state, "save_file", full)
    result = prunella(*(word.replace("{shop}", shop) for word in words))
    assert result.code == 5 and "the disk is full" in result.err and left() == [], result.err


def test_memory_that_is_short_in_the_middle_of_a_step(prunella: Run, shop: str) -> None:
    """The model does not run on its example; but that is not for the example's shape."""
    module = Path(f"{shop}.py")
    lines = "model = net()", "model[0].register_forward_pre_hook(lambda *_: hungry())", "return model"
    tight = "\n    ".join(("def tight():", *lines))
    module.write_text(f"{module.read_text()}\n\n{tight}\n")
    result = prunella("plan", f"{shop}:tight", *IMAGE, *HALF, "-o", "x.plan")
    assert result.code == 5 and "out of memory" in result.err and "8 TiB" in result.err and left() == [], result.err


@pytest.mark.parametrize("cause", [MemoryError("8 TiB"), OSError(errno.ENOSPC, "No space left on device")])
def test_an_error_that_is_the_last_of_two(cause: Exception) -> None:
    """What the step says is not the reason: the reason is what the system said."""
    error = NotSupported("the smaller model does not run", "a size does not follow the cut")
    error.__cause__ = RuntimeError("the forward failed")
    error.__cause__.__cause__ = cause
    trouble = explain_error(error)
    assert trouble.code == 5 and trouble.what == error.what and str(cause) in trouble.why


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a disk that is always full")
@pytest.mark.parametrize("extra", ["", "--json"])
def test_stdout_on_a_full_disk(tmp_path: Path, extra: str) -> None:
    line = f"{sys.executable} -m prunella methods {extra} > /dev/full"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 5 and "the disk is full" in done.stderr and "Traceback" not in done.stderr
