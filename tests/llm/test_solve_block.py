"""One block solved on its own: a function of its problem, which writes the weights of the block and nothing else."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import prunella as pr
from prunella.graph.solve.groups import couple
from prunella.llm.block_problem import BlockProblem, Fit
from prunella.llm.blocks import BlockCall, ModelBlock
from prunella.llm.solve_block import NOT_FINITE, dense_targets, layers_by_weight, solve_block_
from prunella.model.masks import masks_of
from prunella.solvers import Solved
from prunella.solvers.layer import Pattern
from tests.llm.test_blockwise import Net, batches, net

BLOCK = ModelBlock("blocks.1", sequential=True)
HOW = pr.llm.OneShot(pr.NM(2, 4), refine=pr.llm.Refine(2, 1e-3))


def problem(model: Net, how: pr.llm.OneShot = HOW) -> BlockProblem:
    """The second block of a small network, with inputs of its own."""
    graph = couple(model, batches()[0])
    layers = [layer for layer in graph.layers if layer.name.startswith("blocks.1.")]
    generator = torch.Generator().manual_seed(2)
    calls = [BlockCall((torch.randn(30, 12, generator=generator), torch.ones(12)), {}) for _ in range(3)]
    module = model.get_submodule("blocks.1")
    targets = dense_targets(how, BLOCK, module, calls, (), list)
    return BlockProblem(
        BLOCK, module, layers_by_weight(model, layers), calls, lambda call: call.run(module), how, targets
    )


@torch.no_grad()
def test_it_writes_the_weights_of_its_block_and_nothing_else() -> None:
    model, dense, told = net(), net(), list[Fit]()
    task = problem(model)
    inputs = [call.hidden_states.clone() for call in task.calls]
    result = solve_block_(task, told.append)
    changed = {name for name, value in model.state_dict().items() if not value.equal(dense.state_dict()[name])}
    assert changed == {f"blocks.1.{part}.{leaf}" for part in ("up", "down") for leaf in ("weight", "bias")}
    assert all(call.hidden_states.equal(x) for call, x in zip(task.calls, inputs, strict=True))
    assert masks_of(model) == {} and tuple(told) == result.fits  # who calls it records the masks
    assert [fit.name for fit in result.fits] == ["blocks.1.up", "blocks.1.down"]
    assert all(not bool(weight[~mask].any()) for weight, mask in result.masks.items()) and len(result.masks) == 2


@torch.no_grad()
def test_the_same_problem_has_the_same_result_and_its_outputs_are_those_of_the_block() -> None:
    first, second = problem(net()), problem(net())
    a, b = solve_block_(first), solve_block_(second)
    assert all(p.equal(q) for p, q in zip(first.module.parameters(), second.module.parameters(), strict=True))
    assert a.refined is not None and b.refined is not None and a.refined.after == b.refined.after < a.refined.before
    assert a.outputs is not None
    assert all(torch.equal(first.output(k), output) for k, output in enumerate(a.outputs))


@torch.no_grad()
def test_targets_are_the_outputs_of_the_dense_block_for_the_dense_inputs() -> None:
    model = net()
    module, dense = model.get_submodule("blocks.1"), copy.deepcopy(model.get_submodule("blocks.1"))
    calls = [BlockCall((torch.zeros(4, 12), torch.ones(12)), {})]
    x = torch.randn(4, 12)
    of_dense, of_pruned = dense(x, torch.ones(12)), dense(torch.zeros(4, 12), torch.ones(12))

    def targets(block: ModelBlock, previous: list[Tensor], how: pr.llm.OneShot = HOW) -> Tensor:
        return dense_targets(how, block, module, calls, previous, list)[0]

    assert targets(BLOCK, [x]).equal(of_dense) and targets(BLOCK, []).equal(of_pruned)
    assert targets(ModelBlock("blocks.1", sequential=False), [x]).equal(of_pruned)
    assert len(dense_targets(pr.llm.OneShot(), BLOCK, module, calls, [x], list)) == 0


def test_a_recipe_without_refinement_has_no_known_outputs() -> None:
    with torch.no_grad():
        result = solve_block_(problem(net(), pr.llm.OneShot()))
    assert result.outputs is None and [fit.removed for fit in result.fits] == [120, 120]


@torch.no_grad()
def test_a_layer_whose_solver_fails_stays_as_it_was() -> None:
    """What a solver returns is checked before it is written; the other layers are pruned."""
    failing: list[int] = []

    def method(weight: Tensor, gram: Tensor, pattern: Pattern, *, sparsity: float) -> Solved:
        failing.append(1)
        solved = pr.solvers.sparsegpt(weight, gram, pattern, sparsity=sparsity)
        return replace(solved, weight=solved.weight * torch.nan) if len(failing) == 1 else solved

    model, dense = net(), net()
    result = solve_block_(problem(model, pr.llm.OneShot(pr.Element(), 0.5, method)))
    told = {fit.name: fit.skipped for fit in result.fits}
    assert told == {"blocks.1.up": NOT_FINITE, "blocks.1.down": ""} and len(result.masks) == 1
    assert model.get_parameter("blocks.1.up.weight").equal(dense.get_parameter("blocks.1.up.weight"))
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("name", ["admm", "sparsegpt", "alps"])
@pytest.mark.parametrize("dead_last", [True, False])
def test_a_dead_layer_comes_out_finite(name: str, dead_last: bool) -> None:
    """Nothing passes the ReLU, so that the inputs of what follows are all zero."""
    torch.manual_seed(0)
    rest = [] if dead_last else [nn.ReLU(), nn.Linear(8, 4)]
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8), *rest).eval()
    model[0].bias.fill_(-1e3)  # type: ignore[operator, union-attr]
    x = torch.randn(8, 16)
    solving = pr.llm.solve_(model, x, pr.llm.OneShot(pr.Element(), 0.5, getattr(pr.solvers, name)), data=[x])
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters()) and solving.sparsity == 0.5
