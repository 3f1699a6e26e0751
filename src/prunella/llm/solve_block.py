"""Prune one block: its layers by a layer solver, then the whole block by gradient steps.

`solve_block_` is a function of a frozen `BlockProblem`. It writes the weights of the block and nothing else; the rest
is in the `BlockResult`. `solve_` calls it for the blocks of a model in memory, `solve_folder` for one block at a time.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunella.errors import RequestError
from prunella.granularity import NM
from prunella.graph.data import Layer
from prunella.graph.matrix import from_matrix, to_matrix
from prunella.llm.block_problem import BlockProblem, BlockResult, Fit
from prunella.llm.blocks import BlockCall, BlockCalls, ModelBlock, StoreActivations
from prunella.llm.experts import Part, expert_axis, expert_chunks, matrix_of, parts_read
from prunella.llm.recipe import OneShot
from prunella.llm.refine import Refined, refine_
from prunella.llm.shrinkage import shrink_change_
from prunella.measure.clock import now
from prunella.model.autocast import autocast_off
from prunella.model.copying import copied
from prunella.model.device import full_float32, home_of_sums
from prunella.model.observed_reads import Read, Unread, View
from prunella.model.trees import tensors
from prunella.model.watch import Stop, Watch
from prunella.solvers.layer import Pattern, Solved
from prunella.types import Gram, Mask

log = logging.getLogger(__name__)


def solve_block_(problem: BlockProblem, on_fit: Callable[[Fit], None] = lambda fit: None) -> BlockResult:
    """Prune the layers of one block in place, group by group, and refine it. on_fit: called after each layer."""
    plan = _read_order(problem)
    for fit in plan.skipped:
        on_fit(fit)
    solved: list[_SolvedWeight] = []
    dense = {p: p.detach().clone() for p in problem.module.parameters()} if problem.held_out and problem.targets else {}
    # Not sequential: the last layer first, which changes the inputs of no other.
    for group in plan.groups if problem.how.true_sequential else reversed(plan.groups):
        turn = problem.first_solver + sum(len(weight.matrices) for weight in solved)
        for weight in _solve_group_(problem, group, turn):
            solved.append(weight)
            on_fit(weight.fit)
    order = [weight for group in plan.groups for weight in group.weights]
    by_weight = {done.weight: done for done in solved}
    masks = {done.weight: done.mask for done in solved if not done.fit.skipped}
    refined = _refined(problem, masks)
    return BlockResult(
        (*plan.skipped, *(by_weight[weight].fit for weight in order)),
        masks,
        refined,
        (problem.first_solver + sum(len(done.matrices) for done in solved)) % problem.distributed.world_size,
        shrink_change_(dense, masks, partial(_held_out_error, problem)) if dense else None,
    )


@torch.no_grad()
def _held_out_error(problem: BlockProblem) -> float:
    """The squared error of the block on the calls that were not fitted."""
    held_out = range(problem.fitted, len(problem.calls))
    return sum(float((problem.output(k).float() - problem.targets[k].float()).square().sum()) for k in held_out)


def layers_by_weight(model: nn.Module, layers: Sequence[Layer]) -> dict[nn.Parameter, Layer]:
    """The layers by their parameter in the model."""
    named = dict(model.named_parameters(remove_duplicate=False))
    return {named[layer.entity]: layer for layer in layers}


def dense_targets(
    how: OneShot,
    block: ModelBlock,
    module: nn.Module,
    calls: Sequence[BlockCall],
    previous: Sequence[Tensor],
    store: StoreActivations,
    held_out: int = 0,
) -> Sequence[Tensor]:
    """The outputs of a block that is not pruned yet, for its inputs in the dense model: targets of the refinement.

    Held-out batches are compared with them too.

    previous: the targets of the block before, which are these inputs; a block that is not sequential takes its
    inputs in the pruned model instead. Empty without either.
    """
    if not (how.refine or held_out) or not block.path:
        return ()
    if block.sequential and len(previous):
        calls = BlockCalls(calls, previous)
    replica = copied(module)  # a run may change its buffers
    return store(tensors(call.run(replica))[0] for call in calls)


def _refined(problem: BlockProblem, masks: Mapping[nn.Parameter, Mask]) -> Refined | None:
    """The gradient steps for the whole block, if they are asked for and a layer was pruned."""
    if problem.how.refine is None or not problem.block.path or not masks:
        return None
    outputs = [partial(problem.output, k) for k in range(problem.fitted)]
    targets = problem.targets[: problem.fitted]
    return refine_(problem.module, outputs, targets, masks, problem.how.refine, problem.store, problem.distributed)


@dataclass(frozen=True)
class _Group:
    """Weights that multiply the same input, and the number of their reads in one pass (0 for experts: not counted).

    chunks: the parts of each that are solved from one pass over the data.
    """

    weights: list[nn.Parameter]
    reads: int
    chunks: list[tuple[Part, ...]]


@dataclass(frozen=True)
class _ReadOrder:
    """The weights to solve in the order in which they are first read, and the layers that are kept dense."""

    groups: list[_Group]
    skipped: tuple[Fit, ...]


def _read_order(problem: BlockProblem) -> _ReadOrder:
    """Observe one pass of the block; weights with the same input are solved together."""
    reads: dict[nn.Parameter, list[Read]] = {}
    watch = Watch(problem.layers, lambda read: reads.setdefault(read.weight, []).append(read), stacks=True)
    with watch:
        problem.forward(problem.calls[0])
    watch.finish()
    skipped: list[Fit] = []
    for weight, layer in problem.layers.items():
        if weight in reads:
            reason = _obstacle(reads[weight], watch.others.get(id(weight)), layer, problem.how.pattern, weight)
        else:
            reason = watch.why_unread(weight) or "it does not run on the data"
        if reason:
            skipped.append(Fit(layer.name, skipped=reason))
            reads.pop(weight, None)
    groups = _same_input(reads, problem.layers)
    number = len(groups) * 10_000 + sum(group.reads for group in groups)
    problem.distributed.check_equal(number, f"the layers of {problem.block.path}")
    return _ReadOrder(groups, tuple(skipped))


def _same_input(reads: Mapping[nn.Parameter, Sequence[Read]], layers: Mapping[nn.Parameter, Layer]) -> list[_Group]:
    """The weights in order, consecutive ones with equal inputs in one group."""
    groups: list[_Group] = []
    last: Read | None = None
    for weight, some in reads.items():
        first, chunks = some[0], _chunks(some, layers[weight])
        plain = chunks == [(None,)] and first.form.layout is not None
        if last is not None and plain and _equal_columns(first, last):
            groups[-1].weights.append(weight)
        else:
            groups.append(_Group([weight], len(some) if first.part is None else 0, chunks))
        last = first if len(some) == 1 and plain else None
    return groups


def _equal_columns(a: Read, b: Read) -> bool:
    return a.form.layout == b.form.layout and a.x.shape == b.x.shape and a.x.equal(b.x)


def _chunks(reads: Sequence[Read], layer: Layer) -> list[tuple[Part, ...]]:
    """The parts of a weight, those together that are solved from one pass over the data."""
    slices = {part: None for read in reads for part in parts_read(read, layer) if isinstance(part, View)}
    return [tuple(slices)] if slices else list(expert_chunks(reads[0].weight, layer))


def _obstacle(reads: Sequence[Read], other: Unread | None, layer: Layer, pattern: Pattern, weight: nn.Parameter) -> str:
    """Why a layer cannot be solved, empty if it can."""
    if other is not None:
        return other.tied
    parts = [parts_read(read, layer) for read in reads]
    several = layer.groups > 1 or expert_axis(weight, layer) is not None
    if not all(parts) or any(isinstance(part, int) != several for some in parts for part in some):
        return "it is used in two different ways"
    if _overlap({part for some in parts for part in some}, weight):
        return "it is used in two different ways"
    if isinstance(pattern, NM):
        shapes = {tuple(to_matrix(*matrix_of(weight, layer, part)).shape) for some in parts for part in some}
        if not all(pattern.fits(shape) for shape in shapes):
            return f"{pattern.m} does not divide its columns"
    return ""


def _overlap(parts: Set[Part], weight: Tensor) -> bool:
    """Whether some elements of a weight are in several parts."""
    slices = [part for part in parts if isinstance(part, View)]
    if not slices:
        return False
    count = torch.zeros_like(weight, dtype=torch.int8)
    for part in slices:
        part.of(count).add_(1)
    return None in parts or bool((count > 1).any())


NOT_FINITE = "its solver gave weights that are not finite"
"""Why a layer is unchanged: the result of a solver is checked before it is written."""


@dataclass(frozen=True)
class _SolvedMatrix:
    """One matrix: relative error, calibration tokens, damping, seconds. kept: whether it is unchanged."""

    error: float
    tokens: int
    damping: float
    seconds: float
    kept: bool = False


@dataclass(frozen=True)
class _SolvedWeight:
    """A weight whose matrices are all solved."""

    weight: nn.Parameter
    name: str
    mask: Mask
    matrices: list[_SolvedMatrix] = field(default_factory=list)

    @property
    def fit(self) -> Fit:
        """All matrices together: the error is the mean over their tokens."""
        if all(matrix.kept for matrix in self.matrices):
            return Fit(self.name, skipped=NOT_FINITE)
        error, tokens = self.matrices[0].error, sum(matrix.tokens for matrix in self.matrices)
        if len(self.matrices) > 1:
            error = sum(matrix.error * matrix.tokens for matrix in self.matrices) / max(tokens, 1)
        damping = max(matrix.damping for matrix in self.matrices)
        seconds = sum(matrix.seconds for matrix in self.matrices)
        return Fit(self.name, error, int((~self.mask).sum()), self.mask.numel(), tokens, damping, seconds)


@dataclass(frozen=True)
class _Statistic:
    """The Gram matrix of one input, and the number of tokens that it sums."""

    gram: Gram
    tokens: int


def _solve_group_(problem: BlockProblem, group: _Group, turn: int) -> list[_SolvedWeight]:
    """Solve the weights that share an input, from one Gram matrix per part. turn: the rank that solves first."""
    layers = problem.layers
    solved = [_SolvedWeight(w, layers[w].name, torch.ones_like(w, dtype=torch.bool)) for w in group.weights]
    for parts in group.chunks:
        statistics = _statistics(problem, group, parts)
        matrices = [(weight, part) for weight in solved for part in parts]
        _solve_matrices_(problem, matrices, statistics, turn)
        turn += len(matrices)
    return solved


def _statistics(problem: BlockProblem, group: _Group, parts: Sequence[Part]) -> dict[Part, _Statistic]:
    """`sum x x^T` over all inputs of these parts of a weight, and their tokens.

    A pass stops after the last read of a plain weight. Products are summed in float64, so that the order of the batches
    and the number of processes do not change a mask. An expert without tokens gets the identity: it is pruned by
    magnitude.
    """
    weight = group.weights[0]
    layer = problem.layers[weight]
    columns = {part: to_matrix(*matrix_of(weight, layer, part)).shape[1] for part in parts}
    home = home_of_sums(weight.device)
    total = {part: torch.zeros(size, size, dtype=torch.float64, device=home) for part, size in columns.items()}
    tokens, left = dict.fromkeys(parts, 0), group.reads

    def add(read: Read) -> None:
        nonlocal left
        with autocast_off(read.x.device.type).entered(), full_float32():
            for part, number in parts_read(read, layer).items():
                for x, _ in read.columns(number) if part in total else ():
                    single = x.to(torch.promote_types(x.dtype, torch.float32))
                    total[part] += (single.T @ single).to(home)
                    tokens[part] += len(single)
        left -= 1
        if not left and read.part is None:
            raise Stop

    for call in problem.calls[: problem.fitted]:
        left = group.reads
        watch = Watch([weight], add, stacks=True)
        with suppress(Stop):
            with watch:
                problem.forward(call)
            watch.finish()
    counts = torch.tensor([tokens[part] for part in parts], device=weight.device)
    problem.distributed.all_reduce_(*total.values(), counts)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    for part, count in zip(parts, counts.tolist(), strict=True):
        tokens[part] = count
        if not count:
            total[part].fill_diagonal_(1.0)
    return {part: _Statistic(gram.to(dtype), tokens[part]) for part, gram in total.items()}


def _solve_matrices_(
    problem: BlockProblem,
    matrices: Sequence[tuple[_SolvedWeight, Part]],
    statistics: Mapping[Part, _Statistic],
    turn: int,
) -> None:
    """Solve these matrices, each in the process whose turn it is, and write them to the weights."""
    group, start = problem.distributed, now()
    owners = [(turn + k) % group.world_size for k in range(len(matrices))]
    # Each of several processes solves all of its own before it waits for others; a single one holds one at a time.
    own = [k for k, owner in enumerate(owners) if owner == group.rank and group.world_size > 1]
    ahead = {k: _solve_matrix(problem, *matrices[k], statistics) for k in own}
    for k, (done, part) in enumerate(matrices):
        layer = problem.layers[done.weight]
        view, axes = matrix_of(done.weight.detach(), layer, part)
        if group.world_size == 1:
            solved = _solve_matrix(problem, done, part, statistics)
        else:
            solved = group.broadcast_solution(ahead.pop(k, None), _single(to_matrix(view, axes)), owners[k])
        new = from_matrix(solved.weight, view, axes).to(view.dtype)  # a narrower type may overflow
        finite = bool(torch.isfinite(new).all())
        if finite:
            view.copy_(new)
            matrix_of(done.mask, layer, part)[0].copy_(from_matrix(solved.mask, view, axes))
        else:
            log.warning("%s is kept as it was: %s", done.name, NOT_FINITE)
        end = now()
        seconds, tokens = end - start, statistics[part].tokens
        error = solved.error if finite else 0.0
        done.matrices.append(_SolvedMatrix(error, tokens, solved.damping, seconds, kept=not finite))
        start = end


def _solve_matrix(
    problem: BlockProblem, done: _SolvedWeight, part: Part, statistics: Mapping[Part, _Statistic]
) -> Solved:
    """One matrix by the layer solver."""
    how, weight, layer = problem.how, done.weight, problem.layers[done.weight]
    sparsity = how.sparsity_of(layer)
    assert sparsity is not None
    matrix = _single(to_matrix(*matrix_of(weight.detach(), layer, part))).to(statistics[part].gram.device)
    with autocast_off(weight.device.type).entered():
        solved = how.method(matrix, statistics[part].gram, how.pattern, sparsity=sparsity)
    return _fitting(solved, matrix, done.name)


def _fitting(solved: Any, matrix: Tensor, name: str) -> Solved:
    """The result of a solver. Errors: RequestError unless weight and mask have the shape of the matrix."""
    parts: tuple[Any, Any] = (getattr(solved, "weight", None), getattr(solved, "mask", None))
    if all(isinstance(part, Tensor) and part.shape == matrix.shape for part in parts) and parts[1].dtype == torch.bool:
        return solved  # type: ignore[no-any-return]
    shapes = [f"{p.dtype} {tuple(p.shape)}" if isinstance(p, Tensor) else type(p).__name__ for p in parts]
    what = f"the solver returned for {name} a {type(solved).__name__} with weight {shapes[0]} and mask {shapes[1]}"
    todo = "return prunella.solvers.Solved(weight, mask, ...)"
    raise RequestError(what, f"both have the shape {tuple(matrix.shape)}, and the mask is of bool", todo)


def _single(matrix: Tensor) -> Tensor:
    """The matrix in float32 at least."""
    return matrix.to(torch.promote_types(matrix.dtype, torch.float32))
