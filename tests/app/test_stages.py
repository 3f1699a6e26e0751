"""A run that is killed goes on from the last stage, publishes all or nothing, and refuses what has changed."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunella.app import run as app
from prunella.app.job import Job, Recovery, read_steps
from prunella.app.recover import Tick
from prunella.app.stages import clean_finished, folder_of
from prunella.app.verify import check_folder
from prunella.errors import BadInput, CheckFailed, RequestError
from prunella.io.artifact import load
from prunella.io.journal import NAME, open_journal
from prunella.io.lock import Holder, lock_file
from prunella.planning.recipe import Recipe
from prunella.recovery import checkpoint
from prunella.recovery.finetune import Training, finetune
from prunella.targets import MACs
from tests.stopping import killed

X = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.5), nn.Linear(12, 3)).eval()


def data(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 6, generator=generator) for _ in range(3)]


def metric(model: nn.Module) -> float:
    return float(model(X).detach().square().mean())


def other(model: nn.Module) -> float:
    return float(model(X).detach().abs().mean())


JOB = Job(Recipe(), MACs(0.5), data=data(), recovery=Recovery(read_steps("bn,distill:4,reconstruct"), lr=0.1),
          metric=metric, factory="tests.app.test_stages:net")  # fmt: skip
STAGES = ("planning", "evaluating the cut model", "recovering by bn", "recovering by distill:4", "saving")


def dying(stage: str, *, at_tick: int = 0) -> app.Stage:
    """Kills the process when a stage has begun, or at a part of it."""
    ticks: list[int] = []

    @contextmanager
    def show(name: str, parts: int) -> Iterator[Tick]:
        if name == stage and not at_tick:
            os.kill(os.getpid(), signal.SIGKILL)

        def tick(*_: object) -> None:
            ticks.append(1)
            if name == stage and len(ticks) == at_tick:
                os.kill(os.getpid(), signal.SIGKILL)

        yield tick

    return show


def run(folder: Path, job: Job = JOB, **more: Any) -> app.Outcome:
    torch.manual_seed(7)
    return app.run(net(), X, job, folder, **more)


def weights(folder: Path) -> dict[str, Tensor]:
    return dict(load(folder, factory=net).state_dict())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The weights of a run that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    run(folder)
    return weights(folder)


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_run_goes_on_with_the_same_bits(tmp_path: Path, whole: dict[str, Tensor], stage: str) -> None:
    assert killed(lambda: run(tmp_path / "out", stage=dying(stage))) == -signal.SIGKILL
    assert not (tmp_path / "out").exists() and folder_of(tmp_path / "out").is_dir()
    outcome = run(tmp_path / "out")
    resumed = weights(tmp_path / "out")
    assert resumed.keys() == whole.keys() and all(resumed[name].equal(whole[name]) for name in whole)
    assert [item.step.kind for item in outcome.recovered] == ["bn", "distill", "reconstruct"]
    assert outcome.recovered[1].curve is not None and len(outcome.recovered[1].curve.loss) == 4
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_a_training_goes_on_within_its_stage(
    tmp_path: Path, whole: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    stopping = dying("recovering by distill:4", at_tick=3)
    assert killed(lambda: run(tmp_path / "out", stage=stopping)) == -signal.SIGKILL
    told: list[str] = []

    @contextmanager
    def show(name: str, parts: int) -> Iterator[Tick]:
        yield lambda *_: told.append(name)

    run(tmp_path / "out", stage=show)
    assert told.count("recovering by distill:4") == 1  # the last of the four
    resumed = weights(tmp_path / "out")
    assert all(resumed[name].equal(whole[name]) for name in whole)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"metric": other}, "metric"),
        ({"data": data(1)}, "data"),
        ({"target": MACs(0.6)}, "target"),
        ({"skip": ("0",)}, "skip"),
        ({"recipe": Recipe(min_density=0.2)}, "recipe"),
        ({"recovery": replace(JOB.recovery, lr=0.2)}, "lr"),
    ],
)
def test_what_changed_is_named(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    assert killed(lambda: run(tmp_path / "out", stage=dying("recovering by bn"))) == -signal.SIGKILL
    kept = sorted(folder_of(tmp_path / "out").glob("*.safetensors"))
    with pytest.raises(RequestError, match=rf"is not continued\nit holds another run: its {said} changed"):
        run(tmp_path / "out", replace(JOB, **changed))
    assert sorted(folder_of(tmp_path / "out").glob("*.safetensors")) == kept
    model = net()
    with torch.no_grad():
        model[0].weight[0, 0] += 1e-6
    with pytest.raises(RequestError, match="its weights changed"):
        app.run(model, X, JOB, tmp_path / "out")


def test_a_flipped_bit_in_what_is_kept_is_refused(tmp_path: Path) -> None:
    assert killed(lambda: run(tmp_path / "out", stage=dying("saving"))) == -signal.SIGKILL
    for file in sorted(folder_of(tmp_path / "out").glob("*.safetensors")):
        sound = file.read_bytes()
        content = bytearray(sound)
        content[-1] ^= 1
        file.write_bytes(content)
        with pytest.raises(BadInput, match="is damaged"):
            run(tmp_path / "out")
        file.write_bytes(sound)
    run(tmp_path / "out")


def test_a_verdict_keeps_nothing_and_a_stop_keeps_what_is_done(tmp_path: Path) -> None:
    with pytest.raises(CheckFailed):
        run(tmp_path / "out", replace(JOB, max_drop=-1e9))
    assert list(tmp_path.iterdir()) == []

    @contextmanager
    def stopped(name: str, parts: int) -> Iterator[Tick]:
        if name == "recovering by bn":
            raise KeyboardInterrupt
        yield lambda *_: None

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", stage=stopped)
    assert list(tmp_path.iterdir()) == [folder_of(tmp_path / "out")]
    run(tmp_path / "out")


def test_the_output_appears_with_its_report_and_record_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def publish() -> None:
        monkeypatch.setattr(app.Stages, "finish", die)
        run(tmp_path / "out")

    assert killed(publish) == -signal.SIGKILL and not (tmp_path / "out").exists()
    run(tmp_path / "out")
    assert {"run.json", "manifest.json", "model.safetensors", "plan.safetensors"} <= set(os.listdir(tmp_path / "out"))
    assert os.listdir(tmp_path) == ["out"]


def test_a_flipped_bit_in_any_file_of_a_run_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "out", replace(JOB, recovery=Recovery()))
    for file in sorted((tmp_path / "out").iterdir()):
        sound = file.read_bytes()
        for place in (0, len(sound) // 2, len(sound) - 1):
            content = bytearray(sound)
            content[place] ^= 1
            file.write_bytes(content)
            with pytest.raises(BadInput):
                check_folder(tmp_path / "out", factory=net)
        file.write_bytes(sound)
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    (tmp_path / "out" / "run.json").write_text(json.dumps({**record, "format": 99}))
    with pytest.raises(BadInput):
        check_folder(tmp_path / "out", factory=net)


def test_finetune_goes_on_from_its_file_and_refuses_another_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    batches = [(x, x[:, :3]) for x in data()]
    loader = torch.utils.data.DataLoader(batches, batch_size=None, shuffle=True)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return (model(batch[0]) - batch[1]).square().mean()

    def train(model: nn.Module, path: Path | None, *, lr: float = 0.1, stop: int = 0) -> list[float]:
        def on_step(step: int, value: float, rate: float) -> None:
            if step + 1 == stop:
                os.kill(os.getpid(), signal.SIGKILL)

        how = Training(checkpoint=path)
        return list(finetune(model, loader, loss, steps=8, lr=lr, training=how, on_step=on_step).loss)

    plain, file = net(), tmp_path / "training.safetensors"
    expected = train(plain, None)
    for stop in (3, 4, 6):  # at the end of an epoch, and inside
        file.unlink(missing_ok=True)
        assert killed(lambda stop=stop: train(net(), file, stop=stop)) == -signal.SIGKILL  # type: ignore[misc]
        resumed = net()
        with pytest.raises(RequestError, match="another training: its lr changed"):
            train(resumed, file, lr=0.2)
        sound = file.read_bytes()
        file.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
        with pytest.raises(BadInput, match="damaged"):
            train(net(), file)
        file.write_bytes(sound)
        assert train(resumed, file) == expected
        assert all(a.equal(b) for a, b in zip(plain.state_dict().values(), resumed.state_dict().values(), strict=True))


def noisy(model: nn.Module) -> float:
    """A metric that draws from the generators of the caller."""
    return float(torch.rand(()))


def test_random_generators_go_on_too(tmp_path: Path) -> None:
    job = replace(JOB, metric=noisy, recovery=Recovery(read_steps("bn")))
    whole = run(tmp_path / "whole", job)
    assert killed(lambda: run(tmp_path / "out", job, stage=dying("evaluating the recovered model"))) == -signal.SIGKILL
    torch.manual_seed(8)
    resumed = app.run(net(), X, job, tmp_path / "out")
    assert (resumed.before, resumed.cut, resumed.after) == (whole.before, whole.cut, whole.after)


def test_a_folder_of_somebody_else_is_not_taken_for_stages(tmp_path: Path) -> None:
    folder_of(tmp_path / "out").mkdir()
    (folder_of(tmp_path / "out") / "thesis.tex").write_text("years")
    with pytest.raises(RequestError, match=r"is in the way\nit holds thesis.tex"):
        run(tmp_path / "out")
    assert (folder_of(tmp_path / "out") / "thesis.tex").read_text() == "years"


def test_nothing_is_cleaned_while_another_machine_writes_the_output(tmp_path: Path) -> None:
    """Its stages look as if their run had ended, and are those of a run that has just begun."""
    output = tmp_path / "out"
    with open_journal(folder_of(output)):
        pass
    (folder_of(output) / NAME).unlink()
    lock_file(output).write_text(Holder(7, "elsewhere", 1.7e9).text())
    clean_finished(output)
    assert folder_of(output).is_dir()
    lock_file(output).unlink()
    clean_finished(output)
    assert not folder_of(output).exists()
