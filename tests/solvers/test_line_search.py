"""Updates from few samples must not harm: their strength is chosen on samples that the curvature has not seen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import prunella as pr
from prunella.solvers.line_search import split_samples
from prunella.solvers.obs import cut_singly, cut_singly_matrix_free, inverse_fisher

Batch = tuple[Tensor, Tensor]
FISHER = [pr.solvers.mfac, pr.solvers.woodfisher]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def samples(count: int, seed: int) -> list[Batch]:
    """Points on a noisy plane of eight classes, in 32 coordinates."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 32, generator=generator)
    return [(x, (x[:, :8] + 0.5 * torch.randn(count, 8, generator=generator)).argmax(1))]


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 8))
    pr.finetune(model, samples(2000, 0), loss, steps=150, lr=0.02)
    return model.eval()


def sparse(model: nn.Module) -> pr.Plan:
    return pr.plan(model, samples(2, 0)[0][0], pr.Recipe(pr.magnitude, pr.Element()), target=pr.Sparsity(0.9))


def masked_loss(model: nn.Module, plan: pr.Plan, data: list[Batch]) -> float:
    other = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 8))
    other.load_state_dict(model.state_dict())
    return float(loss(pr.apply_(other, plan), data[0]).detach())


@pytest.mark.parametrize("solver", FISHER)
def test_an_update_from_few_samples_does_not_harm(solver: object, trained: nn.Module) -> None:
    plan, few, fresh = sparse(trained), samples(60, 1), samples(2000, 2)
    plain = masked_loss(trained, plan, fresh)
    chosen = solver(trained, plan, few, loss=loss, damping=1e-6)  # type: ignore[operator]
    assert masked_loss(trained, chosen, fresh) < 1.02 * plain
    knobs = chosen.recipe["solver"]["knobs"]
    before, after = knobs["held out"]
    assert after <= before and 0 <= knobs["strength"] <= 1
    held_out = split_samples(few).held_out
    assert after == pytest.approx(masked_loss(trained, chosen, [(torch.cat([x for x, _ in held_out]),
        torch.cat([y for _, y in held_out]))]), rel=1e-5)  # fmt: skip


def test_the_full_joint_update_does_harm_there(trained: nn.Module) -> None:
    plan, few, fresh = sparse(trained), samples(60, 1), samples(2000, 2)
    full = pr.solvers.mfac(trained, plan, few, loss=loss, damping=1e-6, strength=1.0)
    assert masked_loss(trained, full, fresh) > 1.1 * masked_loss(trained, plan, fresh)


@pytest.mark.parametrize("solver", FISHER)
def test_strength_scales_the_joint_update(solver: object, trained: nn.Module) -> None:
    plan, few, name = sparse(trained), samples(40, 1), "0.weight"
    full, half, none = (
        solver(trained, plan, few, loss=loss, strength=s).weights[name]  # type: ignore[operator]
        for s in (1.0, 0.5, 0.0)
    )
    kept = plan.masks[name]
    assert torch.allclose(half[kept], (full[kept] + none[kept]) / 2, atol=1e-6)
    assert none[kept].equal(trained.get_parameter(name).detach()[kept]) and not bool(half[~kept].any())
    with pytest.raises(pr.PruningError, match="factor of the update"):
        solver(trained, plan, few, loss=loss, strength=1.5)  # type: ignore[operator]


def test_the_sum_of_single_updates_is_that_of_each_weight_alone() -> None:
    torch.manual_seed(0)
    weight, grads = torch.randn(7, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    pruned, inverse = torch.tensor([1, 0, 0, 1, 0, 1, 0]).bool(), inverse_fisher(grads, 1e-2)
    expected = weight.clone()
    for p in pruned.nonzero()[:, 0].tolist():
        expected -= weight[p] / inverse[p, p] * inverse[:, p]
    expected[pruned] = 0
    assert torch.allclose(cut_singly(weight, inverse, pruned), expected, atol=1e-12)
    assert torch.allclose(cut_singly_matrix_free(weight, grads, pruned, 1e-2), expected, atol=1e-9)
