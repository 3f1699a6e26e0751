"""Cycles, soft filter pruning and network surgery: what was pruned may come back, and the end is exact."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import prunella as pr
from prunella.errors import RequestError
from prunella.train.network_surgery import spliced
from tests.graphs import convnet, images, square_loss

X = torch.randn(16, 10, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 16), nn.ReLU(), nn.Linear(16, 3))


def descend(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    (model(X) - 1).square().mean().backward()
    optimizer.step()


def zeros(model: nn.Module) -> int:
    return sum(int((p == 0).sum()) for p in model.parameters() if p.dim() > 1)


def test_a_cycle_prunes_in_turn_and_ends_sparse() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    pruner = pr.Pruner(
        model, optimizer, recipe=pr.Recipe(granularity=pr.Element()), target=pr.Sparsity(0.75), inputs=X,
        schedule=lambda p: pr.schedules.acdc(p, cycles=2, warmup=0.2, last=0.2), steps=20, nested=False,
    )  # fmt: skip
    found = []
    for _ in range(20):
        descend(model, optimizer)
        pruner.step()
        masks = pr.masks_of(model)
        found.append(sum(int((~m).sum()) for m in masks.values()))
        weight = model[0].weight
        if "0.weight" in masks:
            momentum = optimizer.state[weight]["momentum_buffer"]
            assert not bool(weight[~masks["0.weight"]].any()) and not bool(momentum[~masks["0.weight"]].any())
    most = round(0.75 * (160 + 48))
    assert found == [0] * 3 + [most] * 3 + [0] * 3 + [most] * 3 + [0] * 3 + [most] * 5
    descend(model, optimizer)
    assert zeros(model) == most


def test_all_weights_learn_again_in_a_dense_phase() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    pruner = pr.Pruner(model, optimizer, recipe=pr.Recipe(granularity=pr.Element()), target=pr.Sparsity(0.5), inputs=X,
                       schedule=lambda p: float(p in (0.25, 1.0)), steps=4, nested=False)  # fmt: skip
    descend(model, optimizer)
    assert pruner.step() is not None
    pruned = model[2].weight == 0
    assert pruner.step() is None and pr.masks_of(model) == {}
    descend(model, optimizer)
    assert bool((model[2].weight[pruned] != 0).any())


def test_a_cycle_with_nested_masks_is_refused() -> None:
    pruner = pr.Pruner(net(), recipe=pr.Recipe(granularity=pr.Element()), target=pr.Sparsity(0.5), inputs=X,
                       schedule=lambda p: pr.schedules.acdc(p, cycles=1, warmup=0.25, last=0.25), steps=4)  # fmt: skip
    pruner.step()
    with pytest.raises(RequestError, match="nested=False"):
        for _ in range(3):
            pruner.step()


@pytest.mark.parametrize("when", ["before", "during", "after"])
def test_the_same_pruner_prunes_before_during_and_after_training(when: str) -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    make = {
        "before": (pr.schedules.single_step, 1, 1),
        "during": (pr.schedules.cubic, 9, 3),
        "after": (pr.schedules.single_step, 1, 1),
    }
    schedule, steps, every = make[when]
    recipe = pr.Recipe(granularity=pr.Element())
    pruner = pr.Pruner(model, optimizer, recipe=recipe, target=pr.Sparsity(0.75), inputs=X, schedule=schedule,
                       steps=steps, every=every)  # fmt: skip
    if when == "before":
        pruner.step()
    for _ in range(10):
        descend(model, optimizer)
        if when == "during":
            pruner.step()
    if when == "after":
        pruner.step()
    assert zeros(model) == round(0.75 * 208) == sum(int((~m).sum()) for m in pr.masks_of(model).values())


def test_a_soft_filter_gets_gradient_revives_and_the_end_is_exact() -> None:
    model, data = convnet().train(), images()
    nn.init.uniform_(model[1].bias, 0.1, 0.5)  # a shift below zero is cut off by the ReLU, and passes no gradient
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    soft = pr.train.SoftFilterPruner(model, data[0], recipe=pr.Recipe(), target=pr.Sparsity(0.5))
    plan = soft.step()
    pruned = ~plan.keep["0"]
    weight = model[0].weight
    assert int(pruned.sum()) == 4 and not bool(weight[pruned].any()) and bool(weight[~pruned].all())
    readers = model[3].weight[plan.keep["3"]]
    assert bool(readers[:, pruned].all()) and bool(model[1].bias[pruned].all()) and pr.masks_of(model) == {}
    square_loss(model, data[0]).backward()
    assert weight.grad is not None and bool(weight.grad[pruned].flatten(1).any(1).all())
    optimizer.step()
    assert bool(weight[pruned].flatten(1).any(1).all())
    last = soft.finish()
    cut = ~last.keep["0"]
    assert (
        not bool(weight[cut].any()) and not bool(model[3].weight[:, cut].any()) and not bool(model[1].bias[cut].any())
    )
    model.eval()
    small = pr.shrink(model, last)
    assert torch.allclose(small(data[0]), model(data[0]), atol=1e-5) and small[0].out_channels == 4


def test_soft_masks_of_weights_are_forgotten_until_the_end() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    soft = pr.train.SoftFilterPruner(model, X, recipe=pr.Recipe(granularity=pr.Element()), target=pr.Sparsity(0.5))
    soft.step()
    assert zeros(model) == 104 and pr.masks_of(model) == {}
    descend(model, optimizer)
    assert zeros(model) < 104
    soft.finish()
    assert zeros(model) == 104 == sum(int((~m).sum()) for m in pr.masks_of(model).values())


def test_the_mask_is_spliced_by_two_thresholds() -> None:
    weights = torch.tensor([0.1, 0.4, 0.5, 0.9])
    may, must = weights >= 0.3, weights >= 0.8
    assert spliced(None, may, must).tolist() == [False, True, True, True]
    assert spliced(torch.tensor([True, False, True, False]), may, must).tolist() == [False, False, True, True]


def test_surgery_moves_the_dense_weights_by_the_gradient_at_the_masked_ones() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recipe = pr.Recipe(granularity=pr.Element())
    surgery = pr.train.NetworkSurgery(
        model, optimizer, recipe=recipe, target=pr.Sparsity(0.5), inputs=X, band=0.1, every=1
    )
    dense = copy.deepcopy(model.state_dict())
    surgery.step()
    assert zeros(model) == round(0.4 * 208)
    for _ in range(3):
        replica = copy.deepcopy(model)
        (replica(X) - 1).square().mean().backward()
        masks = {n: (p == 0).detach() for n, p in model.named_parameters() if p.dim() > 1}
        descend(model, optimizer)
        for name, parameter in replica.named_parameters():
            assert parameter.grad is not None
            dense[name] = dense[name] - 0.1 * parameter.grad
            shown = dict(model.named_parameters())[name]
            hidden = masks.get(name, torch.zeros_like(shown, dtype=torch.bool))
            assert torch.allclose(shown[~hidden], dense[name][~hidden]) and not bool(shown[hidden].any())
    plan = surgery.finish()
    assert zeros(model) == 104 and not optimizer._optimizer_step_post_hooks
    for name, mask in plan.masks.items():
        assert torch.allclose(dict(model.named_parameters())[name][mask], dense[name][mask])
    model2 = pr.finalize(model)
    assert model2 is model


def test_a_connection_that_was_cut_is_spliced_back() -> None:
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.1, 0.2, 0.8, 0.9]]))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    recipe = pr.Recipe(granularity=pr.Element())
    surgery = pr.train.NetworkSurgery(
        model, optimizer, recipe=recipe, target=pr.Sparsity(0.5), inputs=torch.ones(1, 4), band=0.0, every=1
    )
    surgery.step()
    assert model[0].weight.tolist() == [[0, 0, pytest.approx(0.8), pytest.approx(0.9)]]
    model[0].weight.grad = torch.tensor([[-2.0, 0.0, 0.0, 0.0]])
    optimizer.step()
    surgery.step()
    assert model[0].weight.tolist() == [[pytest.approx(2.1), 0, 0, pytest.approx(0.9)]]


def test_surgery_that_was_stopped_goes_on_with_the_same_bits() -> None:
    def start(model: nn.Module) -> tuple[torch.optim.Optimizer, pr.train.NetworkSurgery]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        recipe = pr.Recipe(granularity=pr.Element())
        return optimizer, pr.train.NetworkSurgery(
            model, optimizer, recipe=recipe, target=pr.Sparsity(0.5), inputs=X, every=2
        )

    def go(model: nn.Module, optimizer: torch.optim.Optimizer, surgery: pr.train.NetworkSurgery, steps: int) -> None:
        for _ in range(steps):
            descend(model, optimizer)
            surgery.step()

    whole, halted = net(), net()
    straight, first = start(whole), start(halted)
    go(whole, *straight, 7)
    go(halted, *first, 3)
    fresh = net()
    fresh.load_state_dict(halted.state_dict())
    second = start(fresh)
    second[1].load_state_dict(first[1].state_dict())
    go(fresh, *second, 4)
    assert straight[1].finish().masks.keys() == second[1].finish().masks.keys()
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), fresh.parameters(), strict=True))
    with pytest.raises(RequestError, match="do not fit"):
        first[1].load_state_dict({"step": torch.tensor(1), "dense.0.weight": torch.ones(1)})


def test_surgery_refuses_channels_and_bands_out_of_range() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(RequestError, match="band"):
        pr.train.NetworkSurgery(model, optimizer, recipe=pr.Recipe(), target=pr.Sparsity(0.5), inputs=X, band=0.6)
    surgery = pr.train.NetworkSurgery(model, optimizer, recipe=pr.Recipe(), target=pr.Sparsity(0.5), inputs=X, every=1)
    with pytest.raises(RequestError, match="single weights only"):
        surgery.step()
