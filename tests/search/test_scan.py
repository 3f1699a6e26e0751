"""The sensitivity scan: real cuts, the model restored, and results that survive a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import prunella as pr
from prunella.errors import Locked
from tests.graphs import IMAGE, convnet, images
from tests.stopping import records, stops_at, tick


def size(model: nn.Module) -> float:
    """A quality that says which model it is of."""
    return float(sum(p.numel() for p in model.parameters()))


def stopping(model: nn.Module) -> float:
    tick()
    return size(model)


def slow(model: nn.Module) -> float:
    time.sleep(float(os.environ.get("SECONDS_OF_AN_EVALUATION", "0")))
    return size(model)


def alive(model: nn.Module) -> float:
    return float(sum(int(torch.count_nonzero(p)) for p in model.parameters()))


def test_every_point_is_the_real_cut_of_one_group() -> None:
    cuts = pr.search.space(convnet(), torch.randn(IMAGE), pr.Recipe())
    found = pr.search.scan(cuts, size, ratios=(0.25, 0.5))
    assert found.base == 902 and found.measured == 5
    # 8 channels of 27 weights, 2 of the norm and 54 readers; 6 of 72, 2 and 36
    assert found.curves["0"] == ((0.25, 902 - 2 * (27 + 2 + 54)), (0.5, 902 - 4 * (27 + 2 + 54)))
    assert found.curves["3"] == ((2 / 6, 902 - 2 * (72 + 1 + 2 + 36)), (0.5, 902 - 3 * (72 + 1 + 2 + 36)))


def test_the_units_that_go_are_those_of_a_plan() -> None:
    model, batch = convnet().eval(), images()[0]
    cuts = pr.search.space(model, batch, pr.Recipe())
    plan = pr.plan(model, batch, pr.Recipe(), target=pr.Sparsity(0.5), only=["0"])
    small = pr.shrink(model, plan)
    assert all(
        a.equal(b) for a, b in zip(cuts.cut((4, 0)).state_dict().values(), small.state_dict().values(), strict=True)
    )


def test_masks_are_scanned_too() -> None:
    cuts = pr.search.space(convnet(), torch.randn(IMAGE), pr.Recipe(granularity=pr.Element()))
    found = pr.search.scan(cuts, alive, ratios=(0.5,))
    assert found.curves["3"] == ((0.5, found.base - 216),)
    assert alive(cuts.cut((0, 10, 0))) == found.base - 10 and len(pr.masks_of(cuts.cut((0, 10, 0)))) == 1


def test_model_buffers_modes_and_generators_are_restored_bit_for_bit() -> None:
    model = convnet().train()
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    torch.manual_seed(5)
    rng = torch.get_rng_state()

    def spoil(small: nn.Module) -> float:
        small.train()
        small(torch.randn(IMAGE))  # moves running statistics, of the copy
        for parameter in small.parameters():
            parameter.data.add_(1)
        return float(torch.rand(()))

    first = pr.search.scan(pr.search.space(model, torch.randn(IMAGE), pr.Recipe()), spoil)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    torch.set_rng_state(rng)
    pr.search.scan(pr.search.space(model, images()[0], pr.Recipe()), spoil)
    assert torch.get_rng_state().equal(rng)
    assert len({value for curve in first.curves.values() for _, value in curve}) == 1  # the same seed for each


def test_a_scan_goes_on_where_it_stopped(tmp_path: Path) -> None:
    cuts = pr.search.space(convnet(), images()[0], pr.Recipe())
    whole = pr.search.scan(cuts, stopping)
    with stops_at(4):
        pr.search.scan(cuts, stopping, folder=tmp_path)
    assert records(tmp_path) == 3
    again = pr.search.scan(cuts, stopping, folder=tmp_path)
    assert again.curves == whole.curves and again.measured == whole.measured - 3
    assert pr.search.scan(cuts, stopping, folder=tmp_path).measured == 0
    assert [file.name for file in tmp_path.iterdir()] == ["journal.sqlite"] and records(tmp_path) == whole.measured


KILLED = """
import sys
import prunella as pr
from tests.graphs import convnet, images
from tests.search.test_scan import slow
pr.search.scan(pr.search.space(convnet(), images()[0], pr.Recipe()), slow, folder=sys.argv[1])
"""


def test_a_killed_process_loses_nothing_that_was_measured(tmp_path: Path) -> None:
    words, env = [sys.executable, "-c", KILLED, str(tmp_path)], {**os.environ, "SECONDS_OF_AN_EVALUATION": "0.2"}
    cuts = pr.search.space(convnet(), images()[0], pr.Recipe())
    with subprocess.Popen(words, cwd=Path(__file__).parents[2], env=env) as process:
        for _ in range(600):
            if records(tmp_path) >= 2:
                break
            time.sleep(0.1)
        with pytest.raises(Locked, match=f"process {process.pid} on"):
            pr.search.scan(cuts, slow, folder=tmp_path)
        os.kill(process.pid, signal.SIGKILL)
    done = records(tmp_path)
    whole = pr.search.scan(cuts, slow)
    found = pr.search.scan(cuts, slow, folder=tmp_path)
    assert done >= 2 and found.measured == whole.measured - done and found.curves == whole.curves


def test_another_question_does_not_get_the_answers(tmp_path: Path) -> None:
    pr.search.scan(pr.search.space(convnet(), images()[0], pr.Recipe()), size, folder=tmp_path)
    cuts = pr.search.space(convnet(), images()[0], pr.Recipe())
    for other, evaluate, said in (
        (pr.search.space(convnet(seed=1), images()[0], pr.Recipe()), size, "its weights and buffers changed"),
        (pr.search.space(convnet(), images()[1], pr.Recipe()), size, "its inputs changed"),
        (pr.search.space(convnet(), images()[0], pr.Recipe(seed=1)), size, "its recipe changed"),
        (cuts, alive, "its metric changed"),
    ):
        with pytest.raises(pr.PruningError, match=f"is not continued\nit holds another run: {said}"):
            pr.search.scan(other, evaluate, folder=tmp_path)
    assert pr.search.scan(cuts, size, folder=tmp_path).measured == 0


def test_ratios_follow_round_to_and_min_density() -> None:
    cuts = pr.search.space(convnet(), images()[0], pr.Recipe(round_to=4, min_density=0.4))
    assert [cuts.levels(i) for i in range(2)] == [[0, 4], [0, 2]]
    assert [x for x, _ in pr.search.scan(cuts, size).curves["0"]] == [0.5]
    with pytest.raises(pr.PruningError, match="between 0 and 1"):
        pr.search.scan(cuts, size, ratios=(0.5, 1.0))
    with pytest.raises(pr.PruningError, match="nothing to search"):
        pr.search.space(convnet(), images()[0], pr.Recipe(granularity=pr.NM(2, 4)))


def test_agreement_by_hand() -> None:
    dense, other = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        dense.weight.copy_(torch.eye(2))
        other.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 0.5]]))
    batch = torch.tensor([[3.0, 4.0]])
    assert pr.search.agreement(dense, [batch])(dense) == 0
    assert pr.search.agreement(dense, [batch])(other) == pytest.approx(-4 / 25)
    p, q = torch.softmax(torch.tensor([3.0, 4.0]), 0), torch.softmax(torch.tensor([3.0, 2.0]), 0)
    assert pr.search.agreement(dense, [batch], logits=True)(other) == pytest.approx(
        -float((p * (p / q).log()).sum()), rel=1e-5
    )


def test_the_allocation_of_a_scan_spares_the_sensitive_group() -> None:
    model, batch = convnet().eval(), images()
    found = pr.search.scan(pr.search.space(model, batch[0], pr.Recipe()), pr.search.agreement(model, batch))
    plan = pr.plan(model, batch[0], pr.Recipe(allocation=found.allocation), target=pr.Sparsity(0.4))
    assert sum(row.total - row.kept for row in plan.rows) == pytest.approx(0.4 * 14, abs=1)
    assert pr.Recipe.read(plan.recipe).describe() == plan.recipe
