"""A program gives what the model gives after the same target, and is written and read like any other model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.oracle import check_exact, distance, produced_by, run, settle
from tests.zoo.convolutional import ResNet
from torch import Tensor, nn

import prunella
from prunella.errors import CheckFailed, NotSupported, RequestError
from prunella.graph.solve.groups import couple
from prunella.graph.verify import verify
from prunella.io.exported import load_exported
from prunella.model.forward import forward
from prunella.planning.plan import Plan
from prunella.targets import Params

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
BOTH = prunella.Recipe(granularity=(prunella.Channel(), prunella.Head()))
X = torch.linspace(-1, 1, 24).view(3, 8) ** 3


class Typed(nn.Module):
    """Nothing can be cut where the sizes stand; four units of three neurons can in the program."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 12), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).view(x.shape[0], 3, 4)
        out: Tensor = self.last(F.relu(y[:, 0]) * y[:, 1] + y[:, 2])
        return out


def shrunk() -> tuple[nn.Module, Plan, nn.Module]:
    program = prunella.as_program(settle(Typed()), X)
    plan = prunella.plan(program, X, target=Params(0.6))
    return program, plan, prunella.shrink(program, plan)


def pruned(model: nn.Module, inputs: Any, value: float) -> tuple[Plan, nn.Module]:
    plan = prunella.plan(model, inputs, BOTH, target=Params(value))
    small = prunella.shrink(model, plan)
    assert verify(model, small, plan.changes, inputs).error <= 1e-9
    return plan, small


def same_both_ways(model: nn.Module, inputs: Any, value: float) -> None:
    """Directly and through the program: the same cuts, the same outputs."""
    (plan, small), (other, program) = (
        pruned(model, inputs, value),
        pruned(prunella.as_program(model, inputs), inputs, value),
    )
    assert (plan.before, plan.after) == (other.before, other.after) and plan.after.params < plan.before.params
    assert plan.keep.keys() == other.keep.keys()
    assert all(torch.equal(plan.keep[name], other.keep[name]) for name in plan.keep)
    shapes = {name: p.shape for name, p in small.state_dict().items()}
    assert shapes == {name: p.shape for name, p in program.state_dict().items()}
    assert distance(run(program, inputs), run(small, inputs)) <= 1e-5


def test_a_residual_network_both_ways() -> None:
    same_both_ways(settle(ResNet()), torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)), 0.5)


@pytest.mark.parametrize("name", ["bert", "llama", "vit", "gpt2"])
def test_transformers_both_ways(name: str) -> None:
    pytest.importorskip("transformers")
    from tests.zoo.test_transformers import FAMILIES, inputs_of

    family = FAMILIES[name]
    model = settle(family.build())
    inputs: Mapping[str, Any] = inputs_of(family)
    same_both_ways(model, inputs, 0.8)


def test_a_program_is_written_as_pt2_and_cut_again_from_there(tmp_path: Path) -> None:
    _, _, small = shrunk()
    made = prunella.export(small, tmp_path / "small.pt2", inputs=X)
    assert made.dynamic and made.difference is not None and made.difference <= 1e-6
    again = load_exported(made.path)[0]
    assert list(again.state_dict()) == list(small.state_dict())
    torch.testing.assert_close(again(X[:2]), small(X[:2]))
    size = small.get_parameter("last.weight").shape[1]
    checked = check_exact(again, X, fraction=0.5)
    assert produced_by(checked.graph, "first").size == size > 1
    assert checked.small.get_parameter("last.weight").shape[1] == size - max(1, round(size / 2))


def test_a_program_is_written_as_onnx(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    _, _, small = shrunk()
    made = prunella.export(small, tmp_path / "small.onnx", inputs=X)
    assert made.difference is not None and made.difference <= 1e-5


def test_a_program_is_saved_and_loaded(tmp_path: Path) -> None:
    _, plan, small = shrunk()
    saved = prunella.save(small, tmp_path / "out", plan=plan)
    assert "program.pt2" in saved.files and saved.reader == "prunella.load"
    again = prunella.load(tmp_path / "out")
    assert list(again.state_dict()) == list(small.state_dict())
    assert torch.equal(again(X), small(X))
    with pytest.raises(RequestError, match="saved with its plan"):
        prunella.save(small, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_changed_program_is_refused(tmp_path: Path) -> None:
    _, plan, small = shrunk()
    prunella.save(small, tmp_path / "out", plan=plan)
    file = tmp_path / "out" / "program.pt2"
    file.write_bytes(file.read_bytes()[:-7] + b"garbage")
    with pytest.raises(prunella.PruningError, match="damaged"):
        prunella.load(tmp_path / "out")


class Branching(nn.Module):
    """Decides by a value, which no program can."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out if out.sum() > 0 else -out


def test_what_cannot_be_captured_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(NotSupported, match="cannot capture this model"):
        prunella.as_program(Branching(), X)
    assert capsys.readouterr().err == ""


def test_a_program_that_computes_something_else_is_not_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    from prunella.graph.program import capture as module

    def corrupted(exported: Any) -> nn.Module:
        made = module_of(exported)
        with torch.no_grad():
            next(made.parameters()).add_(1)
        return made

    from prunella.graph.program.literals import module_of

    monkeypatch.setattr(module, "module_of", corrupted)
    with pytest.raises(CheckFailed, match="does not compute what the model computes"):
        prunella.as_program(Typed(), X)


class Fixed(Typed):
    """The batch is typed in too."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).view(3, 3, 4)
        out: Tensor = self.last(y[:, 0] * y[:, 1] + y[:, 2])
        return out


def test_a_typed_batch_stays() -> None:
    program = prunella.as_program(settle(Fixed()), X)
    graph = couple(program, X)
    assert produced_by(graph, "first").size == 4
    check_exact(program, X)


def test_a_part_without_gradients_stays_so() -> None:
    class Watched(Typed):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                y = self.first(x).view(x.shape[0], 3, 4)
            out: Tensor = self.last(y[:, 0] * y[:, 1] + y[:, 2])
            return out

    program = prunella.as_program(settle(Watched()), X)
    assert produced_by(check_exact(program, X).graph, "first").size == 4
    copied = copy.deepcopy(program)
    forward(copied, X).sum().backward()
    assert copied.get_parameter("first.weight").grad is None and copied.get_parameter("last.weight").grad is not None
