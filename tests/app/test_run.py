"""The parts of `run` that a command line cannot show."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset

from prunella.app.job import Job, Recovery, RecoveryStep, read_steps
from prunella.app.recover import Tick, outputs_by
from prunella.app.run import run, summary
from prunella.app.verify import check_folder
from prunella.errors import CheckFailed, Locked, RequestError, TargetMissed
from prunella.planning.recipe import Recipe
from prunella.targets import MACs
from prunella.types import Loss
from tests.sealed import to_format_1
from tests.stopping import beside


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)).eval()


def test_read_steps() -> None:
    assert read_steps("") == ()
    assert read_steps("bn, distill:20") == (RecoveryStep("bn"), RecoveryStep("distill", 20))
    assert [str(step) for step in read_steps("reconstruct,finetune:5")] == ["reconstruct", "finetune:5"]


@pytest.mark.parametrize("text", ["bn:3", "distill", "distill:", "distill:0", "distill:-1", "finetune:x", "sleep"])
def test_read_steps_refuses(text: str) -> None:
    with pytest.raises(RequestError, match="cannot read the recovery"):
        read_steps(text)


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
    job = Job(
        Recipe(),
        MACs(0.5),
        data=data,
        recovery=Recovery(read_steps("reconstruct,distill:2")),
        factory="tests.app.test_run:net",
    )
    outcome = run(model, torch.randn(2, 6), job, tmp_path / "out")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert outcome.plan.after.macs <= 0.5 * outcome.plan.before.macs
    assert sum(p.numel() for p in outcome.model.parameters()) == outcome.plan.after.params
    assert "distill:2" in str([item.step for item in outcome.recovered][1]) and outcome.recovered[1].curve is not None


def test_the_folder_is_locked_from_the_start_to_the_end(tmp_path: Path) -> None:
    told: dict[str, BaseException | None] = {}
    job = Job(Recipe(), MACs(0.5), factory="tests.app.test_run:net")

    @contextmanager
    def second(name: str, parts: int) -> Iterator[Tick]:
        yield lambda *_: None
        told[name] = beside(lambda: run(net(), torch.randn(2, 6), job, tmp_path / "out", overwrite=True))

    run(net(), torch.randn(2, 6), job, tmp_path / "out", stage=second)
    assert len(told) == 4 and {type(error) for error in told.values()} == {Locked}
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_stages_are_told_in_order(tmp_path: Path) -> None:
    told: list[str] = []

    @contextmanager
    def stage(name: str, parts: int) -> Iterator[Tick]:
        yield lambda *_: told.append(f"{name}, a part of {parts}")
        told.append(name)

    data = [torch.randn(8, 6)]
    job = Job(Recipe(), MACs(0.5), data=data, recovery=Recovery(read_steps("distill:2")), metric=lambda m: 1.0,
              factory="tests.app.test_run:net")  # fmt: skip
    outcome = run(net(), torch.randn(2, 6), job, tmp_path / "out", stage=stage)
    assert told[:2] == ["evaluating the dense model", "planning"] and told[-1] == "saving"
    assert told.count("recovering by distill:2, a part of 2") == 2
    assert list(outcome.seconds) == [name for name in told if "part of" not in name]


def test_metrics_by_name_are_in_the_table_before_and_after_recovery(tmp_path: Path) -> None:
    units = {"width": lambda m: m[0].out_features / 12, "first bias": lambda m: m[0].bias[0].item()}
    data = [torch.randn(32, 6)]
    job = Job(Recipe(), MACs(0.5), data=data, recovery=Recovery(read_steps("distill:3"), lr=0.1),
              metric=lambda m: {name: of(m) for name, of in units.items()}, factory="tests.app.test_run:net",
              about="a net of two layers")  # fmt: skip
    outcome = run(net(), torch.randn(2, 6), job, tmp_path / "out")
    assert outcome.before["width"] == 1 and outcome.cut["width"] == outcome.after["width"] == 0.5
    assert outcome.cut["first bias"] != outcome.after["first bias"]
    text = summary(outcome, job)["text"].splitlines()
    assert text[0] == "a net of two layers" and text[4].split() == ["dense", "cut", "recovered", "change"]
    row = next(line for line in text if line.startswith("first bias"))
    assert row.split()[2:5] == [f"{q['first bias']:.4g}" for q in (outcome.before, outcome.cut, outcome.after)]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Recovered</th>" in page and f"{outcome.cut['first bias']:.4g}" in page


def test_batches_and_a_loss_of_their_own_for_recovery(tmp_path: Path) -> None:
    """Each part of `Recovery` reaches its step."""
    seen: list[float] = []

    def imitate(dense: nn.Module) -> Loss:
        def loss(model: nn.Module, batch: Tensor) -> Tensor:
            seen.append(float(batch[0, 0]))
            return (model(batch) - dense(batch)).square().mean()

        return loss

    apart = Recovery(read_steps("distill:2"), [torch.full((4, 6), 7.0)], imitate=imitate)
    job = Job(Recipe(), MACs(0.5), data=[torch.zeros(4, 6)], recovery=apart, factory="tests.app.test_run:net")
    run(net(), torch.randn(2, 6), job, tmp_path / "out")
    assert seen == [7.0, 7.0]
    fits = []
    for ridge in (1e-2, 1e9):
        job = replace(job, data=[torch.randn(64, 6)], recovery=Recovery(read_steps("reconstruct"), ridge=ridge))
        outcome = run(net(), torch.randn(2, 6), job, tmp_path / f"{ridge:g}")
        fits.append((outcome.model(torch.ones(1, 6)) - net()(torch.ones(1, 6))).abs().sum().item())
    assert fits[0] != pytest.approx(fits[1], rel=1e-3)


@pytest.mark.parametrize(
    ("job", "missing"),
    [
        (Job(Recipe(), None, recovery=Recovery(read_steps("bn"))), "data="),
        (Job(Recipe(), None, recovery=Recovery(read_steps("bn"), data=[1])), "data="),
        (Job(Recipe(), None, recovery=Recovery(read_steps("finetune:1"), data=[1])), "loss="),
        (Job(Recipe(), None, max_drop=0.1), "metric="),
    ],
)
def test_what_a_job_lacks_is_named(job: Job, missing: str) -> None:
    with pytest.raises(RequestError, match=missing):
        job.check()


def test_a_record_of_version_0_1_is_read(tmp_path: Path) -> None:
    job = Job(Recipe(), MACs(0.5), factory="tests.app.test_run:net")
    run(net(), torch.randn(2, 6), job, tmp_path / "out")
    record = tmp_path / "out" / "run.json"
    assert json.loads(record.read_text())["format"] == 2
    to_format_1(tmp_path / "out")
    record.write_text(json.dumps({"text": "", "healed": [{"by": "bn", "result": ""}]}))
    assert check_folder(tmp_path / "out")[0].recovered == ("bn",)


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


def test_a_metric_that_is_no_number_any_more_is_a_drop(tmp_path: Path) -> None:
    def broken(model: nn.Module) -> float:
        return 1.0 if model[0].out_features == 12 else float("nan")  # type: ignore[index]

    job = Job(Recipe(), MACs(0.5), metric=broken, max_drop=0.1, factory="tests.app.test_run:net")
    with pytest.raises(CheckFailed, match="fell too far"):
        run(net(), torch.randn(2, 6), job, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


class Stream(IterableDataset[torch.Tensor]):
    """Has no length."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter([torch.full((6,), float(k)) for k in range(1, 17)])


def test_the_difference_is_of_the_data_where_there_is_some(tmp_path: Path) -> None:
    loader = DataLoader(Stream(), batch_size=8)
    how = Recovery(read_steps("reconstruct"))
    job = Job(Recipe(), MACs(0.5), data=loader, recovery=how, factory="tests.app.test_run:net")
    outcome = run(net(), torch.randn(2, 6), job, tmp_path / "out")
    batch = next(iter(loader))
    with torch.no_grad():
        dense, small = net().eval()(batch), outcome.model.eval()(batch)
    assert outcome.report.difference == pytest.approx(float((dense - small).abs().max() / dense.abs().max()), rel=1e-3)
    assert "on the first batch of the data" in str(outcome.report)
