"""Elimination of units against brute force, and compensated weights against least squares."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any
from weakref import WeakSet

import pytest
import torch
from torch import Tensor, nn

import prunella as pr
from prunella.errors import BadInput
from prunella.graph.solve.groups import couple
from prunella.stats import Source, Subject, elimination
from prunella.stats.collect import collect
from prunella.stats.elimination import Covariance, Quadratic, Readers, column_sums, compensated, eliminate


def _reader(out: int, units: Tensor, *, tokens: int = 50, seed: int = 0) -> tuple[Quadratic, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(len(units), len(units), generator=generator, dtype=torch.float64)
    x = torch.randn(tokens, len(units), generator=generator, dtype=torch.float64) @ mix
    weight = torch.randn(out, len(units), generator=generator, dtype=torch.float64)
    return Quadratic(weight, x.T @ x, units, torch.zeros(len(units), dtype=torch.float64)), x


def _error(reader: Quadratic, x: Tensor, removed: set[int]) -> float:
    """Squared error of the outputs with the best weights for the remaining columns, by `lstsq`."""
    kept = torch.tensor([unit not in removed for unit in reader.units.tolist()])
    y = x @ reader.weight.T
    best = torch.linalg.lstsq(x[:, kept], y).solution
    return float((y - x[:, kept] @ best).square().sum())


UNITS = {
    "single columns": torch.arange(6),
    "blocks": torch.arange(6).repeat_interleave(2),
    "interleaved": torch.arange(6).repeat(2),
    "unequal": torch.tensor([0, 1, 1, 2, 3, 3, 3, 4, 5]),
    "with others": torch.tensor([-1, 0, 1, 2, -1, 3, 4, 5]),
}


@pytest.mark.parametrize("units", UNITS.values(), ids=UNITS)
def test_each_step_removes_what_brute_force_removes(units: Tensor) -> None:
    reader, x = _reader(3, units)
    removal = eliminate([reader], 6, ridge=1e-12)
    total = float((x @ reader.weight.T).square().sum())
    pruned: set[int] = set()
    for unit in removal.order.tolist()[:5]:
        errors = {other: _error(reader, x, pruned | {other}) for other in set(range(6)) - pruned}
        assert min(errors, key=errors.__getitem__) == unit
        pruned.add(unit)
        assert float(removal.losses[unit]) == pytest.approx(errors[unit] / total, rel=1e-6)


def test_several_readers_share_one_order() -> None:
    readers = [_reader(3, torch.arange(5), seed=1), _reader(2, torch.arange(5).repeat_interleave(3), seed=2)]
    removal = eliminate([reader for reader, _ in readers], 5, ridge=1e-12)
    errors = [sum(_error(r, x, {unit}) for r, x in readers) for unit in range(5)]
    assert int(removal.order[0]) == errors.index(min(errors))


def test_the_order_of_elimination_is_nearly_the_best_subset() -> None:
    reader, x = _reader(2, torch.arange(7), seed=3)
    order = eliminate([reader], 7, ridge=1e-12).order.tolist()
    best = min(_error(reader, x, set(subset)) for subset in itertools.combinations(range(7), 3))
    assert _error(reader, x, set(order[:3])) <= 1.5 * best


def test_losses_grow_in_the_order_of_removal() -> None:
    reader, _ = _reader(4, torch.arange(40), tokens=200)
    removal = eliminate([reader], 40)
    assert sorted(removal.order.tolist()) == list(range(40))
    losses = removal.losses[removal.order]
    assert bool((losses.diff() >= 0).all()) and float(losses[-1]) == pytest.approx(1, rel=0.01)


def test_a_layer_that_never_saw_anything_is_finite() -> None:
    reader = Quadratic(torch.randn(2, 4).double(), torch.zeros(4, 4).double(), torch.arange(4), torch.zeros(4).double())
    assert bool(torch.isfinite(eliminate([reader], 4).losses).all())
    weight, constant = compensated(reader, torch.tensor([True, False, True, True]))
    assert torch.equal(weight[:, [0, 2, 3]], reader.weight[:, [0, 2, 3]]) and not bool(constant.any())


def test_compensated_weights_are_least_squares() -> None:
    reader, x = _reader(3, torch.arange(4).repeat_interleave(2))
    keep = torch.tensor([True, False, True, True])
    weight, _ = compensated(reader, keep, ridge=1e-13)
    kept = keep[reader.units]
    best = torch.linalg.lstsq(x[:, kept], x @ reader.weight.T).solution.T
    torch.testing.assert_close(weight[:, kept], best, rtol=1e-7, atol=1e-7)
    assert not bool(weight[:, ~kept].any())


def test_a_centered_constant_unit_goes_into_the_constant() -> None:
    x = torch.randn(100, 3, dtype=torch.float64)
    x[:, 1] = 2.5
    covariance = Covariance(centered=True)
    for part in x.split(30):
        covariance.add(part)
    weight = torch.randn(2, 3, dtype=torch.float64)
    reader = Quadratic(weight, covariance.gram, torch.arange(3), covariance.mean)
    new, constant = compensated(reader, torch.tensor([True, False, True]), ridge=1e-9)
    torch.testing.assert_close(x @ new.T + constant, x @ weight.T, rtol=1e-6, atol=1e-6)
    assert int(eliminate([reader], 3).order[0]) == 1


def test_a_unit_that_others_replace_goes_first_in_a_plan() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5)).double()
    with torch.no_grad():
        model[0].weight[3] = model[0].weight[1] - 2 * model[0].weight[6]
        model[0].weight[3] *= 5  # large, and yet nothing is lost
    data = [torch.randn(64, 6, dtype=torch.float64)]
    recipe = pr.Recipe(criterion=pr.criteria.obs_units)
    plan = pr.plan(model, data[0], recipe, data=data, target=pr.Params(0.9))
    removed = (~plan.keep["0"]).nonzero()[:, 0].tolist()
    assert len(removed) == 1 and removed[0] in (0, 1, 2, 3, 4, 5, 6, 7)
    small = pr.shrink(model, plan)
    pr.reconstruct(small, model, data, plan, ridge=0.0)
    torch.testing.assert_close(small(data[0]), model(data[0]), rtol=1e-6, atol=1e-6)


def test_costs_are_those_behind_the_norm() -> None:
    reader, _ = _reader(3, torch.arange(6), seed=5)
    scale = torch.tensor([100.0, 0.01, 1.0]).double()
    scaled = eliminate([reader._replace(scale=scale)], 6)
    by_hand = eliminate([reader._replace(weight=reader.weight * scale[:, None])], 6)
    torch.testing.assert_close(scaled.losses, by_hand.losses)
    assert not torch.allclose(scaled.losses, eliminate([reader], 6).losses, rtol=0.1)
    keep = torch.arange(6) > 1
    weight, _ = compensated(reader._replace(scale=scale), keep)  # the layer computes what the norm reads
    assert torch.equal(weight, compensated(reader, keep)[0])


def test_readers_know_the_norm_and_their_order() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 6, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 1)
    ).eval()  # fmt: skip
    with torch.no_grad():
        model[3].weight.copy_(torch.arange(1.0, 7))
    x = torch.randn(4, 3, 5, 5)
    groups = [group for group in couple(model, x).groups if group.size in (8, 6)]
    readers = Readers(dict(model.named_parameters()), groups[::-1])
    with torch.no_grad(), readers.watch():
        model(x)
    first, second = (next(group.name for group in groups if group.size == size) for size in (8, 6))
    assert readers.order == (first, second)
    ((_, quadratic),) = readers.of(first)
    assert quadratic.scale is not None
    torch.testing.assert_close(quadratic.scale, torch.arange(1.0, 7).double() / (1 + 1e-5) ** 0.5, rtol=1e-6, atol=1e-6)
    assert readers.of(second)[0][1].scale is None


@pytest.mark.parametrize("rows", [1, 8192, 20_000])
def test_sums_of_columns_are_those_of_float64(rows: int) -> None:
    x = torch.randn(rows, 3) + torch.tensor([0.0, 1.0, 100.0])
    assert column_sums(x).dtype == torch.float64
    assert torch.allclose(column_sums(x), x.double().sum(0), rtol=1e-5, atol=1e-2)
    assert torch.allclose(column_sums(x.double()), x.double().sum(0), rtol=1e-12)


def deep(layers: int = 4) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 6)) for _ in range(layers)]
    return nn.Sequential(*blocks).eval(), [torch.randn(32, 6) for _ in range(3)]


def scores_of(model: nn.Module, data: Any) -> dict[str, Tensor]:
    graph = couple(model, torch.zeros(1, 6))
    subject = Subject(model, graph, groups=[group for group in graph.groups if group.size == 24])
    return dict(collect(subject, ["unit_loss"], Source(data)).values["unit_loss"])


def test_passes_that_hold_few_matrices_give_the_same_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = deep()
    whole = scores_of(model, data)
    alive, most, passes = WeakSet[Covariance](), 0, 0
    add = Covariance.add

    def counted(self: Covariance, x: Tensor) -> None:
        nonlocal most
        alive.add(self)
        most = max(most, len(alive))
        add(self, x)

    def count(_: object, args: tuple[Tensor], output: object) -> None:
        nonlocal passes
        passes += len(args[0]) == 32  # of the data

    monkeypatch.setattr(Covariance, "add", counted)
    monkeypatch.setattr(Covariance, "__hash__", object.__hash__, raising=False)
    model.register_forward_hook(count)
    for bound, held, times in ((1 << 28, 4, 3), (2 * 8 * 24 * 24, 2, 6), (1, 1, 12)):
        most, passes = 0, 0
        monkeypatch.setattr(elimination, "MOST", bound)
        parts = scores_of(model, data)
        assert (most, passes) == (held, times), bound
        assert list(parts) == list(whole) and all(parts[name].equal(whole[name]) for name in whole)


def test_data_that_can_be_read_once_take_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = deep()
    whole = scores_of(model, data)
    monkeypatch.setattr(elimination, "MOST", 1)
    parts = scores_of(model, iter(data))
    assert all(parts[name].equal(whole[name]) for name in whole)

    class Shrinking:
        """Data that have fewer batches each time."""

        left = 4

        def __iter__(self) -> Iterator[Tensor]:
            self.left -= 1
            return iter(data[: self.left])

    with pytest.raises(BadInput, match="gave 2 batches when it was read again"):
        scores_of(model, Shrinking())
