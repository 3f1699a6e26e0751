"""The residual stream of a pruned model matched to the dense one's, against least squares solved directly here."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunella as pr
from prunella.errors import NotSupported, RequestError
from tests.llm.nets import generates_as_without_a_cache, language_model, logits, silent, windows
from tests.planning.test_depth import streams


def inner(model: Any, k: int, batch: Any) -> tuple[Tensor, Tensor]:
    """The inputs of the last layer of a block, and the residual that its output is added to."""
    seen: dict[str, Tensor] = {}
    block = model.model.layers[k]
    hooks = [
        block.mlp.down_proj.register_forward_pre_hook(lambda m, args: seen.update(x=args[0].clone())),
        block.post_attention_layernorm.register_forward_pre_hook(lambda m, args: seen.update(s=args[0].clone())),
    ]
    logits(model, batch)
    for hook in hooks:
        hook.remove()
    return seen["x"].flatten(0, -2).double(), seen["s"].flatten(0, -2).double()


def gap(small: Any, model: Any, data: list[Any], place: int, of: int) -> float:
    """Squared distance of the hidden states at `place` in the small model from those at `of` in the dense one."""
    pairs = [(streams(small, b)[place].double(), streams(model, b)[of].double()) for b in data]
    return sum(float((a - b).square().sum()) for a, b in pairs)


def test_a_block_is_solved_toward_the_output_of_the_dropped_blocks_behind_it() -> None:
    model, data = language_model(), windows(4)
    plan = pr.llm.drop_blocks(model, data[0], ["model.layers.2", "model.layers.3"])
    small = pr.shrink(model, plan)
    x, s = (torch.cat(parts) for parts in zip(*(inner(small, 1, b) for b in data), strict=True))
    goal = torch.cat([streams(model, b)[4].flatten(0, -2).double() for b in data])
    weight = small.model.layers[1].mlp.down_proj.weight.detach().double()
    ridge = 0.1 * float(x.square().sum(0).mean())
    residual = goal - s - x @ weight.T
    change = torch.linalg.solve(x.T @ x + ridge * torch.eye(48, dtype=torch.float64), x.T @ residual)
    untouched = copy.deepcopy(small.model.layers[0]).state_dict()
    report = pr.llm.match_stream_(small, model, data, plan, how=pr.llm.Match(ridge=0.1, gaps=True))
    assert torch.allclose(small.model.layers[1].mlp.down_proj.weight.double(), weight + change.T, atol=1e-5)
    fit = report.fits[1]
    assert fit.replaces == ("model.layers.2", "model.layers.3") and fit.layer == "model.layers.1.mlp.down_proj.weight"
    size = float(goal.square().sum())
    assert fit.before == pytest.approx((float(residual.square().sum()) / size) ** 0.5, rel=1e-4)
    assert fit.after == pytest.approx((float((residual - x @ change).square().sum()) / size) ** 0.5, rel=1e-4)
    assert all(value.equal(untouched[name]) for name, value in small.model.layers[0].state_dict().items())
    assert [bool(f.skipped) for f in report.fits] == [True, False, True] and "replaces 2 more" in str(report)


def test_the_ridge_is_chosen_on_held_out_batches_and_the_solution_is_from_all() -> None:
    model, data = language_model(), windows(4, length=10)
    plan = pr.llm.drop_blocks(model, data[0], ["model.layers.2", "model.layers.3"])
    small = pr.shrink(model, plan)
    pairs = [inner(small, 1, batch) for batch in data]
    goals = [streams(model, batch)[4].flatten(0, -2).double() for batch in data]
    weight = small.model.layers[1].mlp.down_proj.weight.detach().double()
    x, residual = (torch.cat(parts[:3]) for parts in ([p[0] for p in pairs],
                   [y - s - x @ weight.T for (x, s), y in zip(pairs, goals, strict=True)]))  # fmt: skip
    judge_x, judge_s = pairs[3]
    scale, errors = float(x.square().sum(0).mean()), {}
    for ridge in (1e-2, 1e-1, 1.0, 1e1, 1e2):
        change = torch.linalg.solve(x.T @ x + ridge * scale * torch.eye(48, dtype=torch.float64), x.T @ residual)
        left = goals[3] - judge_s - judge_x @ (weight.T + change)
        errors[float(left.square().sum())] = change
    best = min(errors)
    assert best != max(errors) and errors[best] is not next(iter(errors.values()))  # the least ridge fits too closely
    ridge = list(errors).index(best)
    all_x, all_residual = torch.cat([x, judge_x]), torch.cat([residual, goals[3] - judge_s - judge_x @ weight.T])
    damping = (1e-2, 1e-1, 1.0, 1e1, 1e2)[ridge] * float(all_x.square().sum(0).mean())
    damped = all_x.T @ all_x + damping * torch.eye(48, dtype=torch.float64)
    expected = weight + torch.linalg.solve(damped, all_x.T @ all_residual).T
    assert not torch.allclose(expected, weight + errors[best].T, atol=1e-4)  # without the held-out batch
    fit = pr.llm.match_stream_(small, model, data, plan, how=pr.llm.Match(gaps=True)).fits[1]
    assert torch.allclose(small.model.layers[1].mlp.down_proj.weight.double(), expected, atol=1e-5)
    assert fit.after == pytest.approx((best / float(goals[3].square().sum())) ** 0.5, rel=1e-4)
    assert fit.after < fit.before


def test_every_block_behind_a_gap_compensates_the_error_before_it() -> None:
    model, data = language_model(), windows(6)
    plan = pr.llm.drop_blocks(model, data[0], ["model.layers.2"])
    some, all_ = pr.shrink(model, plan), pr.shrink(model, plan)
    before = gap(some, model, data, 4, 5)
    pr.llm.match_stream_(some, model, data, plan, how=pr.llm.Match(gaps=True))
    pr.llm.match_stream_(all_, model, data, plan)
    assert gap(all_, model, data, 4, 5) < gap(some, model, data, 4, 5) < before
    assert gap(all_, model, data, 1, 1) == 0  # nothing went before it


def test_neurons_that_are_copies_of_others_are_compensated_exactly() -> None:
    model, data = language_model(), windows(6, length=40)
    with torch.no_grad():
        for block in model.model.layers:
            for layer in (block.mlp.gate_proj, block.mlp.up_proj):
                layer.weight[40:] = layer.weight[:8]
            block.mlp.down_proj.weight[:, 40:] *= 1e-3
    recipe = pr.Recipe(pr.criteria.fluctuation, equal_widths=True)
    plan = pr.plan(model, data[0], recipe, target=pr.Sparsity(8 / 48), data=data,
                   only=["model.layers.*.mlp.*"])  # fmt: skip
    assert all(not bool(plan.keep[name][40:].any()) for name in plan.keep)
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.down_proj.weight[:, 40:] *= 1e3
    small = pr.shrink(model, plan)
    size = float(logits(model, data[0]).norm())
    assert float((logits(small, data[0]) - logits(model, data[0])).norm()) > 0.1 * size
    pr.llm.match_stream_(small, model, data, plan, how=pr.llm.Match(ridge=0.0))
    assert float((logits(small, windows(1, seed=9)[0]) - logits(model, windows(1, seed=9)[0])).norm()) < 1e-3 * size


def test_gradient_steps_go_on_from_the_least_squares() -> None:
    model, data = language_model(), windows(4)
    plan = pr.llm.drop_blocks(model, data[0], ["model.layers.2", "model.layers.3"])
    plain, refined = pr.shrink(model, plan), pr.shrink(model, plan)
    first = pr.llm.match_stream_(plain, model, data, plan, how=pr.llm.Match(gaps=True)).fits[1]
    second = pr.llm.match_stream_(
        refined, model, data, plan, how=pr.llm.Match(refine=pr.llm.Refine(3, 2e-3), gaps=True)
    ).fits[1]
    assert second.before == first.before and second.after < first.after
    assert gap(refined, model, data, 2, 4) < gap(plain, model, data, 2, 4)
    assert all(p.requires_grad and p.grad is None for p in refined.parameters())


def test_masked_layers_are_only_refined_and_their_zeros_stay() -> None:
    model, data = language_model(), windows(2)
    plan = pr.llm.drop_blocks(model, data[0], ["model.layers.2"])
    small = pr.shrink(model, plan)
    zeros = pr.plan(
        small, data[0], pr.Recipe(pr.magnitude, pr.Element()), target=pr.Sparsity(0.5), only=["*down_proj*"]
    )
    pr.apply_(small, zeros)
    report = pr.llm.match_stream_(small, model, data, plan, how=pr.llm.Match(refine=pr.llm.Refine(2, 1e-3)))
    pruned = {name: ~mask for name, mask in zeros.masks.items()}
    assert all(not bool(small.get_parameter(name)[mask].any()) for name, mask in pruned.items())
    assert all(fit.after < fit.before for fit in report.fits)
    kept = pr.shrink(model, plan)
    pr.apply_(kept, zeros)
    assert all(fit.skipped for fit in pr.llm.match_stream_(kept, model, data, plan).fits)


class Biased(nn.Module):
    """A block `x + W relu(V x) + b` of vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Biased() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def test_a_dropped_block_that_adds_a_constant_goes_into_the_bias() -> None:
    model = Stack().double()
    with torch.no_grad():
        model.blocks[2].down.weight.zero_()
    data = [torch.randn(40, 6, dtype=torch.float64) for _ in range(3)]
    plan = pr.llm.drop_blocks(model, data[0], ["blocks.2"])
    small = pr.shrink(model, plan)
    pr.llm.match_stream_(small, model, data, plan)
    x = torch.randn(9, 6, dtype=torch.float64)
    assert torch.allclose(small(x), model(x), atol=1e-9)
    assert torch.allclose(small.blocks[1].down.bias, model.blocks[1].down.bias + model.blocks[2].down.bias, atol=1e-9)


def test_the_first_block_of_a_run_replaces_the_run() -> None:
    model, data = silent(language_model(), 2, 3), windows(2)
    done = pr.llm.replace_run(model, data[0], data, count=1, refine=None)
    assert done.plan.dropped == {"model.layers": ("3",)} and "replaces 1 more" in str(done)
    assert torch.allclose(logits(done.model, data[0]), logits(model, data[0]), atol=1e-5)
    model = language_model()
    done = pr.llm.replace_run(model, data[0], data, count=2, refine=pr.llm.Refine(4, 2e-3))
    start = int(done.plan.dropped["model.layers"][0])
    assert done.plan.dropped["model.layers"] == (str(start), str(start + 1))
    plain = pr.shrink(model, done.plan)
    assert gap(done.model, model, data, start, start + 2) < gap(plain, model, data, start, start + 2)
    same = [k for k in range(3) if k != start - 1]
    assert all(done.model.model.layers[k].mlp.down_proj.weight.equal(plain.model.layers[k].mlp.down_proj.weight)
               for k in same)  # fmt: skip


@pytest.mark.parametrize("name", ["llama", "qwen2", "mixtral"])
def test_matched_models_generate_and_load_plainly(name: str, tmp_path: Any) -> None:
    model, data = language_model(name), windows(2)
    plan = pr.llm.drop_run(model, data[0], data, count=2)
    small = pr.shrink(model, plan)
    report = pr.llm.match_stream_(
        small, model, data, plan, how=pr.llm.Match(refine=pr.llm.Refine(1, 1e-4) if name == "mixtral" else None)
    )
    assert any(fit.after < fit.before for fit in report.fits)
    generates_as_without_a_cache(small)
    assert pr.save(small, tmp_path / "out", plan=plan, dense=model).reader == "from_pretrained"
    generates_as_without_a_cache(type(model).from_pretrained(tmp_path / "out").eval())


def test_what_cannot_be_matched_is_refused() -> None:
    with pytest.raises(RequestError, match="ridge=-1"):
        pr.llm.Match(ridge=-1)
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(9, 4)
    plan = pr.plan(model, x, target=pr.Sparsity(0.5))
    with pytest.raises(NotSupported, match="no residual stream to match"):
        pr.llm.match_stream_(pr.shrink(model, plan), model, [x], plan)
