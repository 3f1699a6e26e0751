from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import prunella as pr
from prunella.compress.low_rank import LowRank, low_rank, ranks_of, svd_factors
from prunella.errors import BadInput, RequestError
from prunella.measure.count import measured_macs
from tests.hand import hand_plan
from tests.sealed import edit


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, bias=False), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=4), nn.Flatten(), nn.Linear(64, 30), nn.ReLU(), nn.Linear(30, 3),
    ).eval()  # fmt: skip


X = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def test_the_error_is_the_sum_of_the_squares_left_out() -> None:
    weight = torch.randn(7, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = torch.linalg.svdvals(weight)
    for rank in range(1, 8):
        found = svd_factors(weight, rank=rank)
        squared = float((weight - found.second @ found.first).square().sum())
        assert squared == pytest.approx(float(values[rank:].square().sum()), abs=1e-12)
        assert found.error == pytest.approx(float(values[rank:].square().sum() / values.square().sum()), abs=1e-12)
        assert found.rank == rank and found.first.norm().item() == pytest.approx(found.second.norm().item())


def test_the_rank_by_energy_by_hand() -> None:
    weight = torch.diag(torch.tensor([3.0, 2.0, 1.0, 1.0]))  # squares 9, 4, 1, 1 of 15
    assert [svd_factors(weight, energy=e).rank for e in (0.1, 0.6, 0.61, 13 / 15, 0.9, 1.0)] == [1, 1, 2, 2, 3, 4]
    assert svd_factors(torch.zeros(3, 2)).rank == 1


def test_full_rank_computes_the_same() -> None:
    """A rank at which layers still get smaller, of weights that have no more than it."""
    net = _net().double()
    with torch.no_grad():
        for layer in (net[0], net[2], net[6]):
            matrix = svd_factors(layer.weight.flatten(1), rank=5)
            layer.weight.copy_((matrix.second @ matrix.first).reshape(layer.weight.shape))
    small, done = low_rank(net, energy=1 - 1e-12, skip=["8"])
    assert {row.name: row.rank for row in done} == {"0": 5, "2": 5, "6": 5} and max(r.error for r in done) < 1e-12
    torch.testing.assert_close(small(X.double()), net(X.double()), rtol=1e-9, atol=1e-9)


def test_parameters_and_macs_really_fall() -> None:
    net = _net()
    before = copy.deepcopy(net.state_dict())
    small, done = low_rank(net, rank=4)
    assert [row.name for row in done] == ["0", "2", "6"]  # not the grouped one, not 30 x 3 at rank 3
    assert [(row.before, row.after) for row in done] == [(576, 208), (2304, 640), (1920, 376)]
    counted = [sum(p.numel() for p in m.parameters()) for m in (net, small)]
    assert counted[0] - counted[1] == sum(row.before - row.after for row in done)
    cost = 4 * 4 * (576 - 208) + 2 * 2 * (2304 - 640) + (1920 - 376)
    assert measured_macs(net, X[:1]) - measured_macs(small, X[:1]) == cost
    assert small(X).shape == net(X).shape and ranks_of(small) == {"0": 4, "2": 4, "6": 4}
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert isinstance(small[0], LowRank) and small[0].first.stride == (2, 2) and small[0].first.bias is None


def test_low_rank_after_shrink_and_shrink_after_low_rank() -> None:
    net = _net()
    small = pr.shrink(net, pr.plan(net, X, target=pr.Params(0.6)))
    smaller, _ = low_rank(small, rank=3)
    assert pr.metrics.count(smaller).params < pr.metrics.count(small).params
    again = pr.shrink(smaller, pr.plan(smaller, X, target=pr.Params(0.7)))
    assert pr.metrics.count(again).params <= 0.7 * pr.metrics.count(smaller).params and again(X).shape == (2, 3)


def _factory() -> nn.Module:
    return _net()


def test_saved_and_loaded(tmp_path: Path) -> None:
    net = _net()
    plan = pr.plan(net, X, target=pr.Params(0.6))
    small, _ = low_rank(pr.shrink(net, plan), energy=0.7)
    pr.save(small, tmp_path / "model", plan=plan, factory=_factory)
    again = pr.load(tmp_path / "model", factory=_factory)
    assert ranks_of(again) == ranks_of(small) and torch.equal(again(X), small(X))
    name = next(iter(ranks_of(small)))
    for wrong in (0, 10000, "x"):
        edit(tmp_path / "model", lambda manifest, wrong=wrong: manifest["low_rank"].update({name: wrong}))  # type: ignore[misc]
        with pytest.raises(BadInput):
            pr.load(tmp_path / "model", factory=_factory)


@pytest.mark.filterwarnings("ignore")
def test_a_model_of_transformers_is_saved_and_loaded(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(vocab_size=30, **sizes)).eval()
    small, _ = low_rank(model, rank=5, only=["*intermediate.dense"])
    saved = pr.save(small, tmp_path / "model")
    assert saved.reader == "prunella.load" and "rank" in saved.note
    tokens = torch.arange(12).view(2, 6)
    again = pr.load(tmp_path / "model")
    assert torch.equal(again(tokens).last_hidden_state, small(tokens).last_hidden_state)


def test_shared_weights_are_left_alone() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
            self.two.weight = self.one.weight
            self.again = self.three

        def forward(self, x: Tensor) -> Tensor:
            return self.again(self.three(self.two(self.one(x))))

    with pytest.raises(RequestError, match="no layer gets smaller"):
        low_rank(Shared(), rank=2)


def test_what_makes_no_sense_is_refused() -> None:
    net = _net()
    with pytest.raises(RequestError, match="no layer gets smaller"):
        low_rank(net, rank=100)
    with pytest.raises(RequestError, match="out of range"):
        low_rank(net, energy=0)
    with pytest.raises(RequestError, match="one text"):
        low_rank(net, only="6")
    with pytest.raises(RequestError, match="out of range"):
        svd_factors(torch.ones(2, 2), rank=3)
    pr.apply_(net, hand_plan(masks={"6.weight": torch.rand(30, 64) > 0.5}))
    with pytest.raises(RequestError, match="carries masks"):
        low_rank(net, rank=4)
    assert [row.name for row in low_rank(net, rank=4, skip=["6"])[1]] == ["0", "2"]
