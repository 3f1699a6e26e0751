"""Criteria of activations, gradients and curvature against hand numbers, and facts that the concepts list."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

import prunella as pr
from prunella.graph.solve.groups import couple
from prunella.model.state import untouched
from prunella.planning.scoring import Scorer
from prunella.stats import Source, Subject, collect
from tests.graphs import Attention, blocks, convnet, images, mlp, square_loss

W = torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -4.0]])
G = torch.tensor([[2.0, 1.0, -1.0], [5.0, -1.0, 0.5]])


def test_obd_is_half_the_curvature_times_the_square() -> None:
    assert pr.criteria.obd(W, G).tolist() == [[1, 2, -0.125], [0, -4.5, 4]]


def test_fisher_is_half_the_mean_square_times_the_square() -> None:
    assert pr.criteria.fisher(W, G.abs()).tolist() == [[1, 2, 0.125], [0, 4.5, 4]]


def test_obs_saliency_divides_by_twice_the_inverse() -> None:
    assert pr.criteria.obs_saliency(W, G.abs()).tolist() == [[0.25, 2, 0.125], [0, 4.5, 16]]


def test_mfac_saliency_is_that_of_the_dense_inverse() -> None:
    g, w = torch.randn(5, 2, 3, dtype=torch.float64), W.double()
    flat = g.flatten(1)
    inverse = torch.linalg.inv(0.01 * torch.eye(6, dtype=torch.float64) + flat.T @ flat / 5)
    expected = w.flatten().square() / (2 * inverse.diagonal())
    assert torch.allclose(pr.criteria.mfac_saliency(w, g, damping=0.01).flatten(), expected, rtol=1e-10)
    with pytest.raises(pr.PruningError, match="damping"):
        pr.criteria.mfac_saliency(w, g, damping=0)


def test_obert_is_the_joint_cost_of_a_group_shared_out() -> None:
    torch.manual_seed(0)
    w = torch.randn(2, 6, dtype=torch.float64)
    half = torch.randn(2, 2, 4, 9, dtype=torch.float64)
    inverse = torch.linalg.inv(half @ half.mT)
    found = pr.criteria.obert(w, inverse, group=2, block=4)
    assert found.shape == w.shape
    for row, column, block, at in ((0, 0, 0, 0), (1, 2, 0, 2), (1, 4, 1, 0)):
        part, q = w[row, column : column + 2], slice(at, at + 2)
        cost = part @ torch.linalg.solve(inverse[row, block][q, q], part) / 2
        assert found[row, column : column + 2].tolist() == pytest.approx([float(cost) / 2] * 2)
    single = pr.criteria.obert(w, inverse, group=1, block=4)
    diagonal = inverse.diagonal(dim1=-2, dim2=-1).flatten(1)[:, :6]
    assert torch.allclose(single, pr.criteria.obs_saliency(w, diagonal))
    with pytest.raises(pr.PruningError, match="does not divide"):
        pr.criteria.obert(w, inverse, group=3, block=4)


def test_taylor_abs_takes_the_absolute_value_before_the_mean_and_rescales_a_layer() -> None:
    gates = torch.tensor([[1.0, -3.0], [-5.0, 5.0]])
    assert pr.criteria.taylor_abs(gates, normalize=False).tolist() == [3, 4]
    assert pr.criteria.taylor_abs(gates).tolist() == pytest.approx([0.6, 0.8])
    assert pr.criteria.taylor_abs(torch.zeros(2, 2)).tolist() == [0, 0]


def test_movement_is_positive_where_a_step_moves_away_from_zero() -> None:
    assert pr.criteria.movement(W, G).tolist() == [[-2, 2, 0.5], [0, 3, 2]]
    after = W - 0.01 * G
    assert ((after.abs() - W.abs() > 0) == (pr.criteria.movement(W, G) > 0))[W != 0].all()


def test_fluctuation_is_the_variance_times_the_squared_column() -> None:
    variance = torch.tensor([2.0, 1.0, 0.0])
    assert pr.criteria.fluctuation(W, variance).sum(0).tolist() == [2, 13, 0]


def test_a_dead_unit_has_the_lowest_apoz_score() -> None:
    assert pr.criteria.apoz(torch.tensor([1.0, 0.25])).tolist() == [0, 0.75]


def test_the_rest_are_their_statistic() -> None:
    x = torch.tensor([0.5, 2.0])
    assert all(
        f(x).equal(x)
        for f in (
            pr.criteria.hrank,
            pr.criteria.activation_norm,
            pr.criteria.activation_variance,
            pr.criteria.block_influence,
        )
    )


# -- heads (5), Taylor (10) ----------------------------------------------------------------------------------------


def test_head_importance_is_the_product_of_the_output_of_a_head_and_its_gradient() -> None:
    torch.manual_seed(0)
    model = Attention().double()
    data = [torch.randn(1, 5, 8, dtype=torch.float64) for _ in range(3)]
    (heads,) = [group for group in couple(model, data[0]).groups if group.kind == "head"]
    scores = score(model, pr.criteria.head_importance, data)[heads.name]
    expected = torch.zeros(4, dtype=torch.float64)
    for x in data:
        seen: list[Tensor] = []

        def look(module: nn.Module, args: tuple[Tensor, ...], seen: list[Tensor] = seen) -> None:
            args[0].retain_grad()
            seen.append(args[0])

        handle = model.out.register_forward_pre_hook(look)
        square_loss(model, x).backward()
        handle.remove()
        product = seen[0].detach() * seen[0].grad  # type: ignore[operator]
        expected += product.unflatten(-1, (4, 3)).sum((0, 1, 3)).abs() / 3
    assert torch.allclose(scores, expected, rtol=1e-10)
    one_batch = score(model, pr.criteria.head_importance, [torch.cat(data)])[heads.name]
    assert not torch.allclose(one_batch, expected, rtol=1e-2)


def test_head_importance_prunes_heads() -> None:
    model, data = Attention(), [torch.randn(2, 5, 8) for _ in range(2)]
    plan = pr.plan(
        model,
        data[0],
        pr.Recipe(pr.criteria.head_importance, pr.Head()),
        target=pr.Sparsity(0.5),
        data=data,
        loss=square_loss,
    )
    assert [int(kept.sum()) for kept in plan.keep.values()] == [2]


def score(model: nn.Module, criterion: object, data: list[Tensor]) -> dict[str, Tensor]:
    """Scores of all groups that have them."""
    from prunella.planning.scoring import Absent
    from prunella.registry.method import needs_of

    graph = couple(model, data[0])
    subject = Subject(model, graph, groups=graph.groups)
    with untouched(model, 0):
        statistics = collect(subject, needs_of(criterion), Source(data, square_loss))  # type: ignore[arg-type]
    scorer, found = Scorer(criterion, subject, statistics), {}  # type: ignore[arg-type]
    for group in graph.groups:
        try:
            found[group.name] = scorer.units(group, pr.granularity.Reduce.SUM)
        except Absent:
            continue
    return found


def test_taylor_is_the_squared_gradient_of_a_gate_behind_the_bias() -> None:
    model, x = mlp().double(), torch.randn(9, 4, dtype=torch.float64)
    gate = torch.ones(6, dtype=torch.float64, requires_grad=True)
    value = (model[2:](model[1](model[0](x) * gate)) - 1).square().mean()
    (at_gate,) = torch.autograd.grad(value, gate)
    weight, bias = model[0].weight, model[0].bias
    gw, gb = torch.autograd.grad(square_loss(model, x), [weight, bias])
    with_bias = ((weight * gw).sum(1) + bias * gb).square()
    found = score(model, pr.taylor, [x])["0"]
    assert torch.allclose(at_gate.square(), with_bias, rtol=1e-10) and torch.allclose(found, with_bias, rtol=1e-9)
    assert not torch.allclose(found, (weight * gw).sum(1).square(), rtol=1e-2)


def test_the_square_of_the_sum_is_not_the_sum_of_squares() -> None:
    model, x = mlp().double(), torch.randn(9, 4, dtype=torch.float64)
    joint, apart = score(model, pr.taylor, [x])["2"], score(model, pr.criteria.taylor_sq, [x])["2"]
    assert not torch.allclose(joint, apart, rtol=0.05)


def test_the_square_of_each_batch_is_averaged() -> None:
    model = mlp().double()
    data = [torch.randn(5, 4, dtype=torch.float64) for _ in range(3)]
    parts = torch.stack([score(model, pr.taylor, [x])["0"] for x in data])
    assert torch.allclose(score(model, pr.taylor, data)["0"], parts.mean(0), rtol=1e-9)


# -- norms (9), redundancy (16), scales (15) ---------------------------------------------------------------------


def test_a_zero_filter_ranks_last_and_group_size_is_divided_out() -> None:
    model = convnet().eval()
    with torch.no_grad():
        for name in ("0.weight", "1.weight", "1.bias"):
            model.state_dict()[name][5] = 0
        model.state_dict()["3.weight"][:, 5] = 0
    found = score(model, pr.criteria.group_norm, images())
    assert found["0"].argmin() == 5 and found["0"][5] == 0
    ratio = float(found["3"].mean() / found["0"].mean())
    plain = score(model, partial(pr.criteria.group_norm, normalize=False), images())
    assert float(plain["3"].mean() / plain["0"].mean()) != pytest.approx(ratio, rel=0.05)


def test_global_order_survives_the_concatenation_of_layers() -> None:
    torch.manual_seed(0)
    model, x = mlp(20), torch.randn(3, 4)
    recipe = pr.Recipe(granularity=pr.Element(), allocation=pr.global_)
    masks = pr.plan(model, x, recipe, target=pr.Sparsity(0.6)).masks
    every = torch.cat([model.state_dict()[name].abs().flatten() for name in masks])
    kept = torch.cat([mask.flatten() for mask in masks.values()])
    assert every[kept].min() >= every[~kept].max()


@pytest.mark.parametrize("criterion", [pr.magnitude, pr.criteria.geometric_median])
def test_a_step_with_less_sparsity_brings_units_back(criterion: object) -> None:
    model, x = convnet().eval(), images()[0]
    before = model[0].weight.detach().clone()
    recipe = pr.Recipe(criterion)  # type: ignore[arg-type]
    more, less = (pr.plan(model, x, recipe, target=pr.Sparsity(s)) for s in (0.5, 0.25))
    pr.apply_(model, more)
    assert int((model[0].weight.detach().flatten(1) == 0).all(1).sum()) == 4
    with torch.no_grad():
        model[0].weight.copy_(before)
    pr.apply_(model, less, regrow=True)
    zero = (model[0].weight.detach().flatten(1) == 0).all(1)
    assert int(zero.sum()) == 2 and bool(more.keep["0"].logical_not()[zero].all())


def test_at_least_one_channel_of_every_layer_stays() -> None:
    model, x = convnet().eval(), images()[0]
    with torch.no_grad():
        model[1].weight.mul_(1e-6)
    recipe = pr.Recipe(pr.criteria.bn_scale, allocation=pr.global_)
    plan = pr.plan(model, x, recipe, target=pr.Sparsity(12 / 14))
    assert [int(kept.sum()) for kept in plan.keep.values()] == [1, 1]
    assert pr.shrink(model, plan)(x).shape == model(x).shape


# -- depth (63), a trained network (8) ---------------------------------------------------------------------------


def test_an_identity_block_goes_first() -> None:
    model, data = blocks((1.0, 0.5, 0.0, 0.8)).eval(), images()
    recipe = pr.Recipe(pr.criteria.block_influence, pr.Depth())
    plan = pr.plan(model, data[0], recipe, target=pr.Sparsity(0.25), data=data)
    assert dict(plan.dropped) == {"0": ("2",)}
    small = pr.shrink(model, plan)
    assert torch.equal(small(data[1]), model(data[1]))


def test_block_influence_is_for_blocks_only() -> None:
    model, data = convnet().eval(), images()
    with pytest.raises(pr.PruningError, match=r"Depth\(\)"):
        pr.plan(model, data[0], pr.Recipe(pr.criteria.block_influence), target=pr.Sparsity(0.5), data=data)
    with pytest.raises(pr.PruningError, match="residual block"):
        pr.plan(
            model, data[0], pr.Recipe(pr.criteria.block_influence, pr.Element()), target=pr.Sparsity(0.5), data=data
        )


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Sequential, Tensor, Tensor]:
    """A network that has learned four noisy clusters."""
    torch.manual_seed(0)
    centers = torch.randn(4, 16)
    labels = torch.arange(800) % 4
    x = centers[labels] + 0.8 * torch.randn(800, 16)
    model = nn.Sequential(nn.Linear(16, 40), nn.ReLU(), nn.Linear(40, 20), nn.ReLU(), nn.Linear(20, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, weight_decay=1e-4)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()
    return model, x, labels


@pytest.mark.parametrize("sparsity", [0.5, 0.7, 0.85])
@pytest.mark.parametrize("criterion", [pr.magnitude, pr.criteria.fisher, pr.criteria.obs_saliency, pr.criteria.obd])
def test_on_a_trained_network_criteria_beat_random(
    trained: tuple[nn.Sequential, Tensor, Tensor], sparsity: float, criterion: object
) -> None:
    model, x, labels = trained
    data = [(x[:100], labels[:100])]

    def left(criterion: object, seed: int = 0) -> float:
        recipe = pr.Recipe(criterion, pr.Element(), seed=seed)  # type: ignore[arg-type]
        plan = pr.plan(model, x[:2], recipe, target=pr.Sparsity(sparsity), data=data,
                       loss=lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]))  # fmt: skip
        with torch.no_grad():
            return float(nn.functional.cross_entropy(pr.shrink(model, plan)(x), labels))

    by_chance = [left(pr.criteria.random, seed) for seed in range(5)]
    assert left(criterion) < min(by_chance)
    assert left(pr.criteria.inverted(criterion)) > left(criterion)  # type: ignore[arg-type]
