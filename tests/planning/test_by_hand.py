"""What is chosen by hand goes, with all that is coupled to it, and nothing else does."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import prunella as pr
from prunella.errors import NotSupported, PruningError, RequestError, TargetMissed
from prunella.targets import Threshold, parse_target

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A stem, a residual block, a depthwise pair, a concatenation and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.up, self.down = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 8, 1)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.side = nn.Conv2d(3, 4, 3, padding=1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        stream = torch.relu(self.norm(self.stem(x)))
        stream = stream + self.down(torch.relu(self.depthwise(self.up(stream))))
        both: Tensor = torch.cat([stream, torch.relu(self.side(x))], 1)
        return self.fc(both.mean((2, 3)))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Two layers of queries, keys and values with 4 heads of 4."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out, self.heads = nn.Linear(16, 48), nn.Linear(16, 16), 4

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("chosen", "widths"),
    [
        ({"remove": {"up": [2, 5, 7]}}, {"up": 9, "depthwise": 9}),
        ({"remove": {"depthwise": [2], "up": [2, 3]}}, {"up": 10, "depthwise": 10}),
        ({"remove": {"down": [0]}}, {"stem": 7, "down": 7}),
        ({"remove": {"stem": [0], "down.weight": [1]}}, {"stem": 6, "down": 6}),
        ({"remove": {"norm": [3]}}, {"stem": 7, "down": 7}),
        ({"remove": {"side": torch.tensor([True, False, False, True])}}, {"side": 2}),
        ({"remove": {"side": [True, False, False, True]}}, {"side": 2}),
        ({"remove": {"side": np.array([0, 3])}}, {"side": 2}),
        ({"remove": {"side": list(np.array([0, 3]))}}, {"side": 2}),
        ({"remove": {"side": {0, 3}}}, {"side": 2}),
        ({"remove": {"side": np.array([True, False, False, True])}}, {"side": 2}),
        ({"keep": {"side": [0, 3]}}, {"side": 2}),
        ({"keep": {"up": range(6)}}, {"up": 6, "depthwise": 6}),
        ({"ratios": {"up": 0.25}}, {"up": 9}),
        ({"ratios": {"*": 0.5, "stem": 0.25}}, {"stem": 6, "up": 6, "side": 2}),
        ({"ratios": {"stem": 0.25, "*": 0.5}}, {"stem": 6, "up": 6, "side": 2}),
        ({"ratios": {"*": 0.5, "[us]*": 0.25}}, {"stem": 6, "up": 9, "side": 3}),
        ({"counts": {"side": 3}}, {"side": 1}),
        ({"remove": {"side": [1]}, "ratios": {"*": 0.5}}, {"side": 3, "stem": 4, "up": 6}),
        ({"remove": {"side": []}}, {}),
    ],
)
def test_exactly_what_is_named_goes(chosen: dict[str, Any], widths: dict[str, int]) -> None:
    model = Net().eval()
    plan = pr.plan(model, X, **chosen)
    small = pr.shrink(model, plan)
    dense = {"stem": 8, "up": 12, "depthwise": 12, "down": 8, "side": 4}
    coupled = {"depthwise": widths.get("up", 12), "down": widths.get("stem", 8)}
    found = {name: small.get_submodule(name).out_channels for name in dense}
    assert found == dense | coupled | widths
    with torch.no_grad():
        masked = pr.apply_(Net().eval(), plan)
        assert torch.allclose(small(X), masked(X), atol=1e-5)


def test_the_positions_are_those_of_the_layer() -> None:
    model = Net().eval()
    small = pr.shrink(model, pr.plan(model, X, remove={"up": [2, 5, 7]}))
    rest = [0, 1, 3, 4, 6, 8, 9, 10, 11]
    assert torch.equal(small.get_submodule("up").weight, model.up.weight[rest])
    assert torch.equal(small.get_submodule("down").weight, model.down.weight[:, rest])


def test_the_lowest_scores_go() -> None:
    model = Net().eval()
    with torch.no_grad():
        model.side.weight[[1, 3]] *= 1e-3
    small = pr.shrink(model, pr.plan(model, X, counts={"side": 2}))
    assert torch.equal(small.get_submodule("side").weight, model.side.weight[[0, 2]])


def test_a_target_is_met_by_what_is_not_chosen() -> None:
    model = Net().eval()
    plan = pr.plan(model, X, remove={"up": [0]}, target=pr.MACs(0.6))
    assert int(plan.keep["up"].sum()) == 11 and plan.got <= 0.6
    assert plan.recipe["by_hand"] == {"remove": {"up": [0]}}


def test_heads_are_units_of_their_own_numbers() -> None:
    model, x = Attention(), torch.randn(2, 5, 16)
    plan = pr.plan(model, x, pr.Recipe(granularity=pr.Head()), remove={"qkv": [1]})
    small = pr.shrink(model, plan)
    rows = [k for k in range(48) if (k % 16) // 4 != 1]
    assert small.heads == 3 and torch.equal(small.get_submodule("qkv").weight, model.qkv.weight[rows])
    with pytest.raises(NotSupported, match="granularity is channel, this is head"):
        pr.plan(model, x, remove={"qkv": [1]})


def test_masks_of_weights() -> None:
    model, recipe = Net().eval(), pr.Recipe(granularity=pr.Element())
    negative = model.up.weight < 0
    plan = pr.plan(model, X, recipe, remove={"up": negative})
    assert list(plan.masks) == ["up.weight"] and torch.equal(plan.masks["up.weight"], ~negative)
    plan = pr.plan(model, X, recipe, keep={"up.weight": negative}, ratios={"*own": 0.25, "fc": 0.5})
    assert {name: int(mask.sum()) for name, mask in plan.masks.items()} == {
        "up.weight": int(negative.sum()), "down.weight": 72, "fc.weight": 30
    }  # fmt: skip
    with pytest.raises(RequestError, match="does not go with masks chosen by hand"):
        pr.plan(model, X, recipe, ratios={"up": 0.5}, target=pr.MACs(0.5))
    with pytest.raises(RequestError, match=r"bool tensor of shape \(12, 8, 1, 1\)"):
        pr.plan(model, X, recipe, remove={"up": [1]})


def test_weights_above_a_threshold_stay() -> None:
    model, recipe = Net().eval(), pr.Recipe(granularity=pr.Element())
    plan = pr.plan(model, X, recipe, target=pr.Threshold(0.1))
    weights = dict(model.named_parameters())
    assert len(plan.masks) == 6
    assert all(torch.equal(mask, weights[name].detach().abs() > 0.1) for name, mask in plan.masks.items())
    share = sum(int(mask.sum()) for mask in plan.masks.values()) / sum(mask.numel() for mask in plan.masks.values())
    assert plan.outcome == f"asked threshold=0.1, got sparsity={1 - share:.4g}"


def first_weight(weight: Tensor) -> Tensor:
    """A criterion whose scores are known."""
    return weight[:, 0]


def test_units_with_a_score_above_a_threshold_stay() -> None:
    model = Net().eval()
    with torch.no_grad():
        model.side.weight[:, 0, 0, 0] = torch.tensor([0.2, 0.5, 0.9, 0.75])
    recipe = pr.Recipe(criterion=first_weight, granularity=pr.Channel(reduce="mean"))
    kept = partial(pr.plan, model, X, recipe, only=["side"])
    assert kept(target=pr.Threshold(0.5)).keep["side"].tolist() == [False, False, True, True]
    assert kept(target=pr.Threshold(9)).keep["side"].tolist() == [False, False, True, False]
    with pytest.raises(TargetMissed, match=r"would remove nothing\nthe lowest score is 0\.2, in side"):
        kept(target=pr.Threshold(0.1))


def test_a_threshold_is_read_and_written() -> None:
    assert parse_target("threshold=0.01") == Threshold(0.01) and Threshold(0.01).exact == "threshold=0.01"
    for text in ("threshold=-1", "threshold=1%", "threshold=x"):
        with pytest.raises(RequestError):
            parse_target(text)
    with pytest.raises(RequestError, match="a threshold is not a budget"):
        pr.prune(Net().eval(), X, target=Threshold(0.1))
    with pytest.raises(RequestError, match="equal_widths does not go with a threshold"):
        pr.plan(Net().eval(), X, pr.Recipe(equal_widths=True), target=Threshold(0.1))


def test_a_plan_by_hand_is_stored(tmp_path: Path) -> None:
    model = Net().eval()
    plan = pr.plan(model, X, remove={"up": [2]})
    small = pr.shrink(model, plan)
    pr.save(small, tmp_path / "small", plan=plan, dense=model)
    read = pr.load(tmp_path / "small", factory=Net)
    assert torch.equal(read.eval()(X), small(X))


def weights(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


@pytest.mark.parametrize(
    ("chosen", "error", "says"),
    [
        ({"remove": {"upp": [1]}}, RequestError, "there is no layer 'upp' to prune\nnear: up"),
        ({"ratios": {"zz*": 0.5}}, RequestError, "there is no layer 'zz"),
        ({"remove": {"up": [12]}}, RequestError, "up has no position 12\npositions are 0 to 11"),
        ({"remove": {"up": [-1]}}, RequestError, "up has no position -1"),
        ({"remove": {"up": [1.5]}}, RequestError, "up has no position 1.5"),
        ({"remove": {"up": "1,2"}}, RequestError, "whole numbers or a bool mask"),
        ({"remove": {"up": [True] * 3}}, RequestError, "the mask has 3 entries, up has 12"),
        ({"remove": {"up": {"a": 1}}}, RequestError, "whole numbers or a bool mask"),
        ({"remove": {"up": 3}}, RequestError, "whole numbers or a bool mask"),
        ({"remove": {"up": [1]}, "target": pr.Sparsity(0.5)}, RequestError, "counts only the units that compete"),
        ({"remove": {"up": weights(11)}}, RequestError, "the mask has 11 entries, up has 12"),
        ({"remove": {"up": range(12)}}, RequestError, "0 of 12 units are left, and 1 are needed"),
        ({"keep": {"up": []}}, RequestError, "too much of up is removed"),
        ({"remove": {"fc": [0]}}, NotSupported, "fc cannot be pruned\nit is an output of the model"),
        ({"remove": ["up"]}, RequestError, "a mapping from the name of a layer is needed"),
        ({"remove": {"up": [1]}, "keep": {"up": [2]}}, RequestError, "up is named twice"),
        ({"ratios": {"up": 1.0}}, RequestError, r"a ratio is the fraction to remove, in \[0, 1\)"),
        ({"counts": {"up": 2.5}}, RequestError, "a count is the number of units to remove"),
        ({"counts": {"up": 12}}, RequestError, "up cannot lose 12 units"),
        ({"remove": {"up": [1]}, "skip": ["up"]}, NotSupported, "skip='up'"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_sentence(
    chosen: dict[str, Any], error: type[PruningError], says: str
) -> None:
    with pytest.raises(error, match=says):
        pr.plan(Net().eval(), X, **chosen)


@pytest.mark.parametrize("groups", [2, 4])
def test_units_of_grouped_convolutions_go_whole(groups: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, groups=groups), nn.Flatten(), nn.Linear(8 * 36, 2))
    plan = pr.plan(model, X, remove={"0": [0]})
    small = pr.shrink(model, plan)
    left = plan.cuts["0.weight"][0].tolist()
    assert 0 not in left and small[0].out_channels == len(left) <= 6 and small[1].in_channels == len(left)
    assert torch.allclose(small(X), pr.apply_(model, plan)(X), atol=1e-5)


class Joined(nn.Module):
    """Two convolutions whose maps one batch norm reads side by side."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 1)
        self.norm, self.fc = nn.BatchNorm2d(10), nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.relu(self.norm(torch.cat([self.left(x), self.right(x)], 1)))
        return self.fc(both.mean((2, 3)))  # type: ignore[no-any-return]


def test_the_positions_of_a_norm_over_two_layers_are_those_of_their_maps_side_by_side() -> None:
    plan = pr.plan(Joined().eval(), X, remove={"norm": [1, 5, 9]})
    kept = {name: mask.nonzero().flatten().tolist() for name, mask in plan.keep.items()}
    assert kept == {"left": [0, 2, 3], "right": [0, 2, 3, 4]}


class Recurrent(nn.Module):
    """A layer with four rows for each hidden unit, and a cell with three."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm, self.gru, self.fc = nn.LSTM(4, 6, batch_first=True), nn.GRUCell(6, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.gru(self.lstm(x)[0][:, -1]))  # type: ignore[no-any-return]


def test_recurrent_layers_count_hidden_units_and_their_weights_count_rows() -> None:
    model, x = Recurrent().eval(), torch.randn(2, 3, 4)
    kept = [mask.nonzero().flatten().tolist() for mask in pr.plan(model, x, remove={"lstm": [0, 5]}).keep.values()]
    assert kept == [[1, 2, 3, 4]]
    rows = [
        mask.nonzero().flatten().tolist() for mask in pr.plan(model, x, remove={"gru.weight_hh": [6]}).keep.values()
    ]
    assert rows == [[0, 2, 3, 4]]
    for name, first in (("lstm", 6), ("gru", 5)):
        with pytest.raises(RequestError, match=f"{name} has no position {first}"):
            pr.plan(model, x, remove={name: [first]})
