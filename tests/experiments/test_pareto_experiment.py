"""A Pareto experiment: baselines always there, the same whatever the number of processes, resumable, failures told."""

from __future__ import annotations

import importlib
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import prunella as pr
from prunella.errors import BadInput
from prunella.experiments.pareto_experiment import PAGE, RATIOS, RECORD, ParetoExperiment, pareto
from prunella.io.journal import NAME
from prunella.planning.recipes import named
from prunella.reporting.frontier import Cell, Point, frontier_chart, on_front, summarize
from prunella.reporting.report import Report
from tests.experiments import experiment_parts as parts
from tests.reporting.test_page import HOSTILE, read
from tests.reporting.test_report import made
from tests.stopping import records

NAMES = "tests.experiments.experiment_parts"
EXPERIMENT = ParetoExperiment(parts.make, parts.evaluate, parts.example, {"lamp": named("lamp_magnitude")})
module = importlib.import_module(pareto.__module__)  # the package has the function under this name
SMALL = {"ratios": (2.0, 30.0), "seeds": (0, 1)}


def test_five_ratios_three_seeds_and_three_baselines_by_default() -> None:
    tasks = module._tasks(EXPERIMENT, RATIOS, (0, 1, 2), pr.Params)
    assert RATIOS == (2, 4, 8, 16, 32) and len(tasks) == 3 * (1 + 4 * 5)
    methods = {task.method for task in tasks} - {"dense"}
    assert methods == {"lamp", "random", "magnitude, by layer", "magnitude, global"}
    assert all(task.recipe.seed == task.seed for task in tasks if task.recipe)
    assert {task.target for task in tasks if task.ratio == 8} == {pr.Params(1 / 8)}
    assert {task.target for task in module._tasks(EXPERIMENT, (8,), (0,), pr.Sparsity)} == {None, pr.Sparsity(7 / 8)}
    both = replace(EXPERIMENT, recipes={**EXPERIMENT.recipes, "l1": named("l1_filter")}).baselines
    assert len(both) == 6 and both[list(both)[3]].granularities == (pr.Channel(),)


def test_means_deviations_and_intervals_by_hand() -> None:
    cells = [Cell("dense", 1, seed, 0.9, 1, 1) for seed in range(3)]
    cells += [Cell("a", 2, seed, score, 0.5, 0.4) for seed, score in enumerate((0.7, 0.8, 0.9))]
    cells += [
        Cell("b", 2, 0, 0.95, 0.5, 0.5),
        Cell("b", 2, 1, error="TargetMissed: no"),
        Cell("b", 2, 2, 0.99, 0.5, 0.5),
    ]
    found = summarize(cells, unit="params", baselines=("b",))
    point = found.point("a", 2)
    assert (point.mean, point.std) == (pytest.approx(0.8), pytest.approx(0.1))
    half = 4.302652729911275 * 0.1 / math.sqrt(3)  # Student's 97.5 % point at 2 degrees of freedom
    assert (point.low, point.high) == (pytest.approx(0.8 - half), pytest.approx(0.8 + half))
    assert point.compression == 2 and point.macs == pytest.approx(0.4) and point.n == point.of == 3
    assert found.point("b", 2).n == 2 and not found.point("b", 2).front and point.front  # b lacks a seed
    assert [cell.error for cell in found.failures] == ["TargetMissed: no"] and "TargetMissed: no" in str(found)
    assert json.loads(found.json())["dense"]["mean"] == pytest.approx(0.9)


def test_the_front() -> None:
    def point(score: float, size: float, n: int = 2) -> Point:
        return Point("m", 2, n, 2, score, 0, 0, 0, size, 1)

    every = [point(0.9, 2), point(0.8, 4), point(0.7, 3), point(0.8, 3.9), point(0.99, 9, 1)]
    assert [on_front(p, every) for p in every] == [True, True, False, False, False]
    assert on_front(every[0], [*every, point(0.9, 2)])  # an equal one does not dominate


@pytest.mark.slow
def test_a_study_is_the_same_again_and_in_two_processes(tmp_path: Path) -> None:
    first = pareto(EXPERIMENT, tmp_path / "one", **SMALL)  # type: ignore[arg-type]
    by_name = ParetoExperiment(f"{NAMES}:make", f"{NAMES}:evaluate", f"{NAMES}:example", EXPERIMENT.recipes)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    second = pareto(by_name, tmp_path / "two", jobs=2, **SMALL)  # type: ignore[arg-type]
    assert str(first.cells) == str(second.cells)
    assert first.point("lamp", 2).mean > first.point("random", 2).mean
    assert len(first.failures) == 8 and {cell.ratio for cell in first.failures} == {30}
    assert all("TargetMissed" in cell.error and "min_density" in cell.error for cell in first.failures)
    assert state.equal(torch.get_rng_state()) and threads == torch.get_num_threads()
    page = (tmp_path / "one" / PAGE).read_text(encoding="utf-8")
    reader = read(page)
    assert "script" not in reader.elements and "TargetMissed" in page and "on the Pareto front" in page


def test_a_killed_study_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    slow = replace(EXPERIMENT, evaluate=parts.slow)
    folder = tmp_path / "run"

    def killed(cell: Cell, done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pareto(slow, folder, ratios=(2,), seeds=(0, 1), on_cell=killed)
    assert records(folder) == 3 and not (folder / PAGE).exists()
    sound = (folder / NAME).read_bytes()
    (folder / NAME).write_bytes(sound.replace(b'"seed": 0', b'"seed": 7', 1))
    with pytest.raises(BadInput, match="is not the one that was written"):
        pareto(slow, folder, ratios=(2,), seeds=(0, 1))
    (folder / NAME).write_bytes(sound)
    found = pareto(slow, folder, ratios=(2,), seeds=(0, 1))
    calls = len((tmp_path / "calls.txt").read_text().split())
    assert calls == 3 + 7 and str(found.cells) == str(pareto(slow, None, ratios=(2,), seeds=(0, 1)).cells)
    pareto(slow, folder, ratios=(2,), seeds=(0, 1))
    assert len((tmp_path / "calls.txt").read_text().split()) == calls + 10  # only the study without a folder ran


def test_recovery_keeps_the_masks_or_fails() -> None:
    recovered = pareto(replace(EXPERIMENT, recover=parts.recover), ratios=(4,), seeds=(0,))
    assert recovered.point("lamp", 4).mean >= pareto(EXPERIMENT, ratios=(4,), seeds=(0,)).point("lamp", 4).mean
    revived = pareto(replace(EXPERIMENT, recover=parts.revive), ratios=(4,), seeds=(0,))
    assert all("masked weights" in cell.error for cell in revived.cells)


def test_what_a_function_of_the_user_raises_is_told_and_tried_again(tmp_path: Path) -> None:
    broken = replace(EXPERIMENT, evaluate=parts.broken)
    found = pareto(broken, tmp_path / "run", ratios=(2,), seeds=(0,))
    assert {cell.error for cell in found.cells} == {"a function of the experiment raised ZeroDivisionError: no measure"}
    assert records(tmp_path / "run") == 1 + 4
    pareto(broken, tmp_path / "run", ratios=(2,), seeds=(0,))
    assert records(tmp_path / "run") == 1 + 4 + 4
    with pytest.raises(BadInput, match="a function of the experiment raised AttributeError"):
        pareto(replace(EXPERIMENT, make=parts.broken), tmp_path / "unmade", ratios=(2,), seeds=(0,))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ratios": (1.0,)}, "ratios above 1"),
        ({"seeds": (0, 0)}, "different seeds"),
        ({"jobs": 0}, "a process"),
    ],
)
def test_a_study_that_makes_no_sense(change: dict[str, object], said: str) -> None:
    with pytest.raises(pr.PruningError, match=said):
        pareto(EXPERIMENT, **change)  # type: ignore[arg-type]


def test_what_cannot_be_sent_or_named_is_refused() -> None:
    with pytest.raises(pr.PruningError, match="cannot be sent"):
        pareto(replace(EXPERIMENT, evaluate=lambda model: 0.0), jobs=2)
    with pytest.raises(pr.PruningError, match="is taken"):
        pareto(replace(EXPERIMENT, recipes={"random": named("lamp_magnitude")}))
    with pytest.raises(pr.PruningError, match="has no name"):
        pareto(replace(EXPERIMENT, data=iter([1])), ratios=(2,))
    with pytest.raises(pr.PruningError, match="dense model cannot be measured"):
        pareto(replace(EXPERIMENT, make=lambda seed: 3), ratios=(2,), seeds=(0,))  # type: ignore[arg-type, return-value]


def frontier() -> pr.reporting.Frontier:
    cells = [Cell("dense", 1, s, 0.9, 1, 1) for s in (0, 1)]
    cells += [Cell(HOSTILE, r, s, 0.9 - r / 20 - s / 100, 1 / r, 1 / r) for r in (2, 4) for s in (0, 1)]
    return summarize(cells, unit="params", environment={"make": HOSTILE})


def test_a_report_takes_the_curves_and_the_side_effects(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    effects = pr.metrics.side_effects(model, model, [(torch.zeros(4, 3), torch.zeros(4, dtype=torch.long))])
    found: Report = made().adding(effects.section(), frontier().section())
    page = pr.reporting.write_page(found, tmp_path / "page.html").read_text(encoding="utf-8")
    reader = read(page)
    ids = [value for name, value in reader.attributes if name == "id"]
    assert (
        len(ids) == len(set(ids)) and "<img" not in page and "Side effects" in page and "Quality against size" in page
    )
    assert [part["title"] for part in json.loads(found.json())["sections"]] == ["Side effects", "Quality against size"]
    assert "predictions that flipped" in str(found)


def test_the_page_is_safe_and_the_same_each_time(tmp_path: Path) -> None:
    page = pr.reporting.write_frontier(frontier(), tmp_path / "a.html").read_text(encoding="utf-8")
    assert "<img" not in page and "<script" not in page and HOSTILE in "".join(read(page).text)
    assert page == pr.reporting.write_frontier(frontier(), tmp_path / "b.html").read_text(encoding="utf-8")


def test_the_chart_has_a_band_for_every_method() -> None:
    chart = frontier_chart(pareto(EXPERIMENT, ratios=(2, 4), seeds=(0, 1)))
    assert chart.count("FillBetween") == 4 or chart.count("fill-opacity") + chart.count("opacity: 0.") >= 4
    assert "magnitude, global" in chart and "4x" in chart and "dense" in chart


def test_a_dense_model_with_other_weights_is_not_taken_for_the_one_that_is_known(tmp_path: Path) -> None:
    """`make` reads what changes, as a checkpoint does: its code is the same."""
    moved = replace(EXPERIMENT, make=parts.make_moved)
    pareto(moved, tmp_path / "run", ratios=(2,), seeds=(0,))
    before = records(tmp_path / "run")
    pareto(moved, tmp_path / "run", ratios=(2,), seeds=(0,))
    assert records(tmp_path / "run") == before
    module._dense.cache_clear()
    parts.move(1.0)
    try:
        pareto(moved, tmp_path / "run", ratios=(2,), seeds=(0,))
    finally:
        parts.MOVED.clear()
        module._dense.cache_clear()
    assert records(tmp_path / "run") == 2 * before


def test_the_model_of_every_seed_counts(tmp_path: Path) -> None:
    moved = replace(EXPERIMENT, make=parts.make_moved_later)
    pareto(moved, tmp_path / "run", ratios=(2,), seeds=(0, 1))
    before = records(tmp_path / "run")
    module._dense.cache_clear()
    parts.move(1.0)
    try:
        pareto(moved, tmp_path / "run", ratios=(2,), seeds=(0, 1))
    finally:
        parts.MOVED.clear()
        module._dense.cache_clear()
    assert records(tmp_path / "run") == before + before // 2  # the cells of the second seed alone


def test_cells_of_another_experiment_stay_and_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each cell has its own identity; the page and the record are those of the last call."""
    monkeypatch.chdir(tmp_path)
    other = replace(EXPERIMENT, evaluate=parts.slow)
    ours, both = tmp_path / "ours", tmp_path / "both"
    pareto(EXPERIMENT, ours, ratios=(2,), seeds=(0,))
    pareto(other, both, ratios=(2,), seeds=(0,))
    count = records(both)
    pareto(EXPERIMENT, both, ratios=(2,), seeds=(0,))
    assert all((ours / name).read_bytes() == (both / name).read_bytes() for name in (RECORD, PAGE))
    assert records(both) == count + records(ours)
