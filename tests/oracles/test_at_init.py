"""Pruning at initialization against closed forms, finite differences and the numbers of layer collapse."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import prunella as pr
from prunella.errors import NotSupported, RequestError
from prunella.graph.solve.groups import couple
from prunella.model.state import untouched
from prunella.planning.recipes import named
from prunella.planning.rounds import Rounds
from prunella.stats import Source, Subject, collect
from tests.graphs import convnet, images, mlp

Batch = tuple[Tensor, Tensor]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def batches(count: int = 3, size: int = 8, dtype: torch.dtype = torch.float64) -> list[Batch]:
    torch.manual_seed(5)
    return [(torch.randn(size, 4, dtype=dtype), torch.randint(0, 3, (size,))) for _ in range(count)]


def statistic(model: nn.Module, name: str, inputs: Tensor, data: list[Batch] | None = None) -> dict[str, Tensor]:
    graph = couple(model, inputs)
    subject = Subject(model, graph, layers=graph.layers, inputs=inputs)
    with untouched(model, 0):
        return dict(collect(subject, [name], Source(data, loss)).values[name])


def score(model: nn.Module, criterion: object, data: list[Batch] | None = None) -> dict[str, Tensor]:
    """The scores of a plan's own pipeline, caught on their way."""
    caught = {}

    def spy(pools: list[object]) -> list[Tensor]:
        caught.update({pool.name: pool.scores for pool in pools})  # type: ignore[attr-defined]
        return [pool.scores.double() for pool in pools]  # type: ignore[attr-defined]

    recipe = pr.Recipe(criterion, pr.Element(), spy)  # type: ignore[arg-type]
    x = torch.randn(2, 4, dtype=next(model.parameters()).dtype)
    pr.plan(model, x, recipe, target=pr.Sparsity(0.5), data=data, loss=loss)
    return caught


def test_snip_is_the_share_of_the_slope_at_gates_of_one() -> None:
    model, data = mlp().double(), batches()
    weights = {name: p for name, p in model.named_parameters() if p.dim() > 1}
    gates = {name: torch.ones_like(p, requires_grad=True) for name, p in weights.items()}
    whole = {**dict(model.named_parameters()), **{n: weights[n].detach() * gates[n] for n in gates}}
    value = sum(cross_entropy(torch.func.functional_call(model, whole, (x,)), y) for x, y in data) / len(data)
    slopes = torch.autograd.grad(value, list(gates.values()))  # the mean over batches, before the absolute value
    total = sum(float(s.abs().sum()) for s in slopes)
    found = score(model, pr.criteria.snip, data)
    for name, slope in zip(gates, slopes, strict=True):
        expected = (slope.abs() / total).flatten().sort().values
        assert torch.allclose(found[name.removesuffix(".weight")], expected, rtol=1e-10)
    assert sum(float(s.sum()) for s in found.values()) == pytest.approx(1, rel=1e-12)


def test_many_batches_and_one_large_batch_agree_for_snip() -> None:
    model, data = mlp().double(), batches()
    whole = [(torch.cat([x for x, _ in data]), torch.cat([y for _, y in data]))]
    first, second = score(model, pr.criteria.snip, data), score(model, pr.criteria.snip, whole)
    assert all(torch.allclose(first[name], second[name], rtol=1e-10) for name in first)


def gradient(model: nn.Module, data: list[Batch], temperature: float) -> dict[str, Tensor]:
    value = sum(cross_entropy(model(x) / temperature, y) for x, y in data) / len(data)
    weights = {name: p for name, p in model.named_parameters() if p.dim() > 1}
    return dict(zip(weights, torch.autograd.grad(value, list(weights.values())), strict=True))


@pytest.mark.parametrize("count", [1, 3])
def test_the_product_with_the_hessian_equals_finite_differences(count: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    data = batches(count)
    found = statistic(model, "hessian_grad", data[0][0], data)
    slope = gradient(model, data, 200.0)
    step = 1e-5 / max(float(s.norm()) for s in slope.values())
    ends = []
    for sign in (1, -1):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for name, parameter in moved.named_parameters():
                if name in slope:
                    parameter += sign * step * slope[name]
        ends.append(gradient(moved, data, 200.0))
    for name in slope:
        finite = (ends[0][name] - ends[1][name]) / (2 * step)
        assert float((found[name] - finite).norm() / finite.norm()) < 2e-7


def test_grasp_removes_what_the_paper_removes_and_leaves_no_trace() -> None:
    model, data = mlp().double(), batches()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    products = statistic(model, "hessian_grad", data[0][0], data)
    paper = torch.cat([(-p.detach() * products[n]).flatten() for n, p in model.named_parameters() if n in products])
    recipe = named("grasp_global")
    plan = pr.plan(model, data[0][0], recipe, target=pr.Sparsity(0.5), data=data, loss=loss)
    pruned = torch.cat([~plan.masks[n].flatten() for n in products])
    assert float(paper[pruned].min()) >= float(paper[~pruned].max())
    assert all(value.equal(state[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters()) and not model._forward_hooks


def test_grasp_refuses_outputs_that_have_no_temperature() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> tuple[Tensor]:
            return (self.line(x),)

    with pytest.raises(NotSupported, match="temperature"):
        pr.plan(Two(), torch.randn(2, 4), pr.Recipe(pr.criteria.grasp, pr.Element()), target=pr.Sparsity(0.5),
                data=[torch.randn(2, 4)], loss=lambda m, b: m(b)[0].sum())  # fmt: skip


def test_every_layer_of_a_chain_has_the_same_synflow() -> None:
    torch.manual_seed(0)
    sizes = (12, 9, 30, 7, 5)
    layers = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
    model, x = nn.Sequential(*layers), torch.randn(3, 12)
    flow = statistic(model, "flow", x)
    product = torch.ones(3, 12, dtype=torch.float64)
    for layer in model:
        product = product @ layer.weight.detach().double().abs().T if isinstance(layer, nn.Linear) else product
    weights = dict(model.named_parameters())
    for name, grad in flow.items():
        total = float((weights[name].detach().double().abs() * grad).sum())
        assert total == pytest.approx(float(product.sum()), rel=1e-12)


def test_synflow_of_a_convolutional_network_with_norms_is_conserved_and_leaves_no_trace() -> None:
    model, x = convnet().train(), images()[0]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    flow = statistic(model, "flow", x)
    weights = dict(model.named_parameters())
    totals = [float((weights[n].detach().double().abs() * flow[n]).sum()) for n in flow]
    assert totals == pytest.approx([totals[0]] * 3, rel=1e-12) and totals[0] > 0
    assert all(value.equal(state[name]) for name, value in model.state_dict().items()) and model.training
    assert any(bool((p < 0).any()) for p in model.parameters())


def test_synflow_refuses_tokens_and_norms_that_stop_the_flow() -> None:
    recipe = pr.Recipe(pr.criteria.synflow, pr.Element())
    table = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3))
    with pytest.raises(NotSupported, match="no magnitude"):
        pr.plan(table, torch.tensor([[1, 2]]), recipe, target=pr.Sparsity(0.5))
    normed = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 3))
    with pytest.raises(NotSupported, match="nothing flows"):
        pr.plan(normed, torch.randn(2, 4), recipe, target=pr.Sparsity(0.5))


def deep(seed: int = 0) -> nn.Sequential:
    """784-100x6-10 with torch's own initial weights and biases of zero."""
    torch.manual_seed(seed)
    sizes = (784, *[100] * 6, 10)
    layers = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())]
    for part in layers:
        if isinstance(part, nn.Linear):
            nn.init.zeros_(part.bias)
    return nn.Sequential(*layers[:-1])


def test_only_synflow_in_rounds_keeps_all_layers_at_ten_thousand_times() -> None:
    model = deep(11)  # with other seeds magnitude empties one layer to three at this ratio, the others three and more
    x = torch.randn(2, 784)
    data = [(torch.randn(50, 784), torch.randint(0, 10, (50,))) for _ in range(2)]
    far, near = pr.Sparsity(1 - 1e-4), pr.Sparsity(0.9)
    plan = pr.planning.synflow_rounds(model, x, target=far)
    # Which layer has the single weight is left to the rounding of equal scores.
    assert sorted(row.kept for row in plan.rows) == [1, 2, 2, 2, 2, 2, 2]
    assert pr.transform.collapsed(plan) == () and not any("collapsed" in line for line in plan.remarks)
    for criterion in (pr.criteria.synflow, pr.criteria.snip, pr.magnitude, pr.criteria.random):
        recipe = pr.Recipe(criterion, pr.Element(), pr.global_, min_units=0)
        made = pr.plan(model, x, recipe, target=far, data=data, loss=loss)
        names = pr.transform.collapsed(made)
        assert len(names) >= 3 and sum(row.kept for row in made.rows) == 13
        assert all(int(made.masks[f"{name}.weight"].sum()) == 0 for name in names)
        assert all(name in str(made) for name in names[:3]) and "collapsed" in str(made)
        assert pr.transform.collapsed(pr.apply_(copy.deepcopy(model), made)) == names
    for criterion in (pr.criteria.synflow, pr.magnitude):
        recipe = pr.Recipe(criterion, pr.Element(), pr.global_, min_units=0)
        assert "0" in pr.transform.collapsed(pr.plan(model, x, recipe, target=near))
        held = pr.plan(model, x, pr.Recipe(criterion, pr.Element(), pr.global_), target=near)
        assert pr.transform.collapsed(held) == () and held.rows[0].kept == 1


def test_rounds_meet_their_targets_and_nest_where_they_should() -> None:
    model, data = mlp().double(), batches()
    x, target = data[0][0], pr.Sparsity(0.8)
    total = 4 * 6 + 6 * 5 + 5 * 3
    counts = [1 - t.value for t in Rounds(5).targets(pr.Sparsity(0.99), 1.0)]
    assert counts == pytest.approx([0.3981, 0.1585, 0.0631, 0.0251, 0.01], abs=5e-5)
    for make in (pr.planning.iterative_snip, pr.planning.force):
        plan = make(model, x, target=target, data=data, loss=loss, count=4)
        assert sum(int(m.sum()) for m in plan.masks.values()) == total - round(0.8 * total)
        assert plan.recipe["rounds"]["nested"] == (make is pr.planning.iterative_snip)
    once = pr.planning.force(model, x, target=target, data=data, loss=loss, count=1)
    plain = pr.plan(
        model,
        x,
        pr.Recipe(pr.criteria.snip, pr.Element(), pr.global_, min_units=0),
        target=target,
        data=data,
        loss=loss,
    )
    assert all(once.masks[n].equal(plain.masks[n]) for n in plain.masks)


def manual(model: nn.Module, data: list[Batch], shares: list[float], *, back: bool) -> Tensor:
    """FORCE, or iterative SNIP, by hand: all weights in one vector."""
    dense = [p for p in model.parameters() if p.dim() > 1]
    sizes = [p.numel() for p in dense]
    start = torch.cat([p.detach().flatten() for p in dense])
    mask = torch.ones_like(start, dtype=torch.bool)
    for share in shares:
        replica = copy.deepcopy(model)
        weights = [p for p in replica.parameters() if p.dim() > 1]
        with torch.no_grad():
            for p, part in zip(weights, (start * mask).split(sizes), strict=True):
                p.copy_(part.view_as(p))
        value = sum(loss(replica, batch) for batch in data) / len(data)
        grads = torch.cat([g.flatten() for g in torch.autograd.grad(value, weights)])
        scores = (grads * start).abs()
        if not back:
            scores[~mask] = -1
        keep = len(start) - round(share * len(start))
        mask = torch.zeros_like(mask).index_fill_(0, scores.topk(keep).indices, True)
    return mask


@pytest.mark.parametrize("back", [True, False])
def test_force_lets_weights_come_back_and_iterative_snip_does_not(back: bool) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 3)).double()
    data = batches()
    make = pr.planning.force if back else pr.planning.iterative_snip
    found = make(model, data[0][0], target=pr.Sparsity(0.9), data=data, loss=loss, count=6)
    shares = [1 - 0.1 ** (k / 6) for k in range(1, 7)]
    expected = manual(model, data, shares, back=back)
    assert torch.cat([m.flatten() for m in found.masks.values()]).equal(expected)
    assert not expected.equal(manual(model, data, shares, back=not back))


def test_rounds_are_for_masks_that_compete() -> None:
    with pytest.raises(RequestError, match="rounds mask weights that compete"):
        pr.planning.iterate(mlp(), torch.randn(2, 4), pr.Recipe(), target=pr.Sparsity(0.5))
    with pytest.raises(RequestError, match="count=0"):
        Rounds(0)
    with pytest.raises(RequestError, match="min_units=0 is for masks"):
        pr.Recipe(min_units=0)


def test_a_shuffled_plan_keeps_every_layers_count_and_moves_its_mask() -> None:
    model, x = mlp(16), torch.randn(2, 4)
    plan = pr.plan(model, x, pr.Recipe(granularity=pr.Element()), target=pr.Sparsity(0.7))
    other, again, third = (pr.transform.shuffled_plan(plan, seed=s) for s in (0, 0, 1))
    for name, mask in plan.masks.items():
        assert int(other.masks[name].sum()) == int(mask.sum()) and other.masks[name].equal(again.masks[name])
        assert not other.masks[name].equal(mask) and not other.masks[name].equal(third.masks[name])
    with pytest.raises(RequestError, match="no masks"):
        pr.transform.shuffled_plan(pr.plan(model, x, target=pr.Sparsity(0.5)))


def test_reinitialized_weights_are_new_and_masked_alike() -> None:
    model, x = mlp(16), torch.randn(2, 4)
    plan = pr.plan(model, x, pr.Recipe(granularity=pr.Element()), target=pr.Sparsity(0.7))
    pr.apply_(model, plan)
    before, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    fresh, again = pr.transform.reinitialized(model, seed=4), pr.transform.reinitialized(model, seed=4)
    assert torch.get_rng_state().equal(rng)
    for name, mask in plan.masks.items():
        weight = dict(fresh.named_parameters())[name]
        assert (weight != 0).equal(mask) and bool((weight[mask] != dict(model.named_parameters())[name][mask]).all())
        assert weight.equal(dict(again.named_parameters())[name])
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("criterion", [pr.criteria.snip, pr.criteria.synflow, pr.criteria.random])
def test_a_mask_at_initialization_depends_on_weights_data_and_seed_only(criterion: object) -> None:
    def mask(seed: int, rng: int) -> Tensor:
        model, data = mlp(8, seed), batches(dtype=torch.float32)
        torch.manual_seed(rng)
        recipe = pr.Recipe(criterion, pr.Element(), pr.global_)  # type: ignore[arg-type]
        plan = pr.plan(model, data[0][0], recipe, target=pr.Sparsity(0.5), data=data, loss=loss)
        return torch.cat([m.flatten() for m in plan.masks.values()])

    assert mask(0, 1).equal(mask(0, 2))
    assert mask(0, 1).equal(mask(1, 1)) == (criterion is pr.criteria.random)
