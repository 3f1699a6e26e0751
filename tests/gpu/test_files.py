"""What was written on a GPU is read on the CPU, and the other way round."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import prunella as pr
from tests.gpu.nets import close, placed

CPU = torch.device("cpu")


@pytest.mark.parametrize("there", [True, False], ids=["from the GPU", "to the GPU"])
def test_models_and_plans_move(gpu: torch.device, there: bool, tmp_path: Path) -> None:
    source, target = (gpu, CPU) if there else (CPU, gpu)
    model, data = placed("convolutions", source)
    plan = pr.plan(model, data[0], target=pr.Params(0.6))
    pr.io.save_plan(plan, tmp_path / "cut.plan")
    small = pr.shrink(model, plan)
    pr.save(small, tmp_path / "small", plan=plan)

    other, again = placed("convolutions", target)
    loaded = pr.load(tmp_path / "small", factory=lambda: placed("convolutions", CPU)[0], device=target)
    assert {p.device.type for p in loaded.parameters()} == {target.type}
    close(dict(loaded.state_dict()), dict(small.state_dict()), rtol=0, atol=0)
    cut = pr.shrink(other, pr.io.load_plan(tmp_path / "cut.plan"), inputs=again[0])
    close(dict(cut.state_dict()), dict(small.state_dict()), rtol=0, atol=0)


def test_a_training_run_goes_on_elsewhere(gpu: torch.device, tmp_path: Path) -> None:
    """A checkpoint of a run on one device is read on the other: the generators that are not there are left out."""
    from prunella.model.rng import restore_rng_, rng_state

    torch.rand(1, device=gpu)
    state = rng_state()
    expected = torch.rand(3, device=gpu)
    restore_rng_(state)
    assert torch.rand(3, device=gpu).equal(expected)
    restore_rng_({**state, "cuda": []})
    restore_rng_({**state, "cuda": [*state["cuda"], *state["cuda"]]})
