"""`prune` with a folder: after a kill in any stage the same call goes on, and gives the same bits."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunella as pr
from prunella.app import prune_plan
from prunella.app import run as app
from prunella.app.job import Job
from prunella.app.prune_stages import Progress
from prunella.errors import BadInput, Locked, RequestError
from prunella.io.artifact import load
from prunella.io.files import digest
from prunella.io.journal import open_journal
from prunella.recovery import checkpoint
from tests.stopping import beside, killed

X = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
PLACES = [("statistics", 2), ("measured losses", 3), ("cut", 1), ("bn", 1), ("distill", 7)]
"""Stage and part of it at whose end the process is killed."""


def net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 48), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(48, 4)).eval()


def data(seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(16, 8, generator=generator) for _ in range(5)]


def prune(folder: Path | None, on_stage: Callable[[Progress], None] | None = None, **more: Any) -> pr.Pruned:
    recover = {"steps": 8, "lr": 0.05}
    how: dict[str, Any] = {"target": pr.MACs(0.5), "data": data(), "recover": recover, **more}
    return pr.prune(net(), X, folder=folder, on_stage=on_stage, **how)


def dying(stage: str, part: int) -> Callable[[Progress], None]:
    def on_stage(progress: Progress) -> None:
        if (progress.stage, progress.done) == (stage, part):
            os.kill(os.getpid(), signal.SIGKILL)

    return on_stage


def what(pruned: pr.Pruned) -> tuple[Any, ...]:
    """All that a call returns but its times."""
    state = {name: value.tolist() for name, value in pruned.model.state_dict().items()}
    stages = [(stage.name, stage.before, stage.after, stage.note.partition("elimination")[0], stage.measure)
              for stage in pruned.history]  # fmt: skip
    plan = pruned.plan
    return (
        state,
        stages,
        {name: keep.tolist() for name, keep in plan.keep.items()},
        plan.after,
        plan.recipe,
        plan.frozen,
    )


@pytest.fixture(scope="module")
def whole() -> tuple[Any, ...]:
    """What a call gives that nobody stopped, and that keeps nothing."""
    return what(prune(None))


@pytest.mark.parametrize(("stage", "part"), PLACES)
def test_a_killed_call_goes_on_with_the_same_bits(
    tmp_path: Path, whole: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch, stage: str, part: int
) -> None:
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    folder = tmp_path / "work"
    assert killed(lambda: prune(folder, dying(stage, part))) == -signal.SIGKILL
    assert what(prune(folder)) == whole
    assert not [file.name for file in folder.iterdir() if file.name.startswith((".", "training", "best"))]


def parts_after_a_kill(folder: Path, stage: str, part: int) -> list[int]:
    assert killed(lambda: prune(folder, dying(stage, part))) == -signal.SIGKILL
    parts: list[int] = []
    prune(folder, lambda progress: parts.append(progress.done) if progress.stage == stage else None)
    return parts[:-1]  # the last one says that the stage has ended


def test_measured_losses_and_steps_are_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    assert parts_after_a_kill(tmp_path / "a", "measured losses", 3) == [4, 5, 6, 7]
    assert parts_after_a_kill(tmp_path / "b", "distill", 6) == [7, 8]


def test_the_best_state_is_not_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training that goes astray after its first look keeps what it was at that look."""
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    wild: dict[str, Any] = {"recover": {"steps": 40, "lr": 3.0, "reconstruct": False}}
    expected = prune(None, **wild)
    assert "the best state on held-out data is kept" in expected.history[-1].note
    assert killed(lambda: prune(tmp_path, dying("distill", 38), **wild)) == -signal.SIGKILL
    assert what(prune(tmp_path, **wild)) == what(expected)


def test_what_a_budget_decided_stays_decided(tmp_path: Path) -> None:
    """The machine may be slower, and the time that was used before the kill counts."""
    assert killed(lambda: prune(tmp_path, dying("distill", 2), budget="10min")) == -signal.SIGKILL
    first = prune(tmp_path, budget="10min")
    again = prune(tmp_path, budget="10min")
    assert what(first) == what(again)
    assert [a.seconds == b.seconds for a, b in zip(first.history, again.history, strict=True)].count(True) >= 7


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"data": data(2)}, "data"),
        ({"target": pr.MACs(0.6)}, "target"),
        ({"recover": {"steps": 9, "lr": 0.05}}, "recover"),
        ({"seed": 1}, "seed"),
        ({"skip": ["0"]}, "skip"),
        ({"budget": 60}, "budget"),
        ({"loss": lambda model, batch: model(batch).sum()}, "loss"),
    ],
)
def test_what_changed_is_named(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    assert killed(lambda: prune(tmp_path, dying("groups", 1))) == -signal.SIGKILL
    with pytest.raises(RequestError, match=rf"is not continued\nit holds another run: its {said} changed"):
        prune(tmp_path, **changed)


def test_a_second_call_is_refused_while_the_first_one_runs(tmp_path: Path) -> None:
    errors: list[BaseException | None] = []

    def on_stage(progress: Progress) -> None:
        if progress.stage == "cut":
            errors.append(beside(lambda: prune(tmp_path)))

    prune(tmp_path, on_stage)
    assert [type(error) for error in errors] == [Locked]


def test_a_flipped_bit_in_what_is_kept_is_refused(tmp_path: Path) -> None:
    expected, names = what(prune(tmp_path)), sorted(file.name for file in tmp_path.iterdir())
    for file in sorted(tmp_path.iterdir()):
        sound = file.read_bytes()
        content = bytearray(sound)
        content[-1 if file.suffix != ".sqlite" else 20] ^= 1
        file.write_bytes(content)
        with pytest.raises(BadInput, match="damaged"):
            prune(tmp_path)
        file.write_bytes(sound)
    assert what(prune(tmp_path)) == expected  # all is read
    assert sorted(file.name for file in tmp_path.iterdir()) == names


@pytest.mark.parametrize("gone", ["plan.safetensors", "recovered-01.safetensors", "*.safetensors"])
def test_a_stage_whose_files_had_gone_is_done_again_under_its_record(tmp_path: Path, gone: str) -> None:
    """As with a journal that is newer than the files beside it."""
    expected, before = what(prune(tmp_path)), digests(tmp_path)
    for file in tmp_path.glob(gone):
        file.unlink()
    assert what(prune(tmp_path)) == expected
    assert digests(tmp_path) == before


def test_a_stage_that_comes_out_otherwise_does_not_go_with_those_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune(tmp_path)
    (tmp_path / "plan.safetensors").unlink()
    other = prune(None, target=pr.MACs(0.6)).plan
    monkeypatch.setattr("prunella.app.prune.planned", lambda *_: other)
    with pytest.raises(BadInput, match="do not fit each other\nthe plan came out otherwise"):
        prune(tmp_path)


def digests(folder: Path) -> dict[str, str]:
    """Every file by its digest, and the number of records of the journal."""
    with open_journal(folder) as journal:
        rows = {"records": str(journal._count)}
    return rows | {file.name: digest(file) for file in folder.glob("*.safetensors")}


# -- `run` with the recipe auto ------------------------------------------------------------------------------------


def run(folder: Path, stage: app.Stage = app.unseen) -> dict[str, Any]:
    job = Job(pr.Recipe(), pr.MACs(0.5), data=data(), auto=True, factory="tests.app.test_prune_folder:net")
    outcome = app.run(net(), X, job, folder, stage=stage)
    stored = load(folder, factory=net).state_dict()
    return {**{name: value.tolist() for name, value in stored.items()}, "plan": outcome.plan.after}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run gives that nobody stopped."""
    return run(tmp_path_factory.mktemp("whole") / "out")


@pytest.mark.parametrize("function", ["absorb_bn", "finetune"])
def test_a_killed_run_of_the_recipe_auto_goes_on_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole_run: dict[str, Any], function: str
) -> None:
    def die(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def killing() -> None:
        monkeypatch.setattr(f"prunella.app.prune_recover.{function}", die)
        run(tmp_path / "out")

    assert killed(killing) == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert run(tmp_path / "out") == whole_run
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_run_of_the_recipe_auto_measures_no_loss_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole_run: dict[str, Any]
) -> None:
    measure, points = prune_plan.curves, list[str]()

    def stopping(*args: Any, **kwargs: Any) -> Iterator[tuple[str, float, float]]:
        for number, point in enumerate(measure(*args, **kwargs)):
            if number == 4:
                os.kill(os.getpid(), signal.SIGKILL)
            yield point

    def counting(*args: Any, **kwargs: Any) -> Iterator[tuple[str, float, float]]:
        for point in measure(*args, **kwargs):
            points.append(point[0])
            yield point

    with monkeypatch.context() as patched:
        patched.setattr(prune_plan, "curves", stopping)
        assert killed(lambda: run(tmp_path / "out")) == -signal.SIGKILL
    monkeypatch.setattr(prune_plan, "curves", counting)
    assert run(tmp_path / "out") == whole_run
    assert len(points) == 3  # of seven
