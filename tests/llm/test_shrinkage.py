"""The change of a block's weights is shrunk as far as batches say that were not fitted, and no further."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import prunella as pr
from prunella.errors import NotSupported, RequestError
from prunella.llm import shrinkage
from prunella.llm.distributed import ProcessGroup
from prunella.llm.shrinkage import STRENGTHS, shrink_change_
from tests.llm.streaming.models import data, read, write

HOW = pr.llm.OneShot(pr.NM(2, 4), method=pr.solvers.sparsegpt, refine=pr.llm.Refine(1, 1e-2))


def others(count: int = 2) -> list[dict[str, torch.Tensor]]:
    """Batches of tokens that `data` never has."""
    return [{"input_ids": torch.full((2, 16), 3 + k)} for k in range(count)]


@pytest.mark.parametrize("aim", [-0.3, 0.2, 0.6, 0.9, 2.0])
def test_the_strength_of_least_error_is_taken(aim: float) -> None:
    """Against all five, written out: the error is the distance from a point on the line between both values."""
    dense, solved = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[0.0, 6.0, 5.0]])
    mask = torch.tensor([[True, True, False]])
    weight, free = nn.Parameter(solved.clone()), nn.Parameter(solved.clone())
    target = dense + aim * (solved - dense)

    def error() -> float:
        return float((free - target).detach().square().sum())

    best = shrink_change_({weight: dense, free: dense}, {weight: mask}, error)
    by_hand = [float((dense + s * (solved - dense) - target).square().sum()) for s in STRENGTHS]
    assert best == STRENGTHS[by_hand.index(min(by_hand))]
    assert torch.allclose(free, dense + best * (solved - dense))
    assert torch.equal(weight, (dense + best * (solved - dense)).masked_fill(~mask, 0))


def test_as_solved_where_nothing_is_better_or_nothing_is_a_number() -> None:
    dense, solved = torch.tensor([1.0, 2.0]), torch.tensor([0.1, 0.7])
    for value in (1.0, float("nan")):
        weight = nn.Parameter(solved.clone())
        assert shrink_change_({weight: dense}, {}, lambda value=value: value) == 1.0  # type: ignore[misc]
        assert torch.equal(weight, solved)


def test_held_out_batches_are_not_fitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write(tmp_path / "in")
    plain, shrunk = copy.deepcopy(model), copy.deepcopy(model)
    alone = pr.llm.solve_(plain, data()[0], HOW, data=data())
    monkeypatch.setattr(shrinkage, "STRENGTHS", (1.0,))
    done = pr.llm.solve_(shrunk, data()[0], HOW, data=pr.llm.Split(data(), others()))
    assert set(done.strengths.values()) == {1.0} and len(done.strengths) == 3 and not alone.strengths
    assert [fit.tokens for fit in done.fits] == [fit.tokens for fit in alone.fits]
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), shrunk.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["Llama", "Mixtral"])
def test_a_folder_is_the_model_in_memory_also_after_a_kill(tmp_path: Path, kind: str) -> None:
    model = write(tmp_path / "in", kind)

    def stop(step: object) -> None:
        raise KeyError

    with pytest.raises(KeyError):
        pr.llm.solve_folder(tmp_path / "in", tmp_path / "out", HOW, data=pr.llm.Split(data(), others()), on_block=stop)
    with pytest.raises(RequestError, match="its held-out data changed"):
        pr.llm.solve_folder(tmp_path / "in", tmp_path / "out", HOW, data=data())
    done = pr.llm.solve_folder(tmp_path / "in", tmp_path / "out", HOW, data=pr.llm.Split(data(), others()))
    by_hand = pr.llm.solve_(model, data()[0], HOW, data=pr.llm.Split(data(), others()))
    assert done.replayed == 1 and done.solving.strengths.items() <= by_hand.strengths.items()
    assert min(by_hand.strengths.values()) < 1
    again = read(tmp_path / "out", model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    for file in (tmp_path / "out").glob("model-*.safetensors"):
        for name, value in load_file(file).items():
            if name.endswith("down_proj.weight"):
                assert value.view(-1, 4).ne(0).sum(1).max() <= 2


def test_several_processes_are_refused(tmp_path: Path) -> None:
    model = write(tmp_path / "in")
    with pytest.raises(NotSupported, match="held out in several processes"):
        pr.llm.solve_(model, data()[0], HOW, data=pr.llm.Split(data(), others()), distributed=ProcessGroup(0, 2))


def test_a_model_without_blocks_is_refused() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), [torch.randn(20, 8)]
    with pytest.raises(NotSupported, match="no residual blocks"):
        pr.llm.solve_(model, x[0], HOW, data=pr.llm.Split(x, x))
