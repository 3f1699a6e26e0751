"""A model without some of its blocks computes what the whole one does with these bypassed; everything follows."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from tests.graph.depth.nets import IMAGE, TOKENS, Calls, ConvNext, Layer, Lender, Net, ResNet, Wrap, bypass
from tests.oracle import assert_untouched, distance, distinct, double, exact_groups, macs, run, settle, snapshot
from torch import nn

import prunella as pr
from prunella.errors import NotSupported, RequestError
from prunella.graph.cut.block_surgery import drop_
from prunella.graph.cut.changes import Changes, changes
from prunella.graph.cut.surgery import change_
from prunella.graph.solve.block_counters import counted
from prunella.graph.solve.groups import couple
from prunella.graph.verify import unproven, verify
from prunella.io.plan_file import load_plan, save_plan
from prunella.model.masks import reapply_
from prunella.stats.gradient import gate_gradient
from prunella.transform.optimizer import carry_

MODELS: dict[str, tuple[Any, Any]] = {
    "pre-norm": (Net, TOKENS),
    "post-norm": (partial(Net, post=True), TOKENS),
    "counted": (partial(Net, count=True), TOKENS),
    "resnet": (ResNet, IMAGE),
    "convnext": (ConvNext, IMAGE),
    "lender": (Lender, TOKENS),
    "in place": (partial(Wrap, lambda k: Calls(lambda x, f: x.add_(f(x)))), TOKENS),
}


@pytest.mark.parametrize("name", MODELS)
def test_dropped_is_bypassed(name: str) -> None:
    make, inputs = MODELS[name]
    model = settle(make()).double()
    graph = couple(model, double(inputs))
    for stack in graph.stacks:
        for pruned in range(stack.size):
            keep = {stack.name: torch.arange(stack.size) != pruned}
            small, done = copy.deepcopy(model), changes(counted(model, graph, double(inputs)), keep)
            change_(small, done)
            assert verify(model, small, done, double(inputs)).exact
            expected = run(bypass(model, [stack.paths[pruned]]), double(inputs))
            assert distance(run(small, double(inputs)), expected) <= 1e-9
            assert distance(run(small, double(inputs)), run(model, double(inputs))) > 1e-6
            assert distinct(small) == graph.params(keep)
            assert macs(small, double(inputs)) == graph.macs(keep)


def test_before_a_norm_bypassed_is_the_same_as_last_weights_of_zero() -> None:
    model = settle(Net()).double()
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        for layer in (zeroed.xyz[1].attention.out, zeroed.xyz[1].down):
            layer.weight.zero_(), layer.bias.zero_()
    drop_(model, {"xyz": ("1",)})
    assert distance(run(model, double(TOKENS)), run(zeroed, double(TOKENS))) <= 1e-12


def test_after_a_norm_it_is_not_and_the_oracle_knows() -> None:
    model = settle(Net(post=True))
    done, small = Changes(dropped={"xyz": ("1",)}), copy.deepcopy(model)
    change_(small, done)
    assert verify(model, small, done, TOKENS).exact
    wrong = copy.deepcopy(model)
    drop_(wrong, {"xyz": ("2",)})
    assert not verify(model, wrong, done, TOKENS).exact


def test_numbers_of_blocks_follow_and_equal_numbers_stay() -> None:
    model = Net()
    change_(model, Changes(dropped={"xyz": ("0", "2")}))
    assert list(model.xyz._modules) == ["0", "1"]
    assert [layer.attention.number for layer in model.xyz] == [5, 6]
    assert model.xyz[0].up.out_features == 24


def test_names_that_are_no_numbers_stay() -> None:
    model = nn.Module()
    model.parts = nn.Sequential()
    for name in ("first", "second", "third"):
        model.parts.add_module(name, nn.Linear(2, 2))
    drop_(model, {"parts": ("second",)})
    assert list(model.parts._modules) == ["first", "third"]


def test_what_counts_the_blocks_is_proven_by_a_run_and_what_does_not_stays() -> None:
    model = settle(Net(count=True))
    plan = pr.plan(model, TOKENS, pr.Recipe(granularity=pr.Depth()), target=pr.Sparsity(0.25))
    small = pr.shrink(model, plan)
    assert plan.attributes == {("", "quantity"): 3}
    assert (small.quantity, small.unrelated, len(small.rates), len(small.xyz)) == (3, 4, 3, 3)
    pruned = int(plan.dropped["xyz"][0])
    assert small.rates == [rate for k, rate in enumerate(model.rates) if k != pruned]


@pytest.mark.parametrize(
    "dropped", [{"xyz": ("9",)}, {"abc": ("0",)}, {"embed": ("0",)}, {"xyz": tuple("0123")}, {"": ("xyz",)}]
)
def test_blocks_that_are_not_there_are_refused(dropped: dict[str, tuple[str, ...]]) -> None:
    with pytest.raises(RequestError, match="does not have"):
        drop_(Net(), dropped)


# -- plans ---------------------------------------------------------------------------------------------------------


def test_the_lowest_scores_go_and_the_model_is_left_as_it_was() -> None:
    model = settle(Net())
    with torch.no_grad():
        for parameter in model.xyz[2].parameters():
            parameter.mul_(0.1)
    before = snapshot(model)
    plan = pr.plan(model, TOKENS, pr.Recipe(granularity=pr.Depth()), target=pr.Sparsity(0.25))
    assert_untouched(before, snapshot(model))
    assert plan.dropped == {"xyz": ("2",)}
    (row,) = plan.rows
    assert (row.name, row.kind, row.kept, row.total) == ("xyz", "block", 3, 4)
    assert "3/4" in str(plan)


def test_the_score_is_the_sum_over_all_parameters_that_the_block_has() -> None:
    model = settle(Net(2))
    graph = couple(model, TOKENS)
    total = [sum(p.abs().double().sum().item() for p in layer.parameters()) for layer in model.xyz]
    plan = pr.plan(model, TOKENS, pr.Recipe(granularity=pr.Depth()), target=pr.Sparsity(0.5))
    assert plan.dropped == {"xyz": (str(total.index(min(total))),)}
    assert {m.entity for m in graph.stacks[0].members} == {n for n, _ in model.named_parameters() if n[:3] == "xyz"}


@pytest.mark.parametrize("criterion", [pr.magnitude, pr.taylor, pr.criteria.random])
def test_criteria_of_weights_score_blocks(criterion: Any) -> None:
    model = settle(Net())
    loss = lambda m, batch: m(batch).square().mean()  # noqa: E731
    recipe = pr.Recipe(criterion, pr.Depth())
    plan = pr.plan(model, TOKENS, recipe, target=pr.MACs(0.8), data=[TOKENS], loss=loss)
    assert plan.got <= 0.8 and len(plan.dropped["xyz"]) == 1


def test_the_gate_of_a_block_is_on_all_its_weights() -> None:
    model = settle(Net())
    for layer in model.xyz:
        layer.gate = torch.ones((), requires_grad=True)
    gated = {n: p * model.xyz[int(n[4])].gate for n, p in model.named_parameters() if n[:4] == "xyz."}
    torch.func.functional_call(model, gated, (TOKENS,)).square().mean().backward()
    expected = torch.stack([layer.gate.grad for layer in model.xyz])
    weights = dict(model.named_parameters())
    grads = dict(zip(weights, torch.autograd.grad(model(TOKENS).square().mean(), list(weights.values())), strict=True))
    found = gate_gradient(couple(model, TOKENS).stacks[0], weights, grads)
    assert torch.allclose(found, expected.double(), rtol=1e-4)


def test_criteria_of_channels_have_nothing_to_say() -> None:
    with pytest.raises(NotSupported, match="which a block does not have"):
        pr.plan(settle(Net()), TOKENS, pr.Recipe(pr.criteria.group_norm, pr.Depth()), target=pr.Sparsity(0.25))


@pytest.mark.parametrize("share", [0.7, 0.5, 0.3])
def test_channels_heads_and_blocks_share_one_ranking(share: float) -> None:
    model = settle(Net(norm=nn.LayerNorm))
    granularities = (
        pr.Channel(pr.granularity.Reduce.MEAN),
        pr.Head(pr.granularity.Reduce.MEAN),
        pr.Depth(pr.granularity.Reduce.MEAN),
    )
    recipe = pr.Recipe(pr.magnitude, granularities, pr.global_)
    plan = pr.plan(model, TOKENS, recipe, target=pr.MACs(share))
    small = pr.shrink(model, plan)
    assert share - 0.2 < plan.got <= share
    assert macs(small, TOKENS) == plan.after.macs and distinct(small) == plan.after.params
    assert {row.kind for row in plan.rows} == {"channel", "head", "block"}
    assert plan.cuts and (plan.dropped or share == 0.7)


def test_widths_and_depth_at_once_are_exact() -> None:
    model = settle(Net()).double()
    graph = couple(model, double(TOKENS))
    keep = {g.name: torch.arange(g.size) % 2 == 0 for g in exact_groups(graph) if g.size > 1} | {
        "xyz": torch.tensor([True, False, False, True])
    }
    small, done = copy.deepcopy(model), changes(graph, keep)
    change_(small, done)
    shallow = bypass(model, ["xyz.1", "xyz.2"])
    with torch.no_grad():
        for group in graph.groups:
            for m in group.members if group.name in keep else ():
                pruned = torch.from_numpy(m.index)[~keep[group.name][torch.from_numpy(m.unit)]]
                shallow.get_parameter(m.entity).index_fill_(m.axis, pruned, 0.0)
    assert distance(run(small, double(TOKENS)), run(shallow, double(TOKENS))) <= 1e-9
    assert distinct(small) == graph.params(keep) and macs(small, double(TOKENS)) == graph.macs(keep)


def test_skip_and_only_mean_single_blocks() -> None:
    model, recipe = settle(Net()), pr.Recipe(granularity=pr.Depth())
    plan = pr.plan(model, TOKENS, recipe, target=pr.Sparsity(0.3), skip=["xyz.0", "xyz.3"])
    assert set(plan.dropped["xyz"]) < {"1", "2"}
    assert [f.entity for f in plan.frozen if "skip" in f.reason] == ["xyz.0", "xyz.3"]
    plan = pr.plan(model, TOKENS, recipe, target=pr.Sparsity(0.3), only=["xyz.[01]"])
    assert set(plan.dropped["xyz"]) < {"0", "1"}


def test_a_use_that_does_not_follow_is_refused_with_a_reason() -> None:
    class Typed(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.embed(x)
            for k in range(4):
                x = self.xyz[k](x)
            return self.head(x)

    with pytest.raises(NotSupported, match="does not run"):
        pr.plan(settle(Typed()), TOKENS, pr.Recipe(granularity=pr.Depth()), target=pr.Sparsity(0.25))


def test_a_factor_that_grows_with_the_number_is_refused() -> None:
    class Scaled(Layer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(self.up(x)) / self.attention.number

    model = settle(Wrap(lambda k: Scaled(8, k + 1)))
    graph = couple(model, TOKENS)
    found = unproven(model, graph, {"parts": torch.tensor([False, True, True])}, TOKENS)
    assert "cannot be proven" in found["parts"]


def test_masks_cannot_do_it() -> None:
    model = settle(Net())
    plan = pr.plan(model, TOKENS, pr.Recipe(granularity=pr.Depth()), target=pr.Sparsity(0.25))
    with pytest.raises(RequestError, match="masks cannot do"):
        pr.apply_(copy.deepcopy(model), plan)


def test_plans_of_widths_know_nothing_of_blocks() -> None:
    plan = pr.plan(settle(Net(norm=nn.LayerNorm)), TOKENS, target=pr.MACs(0.7))
    assert not plan.dropped and not plan.changes.lists and all(f.axis >= 0 for f in plan.frozen)


# -- what goes with the model ---------------------------------------------------------------------------------------


def test_gradients_masks_and_optimizer_state_stay_with_their_weights() -> None:
    model = settle(Net())
    model = pr.apply_(
        model, pr.plan(model, TOKENS, pr.Recipe(granularity=pr.Element()), target=pr.Sparsity(0.5), only=["xyz"])
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    model(TOKENS).square().mean().backward()
    optimizer.step()
    reapply_(model)
    plan = pr.plan(model, TOKENS, pr.Recipe(granularity=pr.Depth()), target=pr.Sparsity(0.25))
    small = pr.shrink(model, plan)
    pruned = int(plan.dropped["xyz"][0])
    old = [layer for k, layer in enumerate(model.xyz) if k != pruned]
    moments = [optimizer.state[layer.up.weight]["exp_avg"].clone() for layer in old]
    masks, after = pr.masks_of(model), pr.masks_of(small)
    names = [k for k in range(4) if k != pruned]
    for new, (was, layer) in enumerate(zip(names, old, strict=True)):
        assert torch.equal(small.xyz[new].up.weight.grad, layer.up.weight.grad)
        assert torch.equal(after[f"xyz.{new}.up.weight"], masks[f"xyz.{was}.up.weight"])
    carry_(optimizer, model, small, plan)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in small.parameters()}
    for k, moment in enumerate(moments):
        assert torch.equal(optimizer.state[small.xyz[k].up.weight]["exp_avg"], moment)
    assert len(optimizer.state) == len(held)


def test_a_plan_is_read_as_it_was_written(tmp_path: Any) -> None:
    model = settle(Net(count=True))
    plan = pr.plan(model, TOKENS, pr.Recipe(granularity=pr.Depth()), target=pr.Sparsity(0.25))
    again = load_plan(save_plan(plan, tmp_path / "a.plan"))
    assert (again.dropped, again.changes.lists, again.attributes) == (plan.dropped, plan.changes.lists, plan.attributes)
    assert distance(run(pr.shrink(model, again), TOKENS), run(pr.shrink(model, plan), TOKENS)) == 0


def test_an_artifact_is_built_again_and_hostile_entries_are_refused(tmp_path: Any) -> None:
    from prunella.errors import BadInput
    from prunella.io.json import Fields
    from prunella.io.recorded_cut import cut_as_recorded_

    model = settle(Net(count=True))
    plan = pr.plan(model, TOKENS, pr.Recipe(granularity=pr.Depth()), target=pr.Sparsity(0.25))
    small = pr.shrink(model, plan)
    pr.save(small, tmp_path / "a", plan=plan, factory=Net, kwargs={"count": True})
    again = pr.load(tmp_path / "a", factory=Net)
    assert distance(run(again, TOKENS), run(small, TOKENS)) == 0 and again.rates == small.rates
    for wrong in ({"dropped": {"../xyz": ["0"]}}, {"dropped": {"xyz": ["7"]}}, {"dropped": {"xyz": 3}}):
        with pytest.raises((BadInput, RequestError)):
            cut_as_recorded_(Net(), Fields(wrong, "the manifest"))
    for name, pruned in (("__dict__", [0]), ("rates", [9]), ("xyz", [0])):
        with pytest.raises(BadInput, match="cannot be cut"):
            cut_as_recorded_(Net(), Fields({"dropped": {"xyz": ["0"]}, "lists": [["", name, pruned]]}, "the manifest"))


def test_the_report_and_the_fit_follow_the_new_numbers() -> None:
    model = settle(Net(norm=nn.LayerNorm))
    granularities = pr.Channel(pr.granularity.Reduce.MEAN), pr.Depth(pr.granularity.Reduce.MEAN)
    plan = pr.plan(model, TOKENS, pr.Recipe(pr.magnitude, granularities, pr.global_), target=pr.MACs(0.4))
    small = pr.shrink(model, plan)
    pruned = {int(name) for name in plan.dropped["xyz"]}
    remaining = [k for k in range(4) if k not in pruned]
    lines = {line.name: line for line in pr.report(model, small, TOKENS, plan=plan, rounds=5).layers}
    assert {name.split(".")[1] for name in lines if name.startswith("xyz")} == {str(k) for k in remaining}
    for new, k in enumerate(remaining):
        assert lines[f"xyz.{k}.up"].shape_after == tuple(small.xyz[new].up.weight.shape)
    before = {name: p.detach().clone() for name, p in small.named_parameters()}
    fits = pr.reconstruct(small, model, [TOKENS], plan)
    changed = {name for name, p in small.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all(name.split(".")[2] in ("down", "attention") for name in changed)
    assert {fit.name.split(".")[1] for fit in fits.fits} <= {str(k) for k in remaining}


def test_sizes_that_look_like_numbers_of_blocks_stay_sizes() -> None:
    """Cut to 4 and 5 in the first two blocks, an integer must not count on when the first block goes."""
    model = settle(Net())
    model.xyz[0].size, model.xyz[1].size, model.xyz[2].size, model.xyz[3].size = 8, 8, 8, 8
    done = Changes(attributes={(f"xyz.{k}", "size"): 4 + k for k in range(4)}, dropped={"xyz": ("0",)})
    change_(model, done)
    assert [block.size for block in model.xyz] == [5, 6, 7]


class Twice(nn.Module):
    """Two nets one after the other; the first has a list of a single block, and a configuration counts the others."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.many = Net(), Net()
        del self.one.xyz[1:]
        self.join = nn.Linear(3, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.many(self.join(self.one(x)))
        return out


def test_a_list_of_a_single_block_is_no_obstacle() -> None:
    model = settle(Twice())
    plan = pr.plan(model, TOKENS, pr.Recipe(pr.criteria.random, pr.Depth()), target=pr.Sparsity(0.5))
    assert {path: len(names) for path, names in plan.dropped.items()} == {"many.xyz": 2}
    assert len(pr.shrink(model, plan).one.xyz) == 1
