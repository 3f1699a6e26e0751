"""Bring the residual stream of a pruned model back to that of the dense one, block by block, without labels."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunella.errors import CheckFailed, NotSupported, RequestError
from prunella.graph.cut.block_surgery import new_name
from prunella.graph.solve.groups import couple
from prunella.graph.solve.residual_blocks import inside
from prunella.llm.blocks import Block, Call, Feed, block_paths, blocks_at
from prunella.llm.refine import Refine, refine_
from prunella.model.forward import batches, mode, tensors
from prunella.model.masks import masks_of
from prunella.model.reads import Read, Watch, rows, targets
from prunella.model.state import untouched
from prunella.model.unwrap import unwrap
from prunella.planning.depth import find_blocks, turns
from prunella.planning.plan import Plan
from prunella.recovery.least_squares import Solution, Sums
from prunella.registry.method import solver
from prunella.stats import Source
from prunella.transform.shrink import shrink
from prunella.types import Inputs, Loss

log = logging.getLogger(__name__)
SAME = 1e-6
"""A relative error that is no more than rounding: there is nothing to make up for."""
RIDGES = (1e-2, 1e-1, 1.0, 1e1, 1e2)
"""Tried where none is given. The layers write into a sum that others read: what is fitted too closely does harm."""


@dataclass(frozen=True)
class Match:
    """How a block is matched. ridge: of the least squares, relative to the mean square of the inputs, from 0 up.

    None: of five between 0.01 and 100 the one that is best on every fourth batch (the last one of fewer), which the
    least squares then does not see; where none is better than nothing, the layer stays as it was. A single batch
    cannot judge: 0.01. refine: gradient steps for the whole block after the least squares, or None. gaps: only blocks
    behind which others were dropped.
    """

    ridge: float | None = None
    refine: Refine | None = None
    gaps: bool = False

    def __post_init__(self) -> None:
        if self.ridge is not None and not self.ridge >= 0:
            raise RequestError(f"ridge={self.ridge:g} is out of range", "it takes numbers from 0 up", "leave it out")


@dataclass(frozen=True)
class BlockFit:
    """One block: `|B'(x') - y| / |y|` before and after, y the dense stream. instead: blocks that it stands for too.

    Measured on the batches that chose the ridge, where none was given.
    """

    name: str
    layer: str = ""
    before: float = 0.0
    after: float = 0.0
    instead: tuple[str, ...] = ()
    skipped: str = ""

    def __str__(self) -> str:
        stands = f", stands for {len(self.instead)} more" if self.instead else ""
        if self.skipped:
            return f"{self.name}: as it was, {self.skipped}"
        return f"{self.name}: {self.before:.4f} -> {self.after:.4f}{stands}"


@dataclass(frozen=True)
class Matched:
    """What `match_stream_` did, block by block in the order of execution."""

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
    """Refit every block of `small`, in place, so that the stream behind it is the dense model's at the same place.

    A block that stays answers for itself and for the dropped ones that follow it: its goal is what leaves the last of
    them in the dense model. The last layer in it whose output is added to the stream is solved by least squares,
    `min over D, b of |y - s - X (W + D)^T - b|^2 + ridge * mean(diag(X^T X)) * |D|^2`, with X its inputs and s the
    stream beside it in the small model, so that it also makes up for what the blocks before it lost; `how.refine` then
    moves all weights of the block toward the same goal. A least-squares change is kept only if the error falls, on
    batches that it was not fitted to where `how.ridge` is not given.
    The data pass through both models once, block by block: three runs of each block, and one more for each step of
    refining. Memory: the stream between two blocks in both models, for all batches. Data: batches, no labels.

    small: what `shrink(dense, plan)` gave, for any plan of structure: depth, width or both. loss: how to run a model on
    a batch. Layers under masks are left to refining, which holds the masks. Errors: NotSupported without blocks.

    Use: right after a cut of depth or width. Avoid: a ridge of your own with fewer tokens than many times the inputs
    of the layers that are solved: it then fits the calibration data.
    """
    small_, dense_ = unwrap(small), unwrap(dense)
    held, source = list(batches(data)), Source(None, loss)
    assert plan.inputs is not None
    with untouched(dense_, 0):
        paths = block_paths(dense_, couple(dense_, plan.inputs))
    with mode(small_, training=False), mode(dense_, training=False), torch.no_grad():
        feed = Feed(dense_, held, source.run, blocks_at(dense_, paths, held[0], source.run))
        if not feed.blocks[0].path:
            raise NotSupported("there is no stream to match", "the model has no residual blocks", "take reconstruct")
        new = {block.path: new_name(dense_, plan.dropped, block.path) for block in feed.blocks}
        mine = [path for path in new.values() if path is not None]
        other = Feed(small_, held, source.run, blocks_at(small_, mine, held[0], source.run))
        job = _Job(small_, other, how, source)
        for some in _gathered(feed.blocks, new):
            wanted: list[Tensor] = []
            for block in some:
                wanted = [tensors(feed.call(block, call))[0] for call in feed.calls(block)]
                feed.advance(block, wanted)
            path = new[some[0].path]
            if path is not None:
                job.block(next(b for b in other.blocks if b.path == path), wanted, [b.path for b in some[1:]])
    return Matched(tuple(job.fits))


def _gathered(blocks: Sequence[Block], new: dict[str, str | None]) -> list[list[Block]]:
    """Each block that stays with the dropped ones of its own list that follow it; dropped ones without such alone."""
    found: list[list[Block]] = []
    for block in blocks:
        before = found[-1][0].path if found else ""
        follows = new[block.path] is None and before and new[before] is not None
        if follows and before.rpartition(".")[0] == block.path.rpartition(".")[0]:
            found[-1].append(block)
        else:
            found.append([block])
    return found


@dataclass
class _Job:
    """One call of `match_stream_`: the small model, and what feeds its blocks."""

    model: nn.Module
    feed: Feed
    how: Match
    source: Source

    def __post_init__(self) -> None:
        self.fits: list[BlockFit] = []
        self.masks = masks_of(self.model)

    def block(self, block: Block, wanted: list[Tensor], instead: list[str]) -> None:
        """Match one block, and pass its outputs on."""
        calls = self.feed.calls(block)
        if self.how.gaps and not instead:
            self.fits.append(BlockFit(block.path, skipped="nothing behind it was dropped"))
        else:
            outputs = [partial(self._output, block, call) for call in calls]
            fit = self._solved(block, calls, wanted)
            if self.how.refine is not None:
                fit = self._refined(block, outputs, wanted, fit)
            self.fits.append(BlockFit(fit.name, fit.layer, fit.before, fit.after, tuple(instead), fit.skipped))
        log.info("%s", self.fits[-1])
        self.feed.advance(block)

    def _output(self, block: Block, call: Call) -> Tensor:
        return tensors(self.feed.call(block, call))[0]

    def _solved(self, block: Block, calls: Sequence[Call], wanted: Sequence[Tensor]) -> BlockFit:
        """The least squares of the block's last layer."""
        read, reason = self._writer(block, calls[0])
        names = {p: name for name, p in self.model.named_parameters()}
        if read is None or names[read.weight] in self.masks:
            return BlockFit(block.path, skipped=reason or "single weights of its last layer are masked")
        fitted, judge = (Sums(centred=read.bias is not None) for _ in range(2))
        apart = _apart(len(calls)) if self.how.ridge is None else set[int]()
        sizes = {False: 0.0, True: 0.0}
        for number, (call, goal) in enumerate(zip(calls, wanted, strict=True)):
            found = self._last_read(block, call, read.weight)
            y = _rows_of(found, goal).double() - targets(found, beside=True).double()
            sizes[number in apart] += float(goal.double().square().sum())
            for x, some in rows(found):
                sums = judge if number in apart else fitted
                sums.add(x, y[some], (y - targets(found).double())[some])
        if not fitted.finite or (apart and not judge.finite):
            raise CheckFailed(f"the stream in {block.path} is not finite", "on the calibration data", "check the data")
        solution, *errors = self._chosen(fitted, judge if apart else fitted)
        before, after = (math.sqrt(square / (sizes[bool(apart)] or 1.0)) for square in errors)
        if after >= before or before <= SAME:
            return BlockFit(block.path, names[read.weight], before, before)
        change = solution.change.T if read.out_axis == 0 else solution.change
        read.weight.copy_((read.weight.double() + change.reshape(read.weight.shape)).to(read.weight.dtype))
        if read.bias is not None:
            read.bias.copy_((read.bias.double() + solution.shift).to(read.bias.dtype))
        return BlockFit(block.path, names[read.weight], before, after)

    def _chosen(self, fitted: Sums, judge: Sums) -> tuple[Solution, float, float]:
        """The solution that errs least on `judge`, and its error without and with it."""
        given = self.how.ridge
        ridges = (given,) if given is not None else RIDGES if judge is not fitted else RIDGES[:1]
        best = min((fitted.solve(ridge) for ridge in ridges), key=judge.error)
        return best, judge.squares, judge.error(best)

    def _refined(
        self, block: Block, outputs: Sequence[Callable[[], Tensor]], wanted: Sequence[Tensor], fit: BlockFit
    ) -> BlockFit:
        """Gradient steps for the whole block."""
        assert self.how.refine is not None
        named = dict(self.model.named_parameters(remove_duplicate=False))
        held = {named[name]: mask for name, mask in self.masks.items() if inside(name, block.path)}
        done = refine_(self.model.get_submodule(block.path), outputs, wanted, held, self.how.refine)
        start = math.sqrt(done.before) if fit.skipped else fit.before
        return BlockFit(fit.name, fit.layer or "all", start, math.sqrt(done.after))

    def _writer(self, block: Block, call: Call) -> tuple[Read | None, str]:
        """The last layer in the block whose output, added to the stream beside it, is the block's output."""
        module = self.model.get_submodule(block.path)
        found: list[Read] = []
        watch = Watch([p for p in module.parameters() if p.dim() > 1], found.append)
        with watch:
            output = self._output(block, call)
        watch.finish()
        sums = [read for read in found if read.beside is not None and read.conv is None]
        if not sums or not _is_sum(sums[-1], output):
            return None, "its output is not the sum of a layer and the stream"
        last = sums[-1]
        if sum(read.weight is last.weight for read in found) > 1 or id(last.weight) in watch.others:
            return None, "its last layer is read more than once"
        return last, ""

    def _last_read(self, block: Block, call: Call, weight: nn.Parameter) -> Read:
        found: list[Read] = []
        watch = Watch([weight], found.append)
        with watch:
            self.feed.call(block, call)
        watch.finish()
        return found[-1]


def _apart(batches: int) -> set[int]:
    """The batches that judge what was fitted to the others."""
    return set(range(3, batches, 4)) or ({batches - 1} if batches > 1 else set())


def _is_sum(read: Read, output: Tensor) -> bool:
    assert read.beside is not None
    total = read.y.double() + read.beside.double()
    if total.numel() != output.numel():
        return False
    return bool(torch.allclose(total.reshape(output.shape), output.double(), rtol=1e-3, atol=1e-4))


def _rows_of(read: Read, goal: Tensor) -> Tensor:
    """The goal as a matrix in the order of the read's outputs."""
    return goal.reshape(-1, read.y.shape[-1])


@dataclass(frozen=True)
class Replaced:
    """A model in which one block stands for a run of blocks: the plan that dropped the others, and the fit."""

    model: nn.Module
    plan: Plan
    matched: Matched

    def __str__(self) -> str:
        return str(next(fit for fit in self.matched.fits if fit.instead))


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
    """A model in which one light block, trained for it, stands for a run of blocks.

    The run of `count + 1` consecutive blocks that turns the stream least is found as by `drop_run`; its first block
    stays as the light one, with its weights as a start, and is fitted to what left the run:
    `min |B(x_l) - x_{l+n+1}|^2`, by least squares of its last layer and then gradient steps for all of it. `count`
    blocks are gone, and the model is of the same architecture. Data: batches, no labels.

    refine: the gradient steps, or None for the least squares alone. loss: how to run the model on a batch.

    Use: many blocks in one shot. Avoid: one or two blocks: `greedy_blocks` with `match_stream_` fits all of them.
    """
    held = list(batches(data))
    blocks = find_blocks(model, inputs)
    plan = blocks.plan(turns(blocks, held, loss=loss).run(count + 1)[1:])
    small = shrink(model, plan)
    return Replaced(
        small, plan, match_stream_(small, model, held, plan, how=Match(refine=refine, gaps=True), loss=loss)
    )
