"""Match the residual stream of a pruned model to that of the dense model, block by block, without labels."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunella.errors import CheckFailed, NotSupported, RequestError
from prunella.graph.cut.block_surgery import new_name
from prunella.graph.solve.groups import couple
from prunella.graph.solve.residual_blocks import inside
from prunella.llm.blocks import BlockCall, BlockInputs, ModelBlock, block_paths, blocks_at
from prunella.llm.refine import Refine, refine_
from prunella.model.batches import listed
from prunella.model.masks import masks_of
from prunella.model.observed_reads import Read
from prunella.model.state import mode, restored_on_error, untouched
from prunella.model.trees import tensors
from prunella.model.unwrap import unwrap
from prunella.model.watch import Watch
from prunella.planning.depth import find_blocks, turns
from prunella.planning.plan import Plan
from prunella.recovery.least_squares import Solution, Sums
from prunella.registry.method import solver
from prunella.stats import Source
from prunella.transform.shrink import shrink
from prunella.types import Inputs, Loss

log = logging.getLogger(__name__)
SAME = 1e-6
"""A relative error that is only rounding and need not be compensated."""
RIDGES = (1e-2, 1e-1, 1.0, 1e1, 1e2)
"""Candidates if no ridge is given. Later layers read the residual stream: an overfitted layer harms them."""


@dataclass(frozen=True)
class Match:
    """How a block is matched. ridge: of the least squares, relative to the mean square of the inputs, from 0 up.

    ridge=None: the best of five between 0.01 and 100 on every fourth batch (the last one of fewer), which is held out
    of the least squares. If none reduces the error, the layer is unchanged; otherwise it is solved again from all
    batches with the best ridge. With a single batch: 0.01. refine: gradient steps for the whole block after the least
    squares, or None. gaps: match only blocks followed by dropped blocks.
    """

    ridge: float | None = None
    refine: Refine | None = None
    gaps: bool = False

    def __post_init__(self) -> None:
        if self.ridge is not None and not self.ridge >= 0:
            raise RequestError(f"ridge={self.ridge:g} is out of range", "it takes numbers from 0 up", "leave it out")


@dataclass(frozen=True)
class BlockFit:
    """One block: `|B'(x') - y| / |y|` before and after, with y the dense residual stream after the block.

    If no ridge was given: on the held-out batches, of the solution without them. layer: the solved layer. replaces: the
    dropped blocks that follow it. skipped: why it was not matched.
    """

    name: str
    layer: str = ""
    before: float = 0.0
    after: float = 0.0
    replaces: tuple[str, ...] = ()
    skipped: str = ""

    def __str__(self) -> str:
        replaces = f", replaces {len(self.replaces)} more" if self.replaces else ""
        if self.skipped:
            return f"{self.name}: unchanged, {self.skipped}"
        return f"{self.name}: {self.before:.4f} -> {self.after:.4f}{replaces}"


@dataclass(frozen=True)
class Matched:
    """The result of `match_stream_`, block by block in order of execution."""

    fits: tuple[BlockFit, ...]

    def __str__(self) -> str:
        return "\n".join(map(str, self.fits)) or "there are no blocks"


@solver(source="Chen et al. 2024, arXiv:2403.19135 (a block for a run of blocks); He et al. 2017, arXiv:1707.06168")
def match_stream_(
    small: nn.Module,
    dense: nn.Module,
    data: Iterable[Any],
    plan: Plan,
    *,
    how: Match = Match(),
    loss: Loss | None = None,
) -> Matched:
    """Refit every block of `small`, in place, so that its outputs match the residual stream of the dense model.

    The target of a kept block is the output of the last dropped block that follows it in the dense model, or its own
    output there. The last layer of the block whose output is added to the residual stream is solved by least squares,
    `min over D, b of |y - s - X (W + D)^T - b|^2 + ridge * mean(diag(X^T X)) * |D|^2`, with X its inputs and s the
    residual in the small model, so that it also compensates the error of the blocks before it; `how.refine` then trains
    all weights of the block toward the same target. The least-squares solution is kept only if the error falls, on
    held-out batches if `how.ridge` is not given.
    The data pass through both models once, block by block: three passes of each block, and one more for each step of
    refinement. Memory: the hidden states between two blocks in both models, for all batches. Data: batches, no labels.

    small: the result of `shrink(dense, plan)`, for any structured plan: depth, width or both. loss: how to run a model
    on a batch. Masked layers are not solved, only refined with their masks. Errors: NotSupported without blocks. After
    any error `small` is as before.

    Use: right after pruning depth or width. Avoid: a fixed small ridge with fewer tokens than many times the inputs of
    the layers: it overfits the calibration data.
    """
    small_, dense_ = unwrap(small), unwrap(dense)
    samples, source = listed(data), Source(None, loss)
    assert plan.inputs is not None
    with untouched(dense_, 0):
        paths = block_paths(dense_, couple(dense_, plan.inputs))
    guard = restored_on_error(small_)
    with guard, mode(small_, training=False), mode(dense_, training=False), torch.no_grad():
        dense_inputs = BlockInputs(dense_, samples, source.run, blocks_at(dense_, paths, samples[0], source.run))
        if not dense_inputs.blocks[0].path:
            why, todo = "the model has no residual blocks", "take reconstruct"
            raise NotSupported("there is no residual stream to match", why, todo)
        new = {block.path: new_name(dense_, plan.dropped, block.path) for block in dense_inputs.blocks}
        kept = [path for path in new.values() if path is not None]
        small_inputs = BlockInputs(small_, samples, source.run, blocks_at(small_, kept, samples[0], source.run))
        matcher = _Matcher(small_, small_inputs, how)
        for run in _runs(dense_inputs.blocks, new):
            targets = _outputs_behind(dense_inputs, run)
            path = new[run[0].path]
            if path is not None:
                block = next(b for b in small_inputs.blocks if b.path == path)
                matcher.match_(block, targets, [b.path for b in run[1:]])
    return Matched(tuple(matcher.fits))


def _runs(blocks: Sequence[ModelBlock], new: Mapping[str, str | None]) -> list[list[ModelBlock]]:
    """Each kept block with the dropped blocks of its own list that follow it; other dropped blocks alone."""
    runs: list[list[ModelBlock]] = []
    for block in blocks:
        before = runs[-1][0].path if runs else ""
        follows = new[block.path] is None and before and new[before] is not None
        if follows and before.rpartition(".")[0] == block.path.rpartition(".")[0]:
            runs[-1].append(block)
        else:
            runs.append([block])
    return runs


def _outputs_behind(inputs: BlockInputs, run: Sequence[ModelBlock]) -> list[Tensor]:
    """The outputs of the last block of a run in the dense model, one per batch."""
    outputs: list[Tensor] = []
    for block in run:
        outputs = [tensors(inputs.forward(block, call))[0] for call in inputs.calls(block)]
        inputs.next_block(block, outputs)
    return outputs


@dataclass
class _Matcher:
    """Matches the blocks of the small model, one after the other."""

    model: nn.Module
    inputs: BlockInputs
    how: Match

    def __post_init__(self) -> None:
        self.fits: list[BlockFit] = []
        self.masks = masks_of(self.model)

    def match_(self, block: ModelBlock, targets: list[Tensor], replaces: list[str]) -> None:
        """Match one block in place, and compute the inputs of the next one."""
        calls = self.inputs.calls(block)
        if self.how.gaps and not replaces:
            fit = BlockFit(block.path, skipped="no block behind it was dropped")
        else:
            fit = self._solve_(block, calls, targets)
            if self.how.refine is not None:
                outputs = [partial(self._output, block, call) for call in calls]
                fit = self._refine_(block, outputs, targets, fit)
            fit = replace(fit, replaces=tuple(replaces))
        self.fits.append(fit)
        log.info("%s", fit)
        self.inputs.next_block(block)

    def _output(self, block: ModelBlock, call: BlockCall) -> Tensor:
        return tensors(self.inputs.forward(block, call))[0]

    def _solve_(self, block: ModelBlock, calls: Sequence[BlockCall], targets: Sequence[Tensor]) -> BlockFit:
        """Least squares for the last layer of the block."""
        read, reason = self._last_layer(block, calls[0])
        names = {p: name for name, p in self.model.named_parameters()}
        if read is None or names[read.weight] in self.masks:
            return BlockFit(block.path, skipped=reason or "the weights of its last layer are masked")
        sums = self._sums(block, calls, targets, read)
        solution, *errors = self._best(sums.fitted, sums.validation)
        before, after = (math.sqrt(square / (sums.energy or 1.0)) for square in errors)
        if after >= before or before <= SAME:
            return BlockFit(block.path, names[read.weight], before, before)
        matrices = read.matrices()
        read.write_((matrices.double() + solution.change.T).to(matrices.dtype))
        if read.bias is not None:
            read.bias.copy_((read.bias.double() + solution.shift).to(read.bias.dtype))
        return BlockFit(block.path, names[read.weight], before, after)

    def _sums(self, block: ModelBlock, calls: Sequence[BlockCall], targets: Sequence[Tensor], layer: Read) -> _Sums:
        """The sums of the least squares, over the batches for the fit and those for validation."""
        fitted = Sums(centered=layer.bias is not None, quick=True)
        validation = fitted
        held_out = _validation(len(calls)) if self.how.ridge is None else set[int]()
        energy = {False: 0.0, True: 0.0}
        for number, (call, target) in enumerate(zip(calls, targets, strict=True)):
            read = self._read_of(block, call, layer.weight)
            y = read.rows_of(target.reshape(read.y.shape)).double() - read.rows(residual=True).double()
            energy[number in held_out] += float(target.double().square().sum())
            for x, tokens in read.columns():
                if number in held_out and validation is fitted:
                    validation = fitted.empty()
                sums = validation if number in held_out else fitted
                sums.add(x, y[tokens], (y - read.rows().double())[tokens])
        if not (fitted.finite and validation.finite):
            what = f"the hidden states in {block.path} are not finite"
            raise CheckFailed(what, "on the calibration data", "check the data")
        return _Sums(fitted, validation, energy[bool(held_out)])

    def _best(self, fitted: Sums, validation: Sums) -> tuple[Solution, float, float]:
        """The solution from all batches with the ridge best on `validation`; the errors there without and with it."""
        if validation is fitted:
            solution = fitted.solve(RIDGES[0] if self.how.ridge is None else self.how.ridge)
            return solution, fitted.squares, fitted.error(solution)
        errors = {ridge: validation.error(fitted.solve(ridge)) for ridge in RIDGES}
        best = min(errors, key=errors.__getitem__)
        return (fitted + validation).solve(best), validation.squares, errors[best]

    def _refine_(
        self, block: ModelBlock, outputs: Sequence[Callable[[], Tensor]], targets: Sequence[Tensor], fit: BlockFit
    ) -> BlockFit:
        """Gradient steps for the whole block."""
        assert self.how.refine is not None
        named = dict(self.model.named_parameters(remove_duplicate=False))
        masks = {
            named[name]: mask.to(named[name].device) for name, mask in self.masks.items() if inside(name, block.path)
        }
        refined = refine_(self.model.get_submodule(block.path), outputs, targets, masks, self.how.refine)
        before = math.sqrt(refined.before) if fit.skipped else fit.before
        return BlockFit(fit.name, fit.layer or "all", before, math.sqrt(refined.after))

    def _last_layer(self, block: ModelBlock, call: BlockCall) -> tuple[Read | None, str]:
        """The last layer of the block, if its output plus the residual is the output of the block; else why not."""
        module = self.model.get_submodule(block.path)
        reads: list[Read] = []
        watch = Watch([p for p in module.parameters() if p.dim() > 1], reads.append)
        with watch:
            output = self._output(block, call)
        watch.finish()
        added = [read for read in reads if read.residual is not None and read.groups == 1]
        if not added or not _is_sum(added[-1], output):
            return None, "its output is not the sum of a layer and the residual stream"
        last = added[-1]
        if id(last.weight) in watch.others:
            return None, watch.others[id(last.weight)].tied
        if sum(read.weight is last.weight for read in reads) > 1:
            return None, "its last layer is read more than once"
        return last, ""

    def _read_of(self, block: ModelBlock, call: BlockCall, weight: nn.Parameter) -> Read:
        """The last read of a weight in one call of the block."""
        reads: list[Read] = []
        watch = Watch([weight], reads.append)
        with watch:
            self.inputs.forward(block, call)
        watch.finish()
        return reads[-1]


@dataclass(frozen=True)
class _Sums:
    """Sums for the fit and for validation, the same if no batch is held out. energy: `|y|^2` of the validation."""

    fitted: Sums
    validation: Sums
    energy: float


def _validation(batches: int) -> set[int]:
    """The batches that are held out to choose the ridge: every fourth, the last one of fewer."""
    return set(range(3, batches, 4)) or ({batches - 1} if batches > 1 else set())


def _is_sum(read: Read, output: Tensor) -> bool:
    assert read.residual is not None
    total = read.y.double() + read.residual.double()
    if total.numel() != output.numel():
        return False
    return bool(torch.allclose(total.reshape(output.shape), output.double(), rtol=1e-3, atol=1e-4))


@dataclass(frozen=True)
class Replaced:
    """A model in which one block replaces a run of blocks: the plan that dropped the others, and the fit."""

    model: nn.Module
    plan: Plan
    matched: Matched

    def __str__(self) -> str:
        return str(next(fit for fit in self.matched.fits if fit.replaces))


@solver(source="Chen et al. 2024, arXiv:2403.19135 (LLM-Streamline)")
def replace_run(
    model: nn.Module,
    inputs: Inputs,
    data: Iterable[Any],
    *,
    count: int,
    refine: Refine | None = Refine(epochs=5, lr=2e-4),  # noqa: B008 (frozen)
    loss: Loss | None = None,
) -> Replaced:
    """Replace a run of blocks by its first block, which is trained to give the output of the whole run.

    The run is the `count + 1` consecutive blocks with the smallest angular distance between input and output, as in
    `drop_run`. Its first block is fitted to the output of the run, starting from its own weights:
    `min |B(x_l) - x_{l+n+1}|^2`, by least squares for its last layer and then gradient steps for all its weights. The
    result has `count` blocks less, and the same architecture. Data: batches, no labels.

    refine: the gradient steps, or None for the least squares alone. loss: how to run the model on a batch.

    Use: many blocks at once. Avoid: one or two blocks: `greedy_blocks` with `match_stream_` fits all blocks.
    """
    samples = listed(data)
    blocks = find_blocks(model, inputs)
    plan = blocks.plan(turns(blocks, samples, loss=loss).run(count + 1)[1:])
    small = shrink(model, plan)
    return Replaced(
        small, plan, match_stream_(small, model, samples, plan, how=Match(refine=refine, gaps=True), loss=loss)
    )
