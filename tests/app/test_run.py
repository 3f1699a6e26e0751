"""The parts of `run` that a command line cannot show."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from prunella.app.run import Heal, Job, outputs_by, read_heal, run
from prunella.errors import CheckFailed, Locked, RequestError, TargetMissed
from prunella.planning.recipe import Recipe
from prunella.targets import MACs
from tests.stopping import beside


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)).eval()


def test_read_heal() -> None:
    assert read_heal("") == ()
    assert read_heal("bn, distill:20") == (Heal("bn"), Heal("distill", 20))
    assert [str(step) for step in read_heal("reconstruct,finetune:5")] == ["reconstruct", "finetune:5"]


@pytest.mark.parametrize("text", ["bn:3", "distill", "distill:", "distill:0", "distill:-1", "finetune:x", "sleep"])
def test_read_heal_refuses(text: str) -> None:
    with pytest.raises(RequestError, match="cannot read the healing"):
        read_heal(text)


def test_outputs_by_the_loss_are_the_outputs_of_the_model() -> None:
    model, x, y = net(), torch.randn(4, 6), torch.tensor([0, 1, 2, 0])
    outputs = outputs_by(lambda m, b: cross_entropy(m(b[0]), b[1]))
    assert torch.equal(outputs(model, (x, y)), model(x))
    assert not model._forward_hooks


def test_outputs_by_a_loss_that_never_calls_the_model() -> None:
    with pytest.raises(RequestError, match="does not call the model"):
        outputs_by(lambda m, b: torch.zeros(()))(net(), None)


def test_the_model_stays_as_it_is(tmp_path: Path) -> None:
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = [torch.randn(8, 6) for _ in range(2)]
    job = Job(Recipe(), MACs(0.5), data=data, heal=read_heal("reconstruct,distill:2"), factory="tests.app.test_run:net")
    outcome = run(model, torch.randn(2, 6), job, tmp_path / "out")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert outcome.plan.after.macs <= 0.5 * outcome.plan.before.macs
    assert sum(p.numel() for p in outcome.model.parameters()) == outcome.plan.after.params
    assert "distill:2" in str([item.step for item in outcome.healed][1]) and outcome.healed[1].curve is not None


def test_the_folder_is_locked_from_the_start_to_the_end(tmp_path: Path) -> None:
    told: dict[str, BaseException | None] = {}
    job = Job(Recipe(), MACs(0.5), factory="tests.app.test_run:net")

    def second(name: str, seconds: float) -> None:
        told[name] = beside(lambda: run(net(), torch.randn(2, 6), job, tmp_path / "out", overwrite=True))

    run(net(), torch.randn(2, 6), job, tmp_path / "out", on_stage=second)
    assert len(told) == 4 and {type(error) for error in told.values()} == {Locked}
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_stages_are_told_in_order(tmp_path: Path) -> None:
    told: list[str] = []
    job = Job(Recipe(), MACs(0.5), factory="tests.app.test_run:net", metric=lambda m: 1.0)
    run(net(), torch.randn(2, 6), job, tmp_path / "out", on_stage=lambda name, seconds: told.append(name))
    assert told[0] == "planning" and "saving" in told and told.index("saving") > told.index("planning")


@pytest.mark.parametrize(("target", "drop", "error"), [(MACs(1e-6), None, TargetMissed), (MACs(0.5), 0.1, CheckFailed)])
def test_what_is_missed_writes_nothing(
    tmp_path: Path, target: MACs, drop: float | None, error: type[Exception]
) -> None:
    def units(model: nn.Module) -> float:
        return sum(p.numel() for p in model.parameters()) / 123

    job = Job(Recipe(), target, metric=units, max_drop=drop, factory="tests.app.test_run:net")
    with pytest.raises(error):
        run(net(), torch.randn(2, 6), job, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
