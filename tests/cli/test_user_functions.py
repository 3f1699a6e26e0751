"""What a function of the user raises is told as theirs, with its line and exit code 2 or 3, never as a bug."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Run

JOB = """
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from prunella.errors import PruningError

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()

def seeded(seed):
    raise RuntimeError("no such seed")

def batch():
    return torch.randn(2, 8)

def raises(model):
    raise RuntimeError("mine")

def nothing(model):
    return None

def words(model):
    return {"top1": "good"}

def bad_loss(model, batch):
    raise KeyError("label")

def loss(model, batch):
    return cross_entropy(model(batch[0]), batch[1])

def data():
    return [(torch.randn(4, 8), torch.full((4,), 99))]

def wide():
    return [torch.randn(4, 9)]

def misses(model):
    from prunella.errors import TargetMissed
    raise TargetMissed("not today")

class Own(PruningError):
    pass

def own_error(model, batch):
    model(batch[0])
    raise Own("mine")

def leaves():
    yield torch.randn(4, 8)
    raise SystemExit(0)

def stops():
    yield torch.randn(4, 8)
    next(iter([]))

def no_file():
    yield torch.randn(4, 8)
    open("labels.csv")

def breaks_off():
    yield torch.randn(4, 8)
    raises(1)
"""
HALF = ("--inputs", "2x8", "--target", "macs=0.5")


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of the user's module; the current folder is the one that holds it."""
    monkeypatch.chdir(tmp_path)
    name = f"job_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(JOB)
    return name


@pytest.mark.parametrize(
    ("words", "code", "say"),
    [
        (("run", "--metric", "{}:raises", *HALF), 3, "in raises"),
        (("run", "--metric", "{}:nothing", *HALF), 2, "--metric must return one number"),
        (("run", "--metric", "{}:words", *HALF), 2, "must return one number"),
        (("run", "--metric", "math:sqrt", *HALF), 3, "must be real number"),
        (("scan", "--metric", "{}:raises", "--inputs", "2x8", "--ratios", "0.5"), 3, "RuntimeError: mine"),
        (("scan", "--metric", "{}:nothing", "--inputs", "2x8", "--ratios", "0.5"), 2, "must return one number"),
        (("run", "--recipe", "taylor", "--data", "{}:data", "--loss", "{}:bad_loss", *HALF), 3, "in bad_loss"),
        (("run", "--recipe", "taylor", "--data", "{}:data", "--loss", "{}:loss", *HALF), 3, "Target 99"),
        (("run", "--recipe", "apoz", "--data", "{}:wide", *HALF), 3, "4x9 and 8x16"),
        (("plan", "--recipe", "apoz", "--data", "{}:breaks_off", *HALF), 3, "called from"),
        (("run", "--metric", "{}:misses", *HALF), 3, "in misses"),
        (("run", "--recipe", "taylor", "--data", "{}:data", "--loss", "{}:own_error", *HALF), 3, "in own_error"),
        (("plan", "--recipe", "apoz", "--data", "{}:leaves", *HALF), 3, "in leaves"),
        (("plan", "--recipe", "apoz", "--data", "{}:stops", *HALF), 3, "in stops"),
        (("plan", "--recipe", "apoz", "--data", "{}:no_file", *HALF), 3, "in no_file"),
        (("plan", "--recipe", "apoz", "--data", "{}:raises", *HALF), 3, "missing 1 required"),
    ],
)
def test_a_function_that_fails(prunella: Run, job: str, words: tuple[str, ...], code: int, say: str) -> None:
    verb, *rest = (word.format(job) for word in words)
    result = prunella(verb, f"{job}:net", *rest, "-o", "out")
    assert result.code == code, result.err
    assert say in result.err and "bug in prunella" not in result.err and "Traceback" not in result.err
    assert result.out == "" and (verb == "scan" or not Path("out").exists())  # a scan keeps its journal


def test_frames_are_in_the_json_too(prunella: Run, job: str) -> None:
    result = prunella("run", f"{job}:net", "--metric", f"{job}:raises", *HALF, "--json")
    assert result.code == 3 and "in raises" in result.data["frames"][0]


def test_a_maker_that_fails_fails_its_cells(prunella: Run, job: str, caplog: pytest.LogCaptureFixture) -> None:
    result = prunella(
        "pareto", f"{job}:seeded", "--metric", f"{job}:raises", "--inputs", f"{job}:batch", "--ratios", "2",
        "--seeds", "1", "-o", "out",
    )  # fmt: skip
    assert result.code != 70 and "no such seed" in result.out + result.err
    assert "in seeded" in caplog.text


REFUSES = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x):
        if x.shape[0] != 3:
            raise ValueError("three rows, please")
        return self.b(torch.relu(self.a(x)))
"""


@pytest.mark.parametrize("verb", ["plan", "inspect"])
def test_the_words_of_a_model_that_refuses_are_told(
    prunella: Run, verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"{verb}_refuses.py").write_text(REFUSES)
    target = ("--target", "macs=0.5", "-o", "out") if verb == "plan" else ()
    result = prunella(verb, f"{verb}_refuses.py:Net", "--inputs", "2x8", *target)
    assert result.code == 3 and "three rows, please" in result.err and "in forward" in result.err
    assert "give inputs" not in result.err and "Linear(" not in result.err
    assert prunella(verb, f"{verb}_refuses.py:Net", "--inputs", "3x8", *target).code == 0


NEEDS = """
import torch
from torch import nn

def wide(width, *, seed):
    return nn.Linear(8, width)

def fitting(width=16):
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 4))

def inner():
    return wide(3)

class Net(nn.Module):
    def __init__(self, width):
        super().__init__()
"""


@pytest.mark.parametrize(("name", "missing"), [("wide", "wide() missing 1 required"), ("Net", "'width'")])
def test_a_factory_with_arguments_is_told_what_to_give(
    prunella: Run, name: str, missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / f"needs_{name}.py").write_text(NEEDS)
    result = prunella("plan", f"needs_{name}.py:{name}", *HALF, "-o", "out")
    assert result.code == 3 and missing in result.err and "fix it there" not in result.err
    assert "give a function that takes no arguments" in result.err
    assert prunella("plan", f"needs_{name}.py:fitting", *HALF, "-o", "out").code == 0
    inner = prunella("plan", f"needs_{name}.py:inner", *HALF, "-o", "out")
    assert inner.code == 3 and "in inner: return wide(3)" in inner.err and "fix it there" in inner.err
