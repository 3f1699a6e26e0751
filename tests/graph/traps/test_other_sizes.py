"""Coupling that holds for one image size, one length or one batch size only: the plan is right on others too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunella as pr
from prunella.errors import CheckFailed, NotSupported
from prunella.graph import other_sizes as other_sizes_module
from prunella.graph.data import Hints
from prunella.graph.other_sizes import other_sizes
from prunella.graph.resized import positions, samples
from prunella.graph.solve.groups import couple
from prunella.graph.verify import verify
from prunella.model.trees import tensors
from prunella.types import Examples


class Scramble(nn.Module):
    """Tokens are read as channels: which channels meet depends on the number of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 4, 1)
        self.free, self.last = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 4, 1)

    def forward(self, image: Tensor) -> Tensor:
        x = self.a(image)
        n, _, h, w = x.shape
        y = self.b(x).flatten(2).transpose(1, 2).reshape(n, self.b.out_channels, h, w)
        out: Tensor = self.c((x + y).relu()) + self.last(self.free(image).relu())
        return out


class Sequence(nn.Module):
    """The same of a sequence: steps and channels are read the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.free, self.last = nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, steps: Tensor) -> Tensor:
        x = self.a(steps)
        y = self.b(x).transpose(1, 2).reshape(x.shape)
        out: Tensor = self.c((x + y).relu()) + self.last(self.free(steps).relu())
        return out


class BySamples(nn.Module):
    """One sample takes a short cut that reads the channels as places."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.one = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 3)
        self.free, self.last = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x).relu()
        tail: Tensor = self.last(self.free(x).relu())
        if self.alone(x):
            return tail + self.one(hidden.flip(-1))
        return tail + self.down(hidden)

    def alone(self, x: Tensor) -> bool:
        return x.shape[0] == 1


class ByManySamples(BySamples):
    """The same from five samples on."""

    def alone(self, x: Tensor) -> bool:
        return x.shape[0] > 4


class BySqueeze(BySamples):
    """The same where `squeeze` takes away the axis of a single sample; no size is compared."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x).relu().squeeze()
        tail: Tensor = self.last(self.free(x).relu())
        return tail + (self.one(hidden.flip(-1)) if hidden.dim() == 1 else self.down(hidden))


class ByResolution(nn.Module):
    """A large image is read by a second layer."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.large = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 3, 1), nn.Conv2d(8, 3, 1)
        self.free, self.last = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.nn.functional.avg_pool2d(self.up(x), 2)
        tail: Tensor = self.last(self.free(x).relu()).mean((2, 3))
        reader = self.large if hidden.shape[-1] >= 20 else self.down
        return tail + reader(hidden).mean((2, 3))


CASES: list[tuple[Callable[[], nn.Module], Tensor, Tensor]] = [
    (Scramble, torch.randn(2, 3, 2, 2), torch.randn(2, 3, 4, 4)),
    (Scramble, torch.randn(1, 3, 2, 2), torch.randn(3, 3, 8, 2)),
    (Sequence, torch.randn(2, 2, 5), torch.randn(2, 4, 5)),
    (BySamples, torch.randn(2, 6), torch.randn(1, 6)),
    (BySamples, torch.randn(1, 6), torch.randn(4, 6)),
    (ByManySamples, torch.randn(2, 6), torch.randn(5, 6)),
    (BySqueeze, torch.randn(2, 6), torch.randn(1, 6)),
    (ByResolution, torch.randn(1, 3, 16, 16), torch.randn(1, 3, 40, 40)),
]
RECIPE = pr.Recipe(pr.criteria.random)


@pytest.mark.parametrize(("build", "example", "other"), CASES)
def test_a_cut_is_right_on_another_size(build: Callable[[], nn.Module], example: Tensor, other: Tensor) -> None:
    torch.manual_seed(0)
    model = build().eval()
    plan = pr.plan(model, example, RECIPE, target=pr.Sparsity(0.3))
    small = pr.shrink(model, plan)
    assert any(row.name == "free" for row in plan.rows), "what does not depend on the size is pruned as before"
    assert verify(model, small, plan.changes, example).exact and verify(model, small, plan.changes, other).exact


def test_the_reason_names_the_line_and_the_size() -> None:
    plan = pr.plan(Scramble(), torch.randn(2, 3, 2, 2), RECIPE, target=pr.Sparsity(0.3))
    reason = next(entry for entry in plan.frozen if entry.entity == "b.weight")
    assert "test_other_sizes.py:" in reason.where and "on an input of 3x3x4x4" in reason.reason
    assert [tuple(tensor.shape) for tensor in tensors(plan.others)] == [(3, 3, 4, 4)]
    assert any("3x3x4x4" in line for line in plan.remarks)


def test_a_model_without_such_a_reshape_has_the_plan_it_had() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    plan = pr.plan(net, torch.randn(2, 3, 8, 8), RECIPE, target=pr.Sparsity(0.5))
    assert plan.others == () and all("output of the model" in entry.reason for entry in plan.frozen)
    assert pr.shrink(net, plan)[0].out_channels == 4


def test_where_the_dense_model_refuses_the_size_nothing_is_concluded() -> None:
    class OneSize(Scramble):
        def forward(self, image: Tensor) -> Tensor:
            assert image.shape == (2, 3, 2, 2)
            return super().forward(image)

    model = OneSize().eval()
    assert not list(other_sizes(model, torch.randn(2, 3, 2, 2)))
    plan = pr.plan(model, torch.randn(2, 3, 2, 2), RECIPE, target=pr.Sparsity(0.3))
    assert {"a", "free"} == {row.name for row in plan.rows} and pr.shrink(model, plan)


def test_a_cut_by_hand_is_refused_with_the_size() -> None:
    model, example = Scramble().eval(), torch.randn(2, 3, 2, 2)
    graph = couple(model, example)
    keep = {"a": torch.tensor([True, False, True, True])}
    plan = pr.Plan.of_structure(graph, keep, inputs=example)
    with pytest.raises(CheckFailed, match="on an input of 3x3x4x4"):
        pr.shrink(model, plan)


def test_a_size_that_is_never_right_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from prunella.planning import widened

    monkeypatch.setattr(widened, "disagreement", lambda *_: torch.randn(1, 3, 5, 5))
    with pytest.raises(NotSupported, match="for the size of the example only"):
        pr.plan(Scramble(), torch.randn(2, 3, 2, 2), RECIPE, target=pr.Sparsity(0.3))


class PerStep(nn.Module):
    """A norm for every step: how often it runs is another number on a longer input."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        self.after = nn.LayerNorm(8)

    def forward(self, steps: Tensor) -> Tensor:
        x = self.embed(steps)
        x = torch.stack([self.norm(step) for step in x.unbind(1)], 1)
        out: Tensor = self.head(self.after(x * 1.5 + 1))
        return out


def test_calls_are_counted_on_each_example() -> None:
    model = PerStep().eval()
    plan = pr.plan(model, torch.randn(2, 3, 4), pr.Recipe(granularity=pr.Width()), target=pr.Sparsity(0.5))
    assert pr.shrink(model, plan).head.in_features == 4  # type: ignore[attr-defined]
    assert {call.example for call in plan.changes.along} == set(range(len(plan.others) + 1))


# -- several examples ----------------------------------------------------------------------------------------------


def test_several_examples_are_one_graph_and_each_is_verified() -> None:
    model, first, second = ByResolution().eval(), torch.randn(1, 3, 8, 8), torch.randn(1, 3, 48, 48)
    plan = pr.plan(model, Examples(first, second), RECIPE, target=pr.Sparsity(0.5))
    small: Any = pr.shrink(model, plan)
    assert plan.others[0] is second and plan.inputs is first
    assert small.up.out_channels == small.large.in_channels == small.down.in_channels < 8
    assert verify(model, small, plan.changes, second).exact
    alone = pr.plan(model, first, RECIPE, target=pr.Sparsity(0.5))
    assert plan.before.macs == alone.before.macs, "work is that of the first example"


def test_another_example_for_shrink_is_checked_too() -> None:
    model, example = Scramble().eval(), torch.randn(2, 3, 2, 2)
    keep = {"a": torch.tensor([True, False, True, True])}
    plan = pr.Plan.of_structure(couple(model, example), keep)
    with pytest.raises(CheckFailed):
        pr.shrink(model, plan, inputs=Examples(example, torch.randn(2, 3, 8, 2)))


def test_a_search_proposes_what_is_right_on_other_sizes() -> None:
    from prunella.search.space import space

    names = space(Scramble().eval(), torch.randn(2, 3, 2, 2), RECIPE).names
    assert names == ("free",)


# -- batches of other sizes ----------------------------------------------------------------------------------------


def test_samples_and_positions_of_nested_inputs() -> None:
    inputs = {"ids": torch.arange(12).view(2, 6), "mask": torch.ones(2, 1, 6, 6), "scale": torch.tensor(2.0), "n": 3}
    more = samples(inputs, 2, 3)
    assert more["ids"].tolist() == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11], [5, 0, 1, 2, 3, 4]]
    assert more["mask"].shape == (3, 1, 6, 6) and more["scale"] is not None and more["n"] == 3
    assert samples(inputs, 2, 1)["ids"].tolist() == [[0, 1, 2, 3, 4, 5]]
    short, long = positions(inputs, {6: 3}), positions(inputs, {6: 8})
    assert short["ids"].tolist() == [[0, 1, 2], [6, 7, 8]] and short["mask"].shape == (2, 1, 3, 3)
    assert long["ids"][0].tolist() == [0, 1, 2, 3, 4, 5, 0, 1]


def test_a_branch_is_looked_for_where_the_source_compares() -> None:
    assert couple(ByManySamples(), torch.randn(2, 6)).hints.turns == ((2, 5),)
    assert couple(ByResolution(), torch.randn(1, 3, 16, 16)).hints.turns == ((8, 20),)
    assert couple(BySamples(), torch.randn(3, 6)).hints.turns == ((3, 1),)


BRANCHES: dict[str, Callable[[Tensor], bool]] = {
    "height * width": lambda x: x.shape[2] * x.shape[3] > 1000,
    "numel": lambda x: x.numel() > 5000,
    "height alone": lambda x: x.shape[2] > 100,
    "sum of sizes": lambda x: x.shape[2] + x.shape[3] >= 64,
}


@pytest.mark.parametrize("branch", BRANCHES.values(), ids=BRANCHES)
@pytest.mark.parametrize("size", [(12, 12), (12, 10)])
def test_a_branch_on_several_sizes_is_tried(branch: Callable[[Tensor], bool], size: tuple[int, int]) -> None:
    class Image(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x).relu()
            if branch(x):
                y = y + y.flip(1)
            return self.b(y)

    torch.manual_seed(0)
    model, example = Image().eval(), torch.randn(2, 3, *size)
    plan = pr.plan(model, example, target=pr.Params(0.6))
    small, large = pr.shrink(model, plan), torch.randn(2, 3, 128, 40)
    assert branch(large) and not branch(example)
    assert verify(model, small, plan.changes, large).exact


@pytest.mark.parametrize("limit", [20, 64, 500])
def test_a_branch_far_above_the_example_is_tried(limit: int) -> None:
    class Long(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x).relu()
            if x.shape[1] > limit:
                y = y + y.flip(-1)
            return self.b(y)

    torch.manual_seed(0)
    model, example = Long().eval(), torch.randn(2, 5, 8)
    plan = pr.plan(model, example, target=pr.Params(0.6))
    small = pr.shrink(model, plan)
    for length in (5, limit + 1):
        assert verify(model, small, plan.changes, torch.randn(2, length, 8)).exact


# -- which sizes are tried -----------------------------------------------------------------------------------------


def shapes_tried(model: nn.Module, inputs: Tensor, **told: Any) -> set[tuple[int, ...]]:
    return {tuple(batch.shape) for batch in other_sizes(model, inputs, hints=Hints(**told))}


def test_a_single_sample_is_tried() -> None:
    assert (1, 4) in shapes_tried(nn.Linear(4, 4), torch.randn(3, 4))


def test_each_axis_that_may_decide_is_tried() -> None:
    tried = shapes_tried(nn.Identity(), torch.randn(4, 3, 8, 12), turns=((4, 5),))
    assert {(5, 3, 8, 12), (4, 3, 10, 12), (4, 3, 8, 15), (4, 3, 10, 15)} <= tried


class ByArea(nn.Module):
    """Another layer for large maps."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.large = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.large(x) if x.shape[2] * x.shape[3] > 1000 else self.small(x)
        return y


def test_a_product_of_sizes_is_told_with_its_multiple_and_the_square_of_it() -> None:
    turns = couple(ByArea().eval(), torch.randn(1, 3, 8, 16)).hints.turns
    assert set(turns) == {(8, 32), (8, 128)}


class Words(nn.Module):
    """Token ids with any axes before the last: the logits of a word are on the last axis of the output."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(24, 8), nn.Linear(8, 24)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        if ids.ndim != 2:
            x = x * 2
        logits: Tensor = self.head(x)
        return logits


def test_logits_are_compared_on_inputs_with_another_number_of_axes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, shapes = Words().eval(), torch.randint(0, 12, (2, 5)), list[tuple[int, ...]]()
    agrees = other_sizes_module._agrees

    def noted(oracle: Any, batch: Any, **more: Any) -> bool:
        right = agrees(oracle, batch, **more)
        shapes.extend([tuple(batch.shape)] if right else [])
        return right

    monkeypatch.setattr(other_sizes_module, "_agrees", noted)
    kept = pr.granularity.Vocabulary(tuple(range(12)))
    plan = pr.plan(model, ids, pr.Recipe(granularity=kept))
    small = pr.shrink(model, plan)
    assert {len(shape) for shape in shapes} >= {1, 3}, shapes
    for batch in (ids, ids[0], ids[:, None]):
        assert torch.allclose(small(batch), model(batch)[..., :12])
