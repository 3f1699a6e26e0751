from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prunella.errors import RequestError
from prunella.granularity import Element
from prunella.model.masks import finalize, masks_of
from prunella.planning.accounting import Amount
from prunella.planning.plan import Plan
from prunella.planning.planner import plan
from prunella.planning.recipe import Recipe
from prunella.schedules import cubic, linear, single_step
from prunella.targets import MACs, Sparsity, Target
from prunella.train.pruner import Pruner
from prunella.transform.apply import apply_
from tests.hand import hand_plan

NAME = "0.weight"


def _net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 3))


def _mask(seed: int = 0) -> Tensor:
    return torch.rand(8, 10, generator=torch.Generator().manual_seed(seed)) > 0.5


def _step(net: nn.Module, *optimizers: Optimizer) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad()
    net(torch.randn(16, 10)).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, foreach=False),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1, fused=True),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, weight_decay=0.1, initial_accumulator_value=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0, weight_decay=0.1),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.1, weight_decay=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.1, weight_decay=0.1),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.1, weight_decay=0.1),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.1, weight_decay=0.1),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_pruned_weights_and_moments_stay_exactly_zero(kind: str) -> None:
    net, mask = _net(), _mask()
    optimizer = OPTIMIZERS[kind](net.parameters())
    for _ in range(3):  # momentum from before the masks revives weights that are only set to zero
        _step(net, optimizer)
    apply_(net, hand_plan(masks={NAME: mask}))
    start = net[0].weight.detach().clone()
    with Pruner(net, optimizer):
        for _ in range(5):
            _step(net, optimizer)
            assert torch.count_nonzero(net[0].weight[~mask]) == 0
            moments = [v for v in optimizer.state[net[0].weight].values() if v.shape == mask.shape]
            assert moments and all(torch.count_nonzero(m[~mask]) == 0 for m in moments)
            assert all(torch.count_nonzero(m[mask]) > 0 for m in moments)
    assert torch.all(net[0].weight[mask] != start[mask])
    finalize(net)


def _adafactor(p: Any) -> Optimizer:
    return torch.optim.Adafactor(p, lr=0.1, weight_decay=0.1)


def test_factored_state_sees_masked_weights_as_if_they_had_no_gradient() -> None:
    """Row and column means hold nothing of masked weights, so that the survivors step as with masked gradients."""
    net, mask = _net(), _mask()
    mask[2], mask[:, 3] = False, False
    apply_(net, hand_plan(masks={NAME: mask}))
    replica = copy.deepcopy(net)
    ours, theirs = _adafactor(net.parameters()), _adafactor(replica.parameters())
    with Pruner(net, ours):
        for seed in range(4):
            for model, optimizer in ((net, ours), (replica, theirs)):
                torch.manual_seed(seed)
                optimizer.zero_grad()
                model(torch.randn(16, 10)).square().mean().backward()
                if model is replica:
                    replica[0].weight.grad.mul_(mask)
                optimizer.step()
                with torch.no_grad():
                    replica[0].weight.mul_(mask)
            assert torch.count_nonzero(net[0].weight[~mask]) == 0
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), replica.parameters(), strict=True))
    state = ours.state[net[0].weight]
    assert state["row_var"].shape == (8, 1) and state["row_var"][2] == 0 and (state["row_var"] > 0).sum() == 7
    assert state["col_var"].shape == (1, 10) and state["col_var"][0, 3] == 0 and (state["col_var"] > 0).sum() == 9


def test_factored_state_from_before_the_masks_is_cleared_where_nothing_is_left_of_it() -> None:
    net, mask = _net(), _mask()
    mask[2] = False
    optimizer = _adafactor(net.parameters())
    _step(net, optimizer)
    state = optimizer.state[net[0].weight]
    old = state["row_var"].clone()
    apply_(net, hand_plan(masks={NAME: mask}))
    with Pruner(net, optimizer) as pruner:
        pruner._mask_state()
        assert state["row_var"][2] == 0 and torch.equal(state["row_var"][mask.any(1)], old[mask.any(1)])


def test_a_step_of_the_whole_matrix_leaves_masked_weights_out() -> None:
    torch.manual_seed(0)
    weight, mask = nn.Linear(6, 4, bias=False), torch.rand(4, 6) > 0.5
    apply_(weight, hand_plan(masks={"weight": mask}))
    optimizer = torch.optim.Muon(weight.parameters(), lr=0.1)
    with Pruner(weight, optimizer):
        weight(torch.randn(8, 6)).square().mean().backward()
        wanted = weight.weight.grad * mask
        optimizer.step()
    assert torch.equal(weight.weight.grad, wanted)
    assert torch.count_nonzero(weight.weight[~mask]) == 0 and torch.count_nonzero(weight.weight[mask]) == mask.sum()


def test_element_wise_optimizers_keep_dense_gradients_for_who_reads_them() -> None:
    net, mask = _net(), _mask()
    apply_(net, hand_plan(masks={NAME: mask}))
    optimizer = OPTIMIZERS["adamw"](net.parameters())
    with Pruner(net, optimizer):
        _step(net, optimizer)
    assert torch.count_nonzero(net[0].weight.grad[~mask]) > 0


def test_an_optimizer_without_memory_per_weight_is_refused() -> None:
    net = _net()
    with pytest.raises(RequestError, match="LBFGS"):
        Pruner(net, torch.optim.LBFGS(net.parameters()))


def test_without_a_pruner_the_optimizer_revives_them() -> None:
    net, mask = _net(), _mask()
    optimizer = OPTIMIZERS["adamw"](net.parameters())
    apply_(net, hand_plan(masks={NAME: mask}))
    _step(net, optimizer)
    assert torch.count_nonzero(net[0].weight[~mask]) > 0


def test_training_equals_training_with_masked_gradients() -> None:
    """For AdamW on a masked weight of zero, the hook and a zero gradient do the same to the survivors."""
    net, mask = _net(), _mask()
    apply_(net, hand_plan(masks={NAME: mask}))
    replica = copy.deepcopy(net)
    replica[0].weight.register_hook(lambda g: g * mask)
    ours, theirs = (OPTIMIZERS["adamw"](m.parameters()) for m in (net, replica))
    with Pruner(net, ours):
        for seed in range(4):
            for model, optimizer in ((net, ours), (replica, theirs)):
                torch.manual_seed(seed)
                _step(model, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), replica.parameters(), strict=True))


def test_several_optimizers_and_param_groups() -> None:
    net, mask = _net(), _mask()
    other = torch.rand(3, 8) > 0.5
    apply_(net, hand_plan(masks={NAME: mask, "2.weight": other}))
    first = torch.optim.AdamW([{"params": [net[0].bias]}, {"params": [net[0].weight], "lr": 0.3}])
    second = torch.optim.SGD(net[2].parameters(), lr=0.1, momentum=0.9)
    with Pruner(net, [first, second]):
        for _ in range(3):
            _step(net, first, second)
    assert torch.count_nonzero(net[0].weight[~mask]) == 0
    assert torch.count_nonzero(net[2].weight[~other]) == 0


def test_a_step_that_the_grad_scaler_skips_changes_nothing() -> None:
    net, mask = _net(), _mask()
    apply_(net, hand_plan(masks={NAME: mask}))
    optimizer, scaler = OPTIMIZERS["adamw"](net.parameters()), torch.amp.GradScaler("cpu", init_scale=2.0)
    with Pruner(net, optimizer):
        for scale in (1.0, float("inf"), 1.0):
            before = copy.deepcopy(net.state_dict())
            scaler.scale(net(torch.randn(4, 10)).square().mean() * scale).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            same = torch.equal(net[0].weight, before[NAME])
            assert same == (scale != 1.0)
            assert torch.count_nonzero(net[0].weight[~mask]) == 0


def test_detach_removes_the_hook_and_keeps_the_masks() -> None:
    net, mask = _net(), _mask()
    optimizer = OPTIMIZERS["adamw"](net.parameters())
    apply_(net, hand_plan(masks={NAME: mask}))
    with Pruner(net, optimizer):
        _step(net, optimizer)
    assert not optimizer._optimizer_step_post_hooks and not optimizer._optimizer_step_pre_hooks
    assert torch.equal(masks_of(net)[NAME], mask)
    _step(net, optimizer)
    assert torch.count_nonzero(net[0].weight[~mask]) > 0


def test_masks_that_change_during_training_are_followed() -> None:
    net, first, second = _net(), _mask(1), _mask(2)
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    with Pruner(net, optimizer):
        for mask in (first, second):
            apply_(net, hand_plan(masks={NAME: mask}), regrow=True)
            _step(net, optimizer)
            assert torch.equal(net[0].weight != 0, mask)


def test_an_optimizer_of_another_model_is_refused() -> None:
    with pytest.raises(RequestError, match="no parameter of the model"):
        Pruner(_net(), torch.optim.SGD(_net().parameters(), lr=0.1))


def _magnitude(net: nn.Sequential, log_: list[Target] | None = None) -> Callable[[Target], Plan]:
    """Layer-wise magnitude to exactly `round(s * 80)` zeros."""

    def plan(target: Target) -> Plan:
        if log_ is not None:
            log_.append(target)
        weight = net[0].weight.detach()
        removed = weight.abs().flatten().sort(stable=True).indices[: round(target.value * weight.numel())]
        mask = torch.ones(weight.numel(), dtype=torch.bool)
        mask[removed] = False
        return hand_plan(masks={NAME: mask.reshape(weight.shape)}, target=target)

    return plan


def test_gradual_pruning_follows_the_cubic_schedule_to_the_end() -> None:
    net, asked = _net(), []
    optimizer = OPTIMIZERS["adamw"](net.parameters())
    pruner = Pruner(net, optimizer, recipe=_magnitude(net, asked), target=Sparsity(0.9), steps=10, every=4)
    masks, plans = [], []
    for _ in range(15):
        _step(net, optimizer)
        plans.append(pruner.step() is not None)
        masks.append(masks_of(net).get(NAME, torch.ones(8, 10, dtype=torch.bool)))
    assert [i + 1 for i, done in enumerate(plans) if done] == [4, 8, 10]
    assert [t.value for t in asked] == pytest.approx([0.9 * cubic(0.4), 0.9 * cubic(0.8), 0.9])
    assert asked[-1] == Sparsity(0.9)
    assert [int((~masks[i]).sum()) for i in (2, 3, 7, 9, 14)] == [0, 56, 71, 72, 72]
    assert all(bool((later <= earlier).all()) for earlier, later in pairwise(masks))
    assert torch.equal(net[0].weight != 0, masks[-1])


def test_moments_of_newly_pruned_weights_are_cleared_at_once() -> None:
    net = _net()
    optimizer = OPTIMIZERS["adamw"](net.parameters())
    _step(net, optimizer)
    pruner = Pruner(net, optimizer, recipe=_magnitude(net), target=Sparsity(0.5), schedule=single_step, steps=1)
    pruner.step()
    pruned = ~masks_of(net)[NAME]
    assert pruned.sum() == 40 and torch.count_nonzero(optimizer.state[net[0].weight]["exp_avg"][pruned]) == 0


def test_a_single_step_plans_once() -> None:
    net, asked = _net(), []
    pruner = Pruner(net, recipe=_magnitude(net, asked), target=Sparsity(0.5), schedule=single_step, steps=6, every=2)
    for _ in range(8):
        pruner.step()
    assert asked == [Sparsity(0.5)]


def _alternating() -> Callable[[Target], Plan]:
    state = iter([_mask(1), _mask(2)])
    return lambda target: hand_plan(masks={NAME: next(state)}, target=target)


def test_nested_masks_never_revive_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    net = _net()
    pruner = Pruner(net, recipe=_alternating(), target=Sparsity(0.5), schedule=linear, steps=2)
    with caplog.at_level(logging.WARNING):
        pruner.step()
        assert not caplog.records
        pruner.step()
    assert torch.equal(masks_of(net)[NAME], _mask(1) & _mask(2))
    assert str(int((_mask(2) & ~_mask(1)).sum())) in caplog.text


def test_without_nesting_the_newest_plan_decides() -> None:
    net = _net()
    pruner = Pruner(net, recipe=_alternating(), target=Sparsity(0.5), schedule=linear, steps=2, nested=False)
    pruner.step()
    pruner.step()
    assert torch.equal(masks_of(net)[NAME], _mask(2))


@pytest.mark.parametrize(("final", "halfway"), [(MACs(0.5), 0.75), (MACs(400.0), 0.7)])
def test_a_budget_is_approached_from_the_dense_model(final: MACs, halfway: float) -> None:
    net, asked = _net(), []

    def plan(target: Target) -> Plan:
        asked.append(target)
        return hand_plan(target=target, before=Amount(0, 1000, 0, 0))

    pruner = Pruner(net, recipe=plan, target=final, schedule=linear, steps=2)
    pruner.step()
    assert isinstance(asked[-1], MACs) and asked[-1].value == pytest.approx(halfway)
    pruner.step()
    assert asked[-1] == final


def test_a_run_that_is_resumed_ends_in_the_same_bits() -> None:
    def run(stop: int | None) -> nn.Sequential:
        net = _net()
        optimizer = OPTIMIZERS["adamw"](net.parameters())
        pruner = Pruner(net, optimizer, recipe=_magnitude(net), target=Sparsity(0.8), steps=6, every=2)
        for step in range(8):
            if step == stop:
                saved = copy.deepcopy((net.state_dict(), optimizer.state_dict(), pruner.state_dict()))
                net = _net(seed=1)
                net.load_state_dict(saved[0])
                optimizer = OPTIMIZERS["adamw"](net.parameters())
                optimizer.load_state_dict(saved[1])
                pruner = Pruner(net, optimizer, recipe=_magnitude(net), target=Sparsity(0.8), steps=6, every=2)
                pruner.load_state_dict(saved[2])
            torch.manual_seed(step)
            _step(net, optimizer)
            pruner.step()
        return net

    whole = run(None)
    for stop in (1, 3, 7):
        again = run(stop)
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
        assert torch.equal(masks_of(again)[NAME], masks_of(whole)[NAME])


def test_the_state_is_tensors_only_and_masks_of_another_model_are_refused() -> None:
    net = apply_(_net(), hand_plan(masks={NAME: _mask()}))
    state = Pruner(net).state_dict()
    assert set(state) == {"step", "fraction", f"bits.{NAME}"} and state[f"bits.{NAME}"].numel() == 10
    assert all(isinstance(value, Tensor) for value in state.values())
    with pytest.raises(RequestError, match="do not fit this model"):
        Pruner(nn.Sequential(nn.Linear(2, 2))).load_state_dict(state)


def test_loaded_masks_replace_those_of_the_model() -> None:
    state = Pruner(apply_(_net(), hand_plan(masks={NAME: _mask(1)}))).state_dict()
    net = apply_(_net(), hand_plan(masks={NAME: _mask(2), "2.bias": torch.tensor([True, False, True])}))
    Pruner(net).load_state_dict(state)
    assert masks_of(net).keys() == {NAME} and torch.equal(masks_of(net)[NAME], _mask(1))


def test_incomplete_requests_are_refused() -> None:
    net = _net()
    with pytest.raises(RequestError, match="target="):
        Pruner(net, recipe=_magnitude(net), steps=5)
    with pytest.raises(RequestError, match="every="):
        Pruner(net, recipe=_magnitude(net), target=Sparsity(0.5), steps=5, every=0)
    with pytest.raises(RequestError, match="example batch"):
        Pruner(net, recipe=Recipe(), target=Sparsity(0.5), steps=5)


def test_a_scalar_parameter_keeps_the_step_count_of_its_optimizer() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

    net = apply_(Scale(), hand_plan(masks={"scale": torch.tensor(False)}))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    with Pruner(net, optimizer):
        for _ in range(2):
            net.scale.grad = torch.tensor(1.0)
            optimizer.step()
    assert net.scale.item() == 0 and float(optimizer.state[net.scale]["step"]) == 2


def test_a_recipe_prunes_gradually_to_the_exact_number_of_weights() -> None:
    net, steps = _net(), []
    optimizer = OPTIMIZERS["adamw"](net.parameters())
    recipe = Recipe(granularity=Element())
    pruner = Pruner(net, optimizer, recipe=recipe, target=Sparsity(0.9), inputs=torch.randn(2, 10), steps=6, every=2)
    for _ in range(8):
        _step(net, optimizer)
        if pruner.step():
            steps.append({name: mask.clone() for name, mask in masks_of(net).items()})
    assert len(steps) == 3
    one_shot_plan = plan(net, torch.randn(2, 10), recipe, target=Sparsity(0.9))
    assert {k: int(m.sum()) for k, m in steps[-1].items()} == {k: int(m.sum()) for k, m in one_shot_plan.masks.items()}
    for earlier, later in pairwise(steps):
        assert all(bool((later[name] <= earlier[name]).all()) for name in earlier)


def test_structure_is_pruned_gradually_and_stays_pruned() -> None:
    net = _net()
    optimizer = OPTIMIZERS["adamw"](net.parameters())
    pruner = Pruner(net, optimizer, recipe=Recipe(), target=Sparsity(0.5), inputs=torch.randn(2, 10), steps=4)
    for _ in range(6):
        _step(net, optimizer)
        pruner.step()
    alive = net[0].weight.abs().sum(1) > 0
    assert int(alive.sum()) == 4
    assert torch.equal(net[0].bias != 0, alive)
    assert torch.equal(net[2].weight.abs().sum(0) > 0, alive)
