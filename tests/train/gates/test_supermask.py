"""Edge-popup: weights that never move, exact counts, and the straight-through gradient."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import prunella as pr
from prunella.io.nested import equal
from prunella.lottery.session import snapshot
from prunella.model.masks import masks_of

X = torch.randn(64, 10, generator=torch.Generator().manual_seed(2))
Y = (X[:, :3].sum(1) > 0).long()


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 33), nn.ReLU(), nn.Linear(33, 2))


def train(model: nn.Module, scores: list[nn.Parameter], steps: int = 60) -> list[float]:
    optimizer = torch.optim.SGD(scores, lr=1.0, momentum=0.9, weight_decay=1e-4)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(X), Y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_weights_are_bit_unchanged_after_training_and_the_count_is_exact() -> None:
    model = net()
    before, keys = snapshot(model), list(model.state_dict())
    model[0].bias.requires_grad_(False)
    scores = pr.lottery.supermask_(model, 0.35)
    losses = train(model, scores)
    assert losses[-1] < 0.9 * losses[0]
    for layer, name in ((model[0], "0.weight"), (model[2], "2.weight")):
        assert torch.equal(layer.parametrizations.weight.original, before[name])
        assert int(torch.count_nonzero(layer.weight)) == round(0.35 * before[name].numel())
    output = model(X)
    done = pr.lottery.finalize_supermask(model)
    assert done is model and list(model.state_dict()) == keys and type(model[0]) is nn.Linear
    assert torch.equal(model(X), output)
    after, masks = snapshot(model), masks_of(copy.deepcopy(model))
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {"0.weight": round(0.35 * 330), "2.weight": 23}
    for name, value in before.items():
        mask = masks.get(name, torch.ones_like(value, dtype=torch.bool))
        assert torch.equal(after[name][mask], value[mask]) and int(torch.count_nonzero(after[name][~mask])) == 0
    asked = {name: p.requires_grad for name, p in model.named_parameters()}
    assert asked == {"0.weight": True, "0.bias": False, "2.weight": True, "2.bias": True}


def test_the_gradient_of_a_score_is_that_of_the_masked_weight_times_the_weight() -> None:
    model = net()
    scores = pr.lottery.supermask_(model, 0.5)
    weight = model[0].weight
    weight.retain_grad()
    hidden = nn.functional.linear(X, weight, model[0].bias).relu()
    (found,) = torch.autograd.grad(nn.functional.cross_entropy(model[2](hidden), Y), weight, retain_graph=True)
    nn.functional.cross_entropy(model[2](hidden), Y).backward()
    original = model[0].parametrizations.weight.original
    assert original.grad is None and scores[0].grad is not None
    assert torch.equal(scores[0].grad, found * original) and int(torch.count_nonzero(scores[0].grad)) > 200


def test_signed_constants() -> None:
    model = net()
    weight = model[0].weight.detach().clone()
    pr.lottery.supermask_(model, 1.0, constant=True)
    assert torch.equal(model[0].weight, torch.where(weight < 0, -1.0, 1.0) * weight.std())


def test_the_highest_scores_stay_and_the_seed_decides_the_first() -> None:
    first, again, other = (pr.lottery.supermask_(net(), 0.5, seed=s)[0] for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    model = net()
    scores = pr.lottery.supermask_(model, 0.25, only=["2.*"])
    assert len(scores) == 1
    with torch.no_grad():
        scores[0].copy_(torch.arange(66.0).view(2, 33))
    pr.lottery.finalize_supermask(model)
    assert masks_of(model)["2.weight"].flatten().nonzero().flatten().tolist() == list(range(66 - 16, 66))


def test_it_goes_on_with_a_pruner_and_through_a_state_dict() -> None:
    model = net()
    train(model, pr.lottery.supermask_(model, 0.5), 5)
    replica = net()
    pr.lottery.supermask_(replica, 0.5, seed=9)
    replica.load_state_dict(model.state_dict())
    assert torch.equal(replica(X), model(X))
    pr.lottery.finalize_supermask(model)
    assert equal(snapshot(pr.lottery.finalize_supermask(replica)), snapshot(model))
    mask = masks_of(model)["0.weight"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with pr.Pruner(model, optimizer):
        model(X).sum().backward()
        optimizer.step()
    assert int(torch.count_nonzero(model[0].weight.detach()[~mask])) == 0


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(pr.PruningError, match="density=0"):
        pr.lottery.supermask_(net(), 0.0)
    with pytest.raises(pr.PruningError, match="names no weight"):
        pr.lottery.supermask_(net(), 0.5, only=["9.*"])
    with pytest.raises(pr.PruningError, match="no supermask"):
        pr.lottery.finalize_supermask(net())
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    with pytest.raises(pr.PruningError, match="is shared by 0 and 1"):
        pr.lottery.supermask_(tied, 0.5)
