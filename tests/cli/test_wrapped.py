"""Factories that return what people have: wrapped, compiled, averaged, under torch's pruning. Every verb takes them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import prunella as pr
from prunella.io.plan_file import load_plan
from tests.cli.conftest import Run

NETS = """
import dataclasses
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel

def plain():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))

def parallel():
    return nn.DataParallel(plain())

def compiled():
    return torch.compile(plain(), backend="eager")

def averaged():
    return AveragedModel(plain())

def twice():
    return torch.compile(nn.DataParallel(plain()), backend="eager")

def pruned():
    model = plain()
    prune.l1_unstructured(model[0], "weight", 0.3)
    return model

def pruned_parallel():
    return nn.DataParallel(pruned())

def normed():
    model = plain()
    parametrizations.weight_norm(model[0])
    return model

@dataclasses.dataclass
class Out:
    logits: torch.Tensor

class Shown(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = plain()

    def forward(self, x):
        return Out(self.net(x))

def metric(model):
    return float(model[0].out_features if hasattr(model, "__getitem__") else 1)
"""
WRAPPED = ["parallel", "compiled", "averaged", "twice", "pruned", "pruned_parallel", "normed", "Shown"]
HALF = ("--inputs", "2x8", "--target", "macs=0.6")


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    name = f"nets_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(NETS)
    return name


@pytest.mark.parametrize("name", WRAPPED)
def test_a_run_is_written_verified_and_read_again(prunella: Run, nets: str, name: str) -> None:
    result = prunella("run", f"{nets}:{name}", *HALF, "-o", "out")
    assert result.code == 0, result.err
    verified = prunella("verify", "out")
    assert verified.code == 0, verified.err
    factory = getattr(__import__(nets), name)
    small = pr.load("out", factory=factory)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in factory().parameters())


@pytest.mark.parametrize("name", WRAPPED)
def test_the_numbers_of_the_verbs_are_those_of_the_bare_model(prunella: Run, nets: str, name: str) -> None:
    inspected = prunella("inspect", f"{nets}:{name}", "--inputs", "2x8", "--json")
    planned = prunella("plan", f"{nets}:{name}", *HALF, "-o", "x.plan", "--json")
    assert inspected.code == planned.code == 0, inspected.err + planned.err
    macs = 2 * (8 * 16 + 16 * 16 + 16 * 4)
    assert inspected.data["macs"] == macs == load_plan("x.plan").before.macs
    scanned = prunella("scan", f"{nets}:{name}", "--inputs", "2x8", "--ratios", "0.5", "--metric", f"{nets}:metric")
    assert scanned.code == 0, scanned.err


def test_a_wrapped_factory_rebuilds_in_python_too(tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()

    def wrapped() -> nn.Module:
        return nn.DataParallel(make())

    x = torch.randn(2, 8)
    plan = pr.plan(wrapped(), x, target=pr.MACs(0.5))
    small = pr.shrink(wrapped(), plan)
    for k, factory in enumerate((make, wrapped)):
        saved = pr.save(small, tmp_path / str(k), plan=plan, factory=factory)
        for again in (make, wrapped):
            assert torch.equal(pr.load(saved.path, factory=again)(x), small(x))
