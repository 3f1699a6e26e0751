"""Top-KAST: exact counts forward and backward, gradients that are zero outside, and a plain model at the end."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import prunella as pr
from prunella.model.masks import masks_of

X = torch.randn(32, 12, generator=torch.Generator().manual_seed(1))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 4))


def planned(model: nn.Module, sparsity: float = 0.8) -> pr.Plan:
    return pr.plan(model, X, pr.Recipe(pr.magnitude, pr.Element(), pr.allocation.erk), target=pr.Sparsity(sparsity))


def test_forward_is_top_d_and_gradients_reach_d_plus_m_only() -> None:
    model = net()
    dense = {name: p.detach().clone() for name, p in model.named_parameters()}
    made = planned(model)
    loop = pr.train.top_kast_(model, made, extra=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        for layer, name in ((model[0], "0.weight"), (model[2], "2.weight")):
            wanted = int(made.masks[name].sum())
            sizes = dense[name].abs().flatten() if _ == 0 else layer.parametrizations.weight.original.abs().flatten()
            assert int(torch.count_nonzero(layer.weight)) == wanted
            assert layer.weight.detach().flatten().nonzero().flatten().tolist() == sorted(
                sizes.topk(wanted).indices.tolist()
            )
            reached = torch.zeros(sizes.numel(), dtype=torch.bool)
            reached[sizes.topk(wanted + round(0.1 * sizes.numel())).indices] = True
            grad = layer.parametrizations.weight.original.grad.flatten()
            assert int(torch.count_nonzero(grad[~reached])) == 0 and int(torch.count_nonzero(grad)) > wanted
        before = model[0].parametrizations.weight.original.detach().clone()
        outside = ~model[0].parametrizations.weight[0].reached
        optimizer.step()
        assert model[0].parametrizations.weight.original.detach()[outside].equal(before[outside])
        assert loop.step()


def test_finalize_leaves_the_plain_model_masked() -> None:
    model = net()
    keys, made = list(model.state_dict()), planned(model)
    counts = {name: int(mask.sum()) for name, mask in made.masks.items()}
    loop = pr.train.top_kast_(model, made, every=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    chosen = []
    for _ in range(6):
        optimizer.zero_grad()
        (model(X).square().mean() + 1e-3 * loop.penalty()).backward()
        optimizer.step()
        chosen.append(loop.step())
    assert chosen == [False, False, True] * 2
    expected = model(X)
    done = loop.finalize()
    assert done is model and list(model.state_dict()) == keys and type(model[0]) is nn.Linear
    assert torch.equal(model(X), expected)
    for name, mask in masks_of(copy.deepcopy(model)).items():
        assert int(mask.sum()) == counts[name] == int(torch.count_nonzero(model.get_parameter(name)))
    with pytest.raises(pr.PruningError, match="finalized already"):
        loop.finalize()


def test_the_penalty_by_hand() -> None:
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[4.0, 3.0, 2.0, 1.0]]))
    made = pr.plan(model, torch.randn(2, 4), pr.Recipe(pr.magnitude, pr.Element()), target=pr.Sparsity(0.5))
    loop = pr.train.top_kast_(model, made, extra=0.25)
    assert loop.penalty().item() == 16 + 9 + 4 / 0.5


def test_what_cannot_be_done_is_refused() -> None:
    model = net()
    with pytest.raises(pr.PruningError, match="no masks of weights"):
        pr.train.top_kast_(model, pr.plan(model, X, target=pr.Sparsity(0.5)))
    with pytest.raises(pr.PruningError, match="out of range"):
        pr.train.top_kast_(model, planned(model), extra=1.0)
