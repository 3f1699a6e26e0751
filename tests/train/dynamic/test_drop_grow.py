"""Dynamic sparse training: the numbers of the papers, exact counts at every update, and state that survives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import prunella as pr
from prunella.model.masks import masks_of, reapply_
from prunella.train.dynamic.drop_grow import DropGrow
from prunella.train.dynamic.exchange import exchange, fair_shares, thin
from prunella.train.dynamic.rules import (
    Rule,
    cosine_fraction,
    dense_gradient,
    granet,
    itop,
    rigl,
    rigl_flops,
    set_,
    sparse_momentum,
)

X = torch.randn(64, 12, generator=torch.Generator().manual_seed(5))
RULES: dict[str, Callable[[], Rule]] = {
    "set": set_,
    "rigl": rigl,
    "snfs": lambda: sparse_momentum(alpha=0.5),
    "granet": lambda: granet(final=0.9, alpha=0.5),
}


def net(sparsity: float = 0.7, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 15), nn.Tanh(), nn.Linear(15, 3))
    if sparsity:
        pr.apply_(
            model,
            pr.plan(
                model,
                X[:2],
                pr.Recipe(pr.criteria.random, pr.Element(), pr.allocation.erk),
                target=pr.Sparsity(sparsity),
            ),
        )
    return model


def sgd(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)


def descend(model: nn.Module, *optimizers: Optimizer, seed: int = 0) -> None:
    batch = torch.randn(16, 12, generator=torch.Generator().manual_seed(seed))
    model.zero_grad()
    (model(batch) - batch[:, :3].sin()).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()


def counts(model: nn.Module) -> dict[str, int]:
    return {name: int(mask.sum()) for name, mask in masks_of(model).items()}


def test_the_fraction_of_rigl_at_the_quarters() -> None:
    fraction = rigl(alpha=0.3).fraction
    found = [fraction(p) for p in (0, 0.25, 0.5, 0.75, 1)]
    assert found == pytest.approx([0.3, 0.2561, 0.15, 0.0439, 0], abs=5e-5)
    assert set_(zeta=0.2).fraction(0.9) == 0.2 and cosine_fraction(0.5)(0) == 0.5


def test_the_cost_of_training_with_rigl() -> None:
    assert rigl_flops(2, 10, 1) == pytest.approx((6 + 4 + 10) / 2)
    assert rigl_flops(0.1, 1, 100) == pytest.approx((3 * 0.1 * 100 + 2 * 0.1 + 1) / 101)
    assert rigl_flops(1, 1, 1000) == pytest.approx(3)


def test_an_exchange_worked_by_hand() -> None:
    mask = torch.tensor([[True, True, True, False, False, False]])
    drop = torch.tensor([3.0, 1.0, 2.0, 9.0, 9.0, 9.0])
    grow = torch.tensor([9.0, 9.0, 9.0, 1.0, 3.0, 2.0])
    new, kept = exchange(mask, 2, 2, drop, grow)
    assert kept.tolist() == [[True, False, False, False, False, False]]
    assert new.tolist() == [[True, False, False, False, True, True]]
    # what was dropped comes back only where nothing else is left
    new, kept = exchange(mask, 2, 4, drop, torch.tensor([0.0, 5.0, 4.0, 1.0, 3.0, 2.0]))
    assert new.tolist() == [[True, True, False, True, True, True]]


def test_thinning_is_exact_and_global_and_leaves_no_layer_empty() -> None:
    masks = [torch.tensor([True, True, False]), torch.tensor([True, True, True])]
    scores = [torch.tensor([0.1, 0.2, 9.0]), torch.tensor([5.0, 6.0, 7.0])]
    found = thin(masks, scores, 3)
    assert [m.tolist() for m in found] == [[False, True, False], [False, True, True]]


def test_shares_are_whole_exact_and_never_above_the_room() -> None:
    assert fair_shares(10, [1, 1, 2], [100, 100, 100]) == [3, 2, 5]
    assert fair_shares(10, [100, 1, 1], [4, 9, 9]) == [4, 3, 3]
    assert fair_shares(10, [100, 1, 5], [4, 9, 9]) == [4, 1, 5]
    assert fair_shares(7, [0, 0], [5, 5]) in ([4, 3], [3, 4])
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        rooms = torch.randint(0, 30, (5,), generator=generator).tolist()
        total = int(torch.randint(0, sum(rooms) + 1, (1,), generator=generator))
        shares = fair_shares(total, torch.rand(5, generator=generator).tolist(), rooms)
        assert sum(shares) == total and all(0 <= s <= r for s, r in zip(shares, rooms, strict=True))
    with pytest.raises(ValueError, match="cannot place"):
        fair_shares(3, [1.0], [2])


@pytest.mark.parametrize("name", ["set", "rigl"])
def test_the_number_of_weights_of_every_layer_stays_exact_at_every_update(name: str) -> None:
    model = net()
    optimizer, start, moved = sgd(model), counts(model), 0
    keys = list(model.state_dict())
    with DropGrow(model, optimizer, rule=RULES[name](), steps=30, every=3) as loop:
        for step in range(40):
            descend(model, optimizer, seed=step)
            before = masks_of(model)
            update = loop.step()
            assert counts(model) == start and (update is not None) == (step < 30 and step % 3 == 2)
            if update:
                after = masks_of(model)
                part = loop.rule.fraction((step + 1) / 30)
                rooms = {n: mask.numel() - start[n] for n, mask in after.items()}
                asked = sum(min(rooms[n], max(part > 0, round(part * start[n]))) for n in start)
                assert update.dropped == update.grown == asked
                assert sum(int((before[n] & ~after[n]).sum()) for n in after) == update.dropped
                moved += update.grown
            for key, mask in masks_of(model).items():
                assert int(torch.count_nonzero(model.get_parameter(key).detach()[~mask])) == 0
    assert moved > 0 and list(model.state_dict()) == keys


def test_rigl_drops_the_smallest_and_grows_where_the_dense_gradient_is_largest() -> None:
    model = net()
    optimizer = sgd(model)
    loop = DropGrow(model, optimizer, rule=rigl(alpha=0.4), steps=4, every=1)
    descend(model, optimizer)
    before, weight, grad = masks_of(model)["0.weight"], model[0].weight.detach().clone(), model[0].weight.grad
    assert grad is not None
    loop.step()
    after = masks_of(model)["0.weight"]
    pruned, born = before & ~after, after & ~before
    k = round(0.4 / 2 * (1 + 2**-0.5) * int(before.sum()))
    assert int(pruned.sum()) == int(born.sum()) == k > 1
    assert weight[pruned].abs().max() <= weight[after & before].abs().min()
    assert grad[born].abs().min() >= grad[~before & ~after].abs().max()


@pytest.mark.parametrize("make", [sgd, lambda m: torch.optim.AdamW(m.parameters(), lr=0.01)], ids=["sgd", "adamw"])
def test_what_grows_starts_at_zero_with_empty_moments(make: Callable[[nn.Module], Optimizer]) -> None:
    model = net()
    optimizer = make(model)
    loop = DropGrow(model, optimizer, rule=rigl(), steps=20, every=4)
    for step in range(4):
        descend(model, optimizer, seed=step)
        before = masks_of(model)["2.weight"]
        update = loop.step()
    assert update is not None
    after, weight = masks_of(model)["2.weight"], model[2].weight
    for moved in (after & ~before, before & ~after):
        assert int(moved.sum()) > 0 and int(torch.count_nonzero(weight.detach()[moved])) == 0
        for value in optimizer.state[weight].values():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                assert int(torch.count_nonzero(value[moved])) == 0 and int(torch.count_nonzero(value)) > 0
    descend(model, optimizer, seed=9)
    assert int(torch.count_nonzero(weight.detach()[after & ~before])) > 0


def test_the_dense_gradient_is_read_at_updates_only() -> None:
    model, read = net(), []

    def watched(grad: Tensor) -> Tensor:
        read.append(loop.taken)
        return grad.abs()

    optimizer = sgd(model)
    loop = DropGrow(model, optimizer, rule=Rule(cosine_fraction(0.3), grow=watched), steps=12, every=5)
    held = []
    for step in range(12):
        descend(model, optimizer, seed=step)
        held.append(bool(loop._grads))
        loop.step()
    assert sorted(set(read)) == [5, 10] and [i + 1 for i, some in enumerate(held) if some] == [5, 10, 12]


def test_sparse_momentum_keeps_the_total_and_moves_it_between_layers() -> None:
    model = net(0.5)
    optimizer = sgd(model)
    loop = DropGrow(model, optimizer, rule=sparse_momentum(alpha=0.9, memory=0.5), steps=60, every=2)
    total, split = loop.kept, []
    for step in range(60):
        descend(model, optimizer, seed=step)
        loop.step()
        masks = loop.masks()
        split.append([int(mask.sum()) for mask in masks.values()])
        assert sum(split[-1]) == total == loop.kept
        assert all(int(mask.sum()) <= mask.numel() for mask in masks.values())
    assert len({tuple(s) for s in split}) > 5


def test_sparse_momentum_shares_by_the_mean_momentum_of_active_weights() -> None:
    model = net(0.5)
    optimizer = sgd(model)
    loop = DropGrow(model, optimizer, rule=sparse_momentum(alpha=0.4, memory=0.75), steps=1000, every=2)
    average: dict[str, Tensor] = {}
    for step in range(2):
        descend(model, optimizer, seed=step)
        for name in loop.masks():
            grad = model.get_parameter(name).grad
            assert grad is not None
            average[name] = 0.25 * grad + 0.75 * average.get(name, torch.zeros_like(grad))
        before = loop.masks()
        loop.step()
    state = loop.state_dict()
    assert all(torch.allclose(state[f"gradient.{name}"], value) for name, value in average.items())
    part = loop.rule.fraction(2 / 1000)
    pruned = {name: round(part * int(mask.sum())) for name, mask in before.items()}
    means = [float(average[name].abs()[mask].double().mean()) for name, mask in before.items()]
    rooms = [mask.numel() - int(mask.sum()) + pruned[name] for name, mask in before.items()]
    shares = fair_shares(sum(pruned.values()), means, rooms)
    found = [int(new.sum()) - int(before[name].sum()) + pruned[name] for name, new in loop.masks().items()]
    assert found == shares


def test_granet_tracks_the_cubic_curve_and_still_exchanges() -> None:
    model = net(0.4)
    optimizer = sgd(model)
    loop = DropGrow(model, optimizer, rule=granet(final=0.9, alpha=0.5), steps=50, every=5)
    total, first = loop.total, 1 - loop.kept / loop.total
    for step in range(60):
        descend(model, optimizer, seed=step)
        update = loop.step()
        if update:
            t = (step + 1) / 50
            wanted = 0.9 + (first - 0.9) * (1 - t) ** 3
            assert abs(loop.kept - total * (1 - wanted)) <= 1 and update.kept == loop.kept
            assert t == 1 or update.grown >= 1
            assert sum(counts(model).values()) == loop.kept
    assert loop.kept == total - round(0.9 * total)


def test_granet_may_start_dense() -> None:
    model = net(0)
    optimizer = sgd(model)
    loop = DropGrow(model, optimizer, rule=granet(final=0.8), steps=20, every=5, layers=["*.weight"])
    assert loop.kept == loop.total == 12 * 20 + 20 * 15 + 15 * 3
    for step in range(20):
        descend(model, optimizer, seed=step)
        loop.step()
    assert loop.kept == loop.total - round(0.8 * loop.total) == sum(counts(model).values())


@pytest.mark.parametrize("name", RULES)
def test_exploration_is_the_brute_force_union_never_falls_and_stays_below_one(name: str) -> None:
    model = net(0.7)
    optimizer, seen, found = sgd(model), [], []
    loop = DropGrow(model, optimizer, rule=RULES[name](), steps=40, every=2)
    seen.append(loop.masks())
    for step in range(40):
        descend(model, optimizer, seed=step)
        if loop.step():
            seen.append(loop.masks())
            union = {n: torch.stack([one[n] for one in seen]).any(0) for n in seen[0]}
            brute = sum(int(m.sum()) for m in union.values()) / loop.total
            assert loop.explored == brute == itop(seen)
            found.append(brute)
    assert all(a <= b for a, b in pairwise(found)) and 0.3 < found[0] < found[-1] <= 1


def test_random_growth_depends_on_the_seed_alone() -> None:
    def run(seed: int) -> Tensor:
        model = net()
        optimizer = sgd(model)
        loop = DropGrow(model, optimizer, rule=set_(), steps=10, every=2, seed=seed)
        for step in range(6):
            torch.rand(step)
            descend(model, optimizer, seed=step)
            loop.step()
        return loop.masks()["0.weight"]

    assert run(1).equal(run(1)) and not run(1).equal(run(2))


@pytest.mark.parametrize("name", RULES)
def test_a_run_goes_on_from_its_state_bit_for_bit(name: str) -> None:
    def go(model: nn.Module, optimizer: Optimizer, loop: DropGrow, steps: range) -> dict[str, Tensor]:
        for step in steps:
            descend(model, optimizer, seed=step)
            loop.step()
        return {**model.state_dict(), **{f"mask.{k}": v for k, v in masks_of(model).items()}, **loop.state_dict()}

    model = net()
    optimizer = sgd(model)
    loop = DropGrow(model, optimizer, rule=RULES[name](), steps=24, every=3)
    go(model, optimizer, loop, range(10))
    again, saved = copy.deepcopy(model), {k: v.clone() for k, v in loop.state_dict().items()}
    other = sgd(again)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed = DropGrow(again, other, rule=RULES[name](), steps=24, every=3)
    resumed.load_state_dict(saved)
    first, second = go(model, optimizer, loop, range(10, 24)), go(again, other, resumed, range(10, 24))
    assert first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())


def test_an_update_waits_for_a_step_that_was_skipped() -> None:
    model = net()
    optimizer = sgd(model)
    loop = DropGrow(model, optimizer, rule=rigl(), steps=10, every=2)
    descend(model, optimizer)
    assert loop.step() is None
    descend(model)  # a GradScaler that found infinity calls no step
    before = masks_of(model)
    assert loop.step() is None and all(mask.equal(before[n]) for n, mask in masks_of(model).items())
    descend(model, optimizer)
    update = loop.step()
    assert update is not None and update.step == 3
    descend(model, optimizer)
    assert loop.step() is not None


def test_dense_gradients_are_seen_though_pruner_masks_them_for_some_optimizers() -> None:
    model = net()
    optimizer = torch.optim.Adafactor(model.parameters(), lr=0.01)
    loop = DropGrow(model, optimizer, rule=rigl(alpha=0.4), steps=100, every=1)
    before = masks_of(model)["0.weight"]
    model.zero_grad()
    model(X).square().mean().backward()
    assert model[0].weight.grad is not None
    grad = model[0].weight.grad.clone()
    optimizer.step()
    loop.step()
    after = masks_of(model)["0.weight"]
    born = after & ~before
    assert int(born.sum()) > 1 and grad[born].abs().min() >= grad[~before & ~after].abs().max()


def test_several_optimizers_train_one_model() -> None:
    model = net()
    optimizers = [torch.optim.Adam(model[0].parameters(), lr=0.01), torch.optim.SGD(model[2:].parameters(), lr=0.1)]
    loop = DropGrow(model, optimizers, rule=rigl(), steps=10, every=2)
    start = counts(model)
    for step in range(10):
        descend(model, *optimizers, seed=step)
        loop.step()
    assert counts(model) == start and loop.explored > loop.kept / loop.total
    with pytest.raises(pr.PruningError, match=r"no optimizer trains 2.weight"):
        DropGrow(model, optimizers[:1], rule=rigl(), steps=10)


def test_masks_of_other_parameters_stay() -> None:
    model = net()
    loop = DropGrow(model, sgd(model), rule=set_(), steps=10, every=1, layers=["0.*"])
    before = masks_of(model)
    loop.step()
    after = masks_of(model)
    assert before.keys() == after.keys() and after["2.weight"].equal(before["2.weight"])
    assert not after["0.weight"].equal(before["0.weight"])
    reapply_(model)


BAD: list[tuple[str, Callable[[], Any]]] = [
    ("no masks", lambda: DropGrow(m := net(0), sgd(m), rule=rigl(), steps=10).step()),
    ("names no weight", lambda: DropGrow(m := net(0), sgd(m), rule=rigl(), steps=10, layers=["x*"])),
    ("out of range", lambda: DropGrow(m := net(), sgd(m), rule=rigl(), steps=0)),
    ("sparser than", lambda: DropGrow(m := net(0.9), sgd(m), rule=granet(final=0.5), steps=10)),
    ("input_norm", lambda: Rule(cosine_fraction(0.3), grow=pr.wanda)),
    ("alpha=2", lambda: rigl(alpha=2)),
    ("zeta=-1", lambda: set_(zeta=-1)),
    ("memory=1", lambda: sparse_momentum(memory=1.0)),
    ("final=1", lambda: granet(final=1.0)),
    ("there are no masks", lambda: itop([])),
    ("memory=2", lambda: Rule(cosine_fraction(0.3), grow=dense_gradient, memory=2.0)),
]


@pytest.mark.parametrize(("message", "call"), BAD, ids=[message for message, _ in BAD])
def test_a_request_that_makes_no_sense_is_refused_by_a_sentence(message: str, call: Callable[[], Any]) -> None:
    with pytest.raises(pr.PruningError, match=message):
        call()
