"""Prune a trained model in one shot, block by block, with a layer solver."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from prunella.errors import RequestError
from prunella.granularity import NM, Element
from prunella.graph.data import Layer
from prunella.graph.match import check_patterns, chosen, names_of_layer
from prunella.graph.matrix import from_matrix, to_matrix
from prunella.graph.solve.groups import couple
from prunella.llm.blocks import Block, Call, Calls, Feed, Keep, blocks_of, uncached
from prunella.llm.distributed import ALONE, Processes
from prunella.llm.experts import experts_run, in_turns, matrix_of, routers, stack_axis, unread_stacks
from prunella.llm.refine import Refine, refine_
from prunella.model.forward import batches, mode, tensors
from prunella.model.masks import record_
from prunella.model.reads import Read, Stop, Watch, rows
from prunella.model.unwrap import unwrap
from prunella.registry.method import solver
from prunella.solvers import Solved, admm
from prunella.solvers.layer import Pattern
from prunella.stats import Source
from prunella.stats.subject import first_seen
from prunella.types import Gram, Inputs, Loss, Mask

log = logging.getLogger(__name__)
LayerSolver = Callable[..., Solved]
"""`(weight, gram, pattern, sparsity=)` -> `Solved`: `admm`, `sparsegpt`, `partial(by_score, score=wanda)`."""


@dataclass(frozen=True)
class OneShot:
    """How to prune in one shot.

    pattern: `Element()`, `Element(per_row=True)`, `NM(2, 4)` or `Block(r, c)`. sparsity: of every layer in [0, 1), or a
    mapping of layer names, which leaves the others whole; `NM` has its own. method: a layer solver, knobs bound by
    `functools.partial`. refine: gradient steps for each block after its layers, or None. true_sequential: a layer sees
    those before it in its block pruned; else, as in the reference codes of Wanda and SparseGPT, it sees them dense, and
    only the blocks before are pruned.
    """

    pattern: Pattern = field(default_factory=Element)
    sparsity: float | Mapping[str, float] = 0.5
    method: LayerSolver = admm
    refine: Refine | None = None
    true_sequential: bool = True

    def __post_init__(self) -> None:
        for value in self.sparsity.values() if isinstance(self.sparsity, Mapping) else [self.sparsity]:
            if not 0 <= value < 1:
                raise RequestError(f"sparsity={value:g} is out of range", "0 <= sparsity < 1", "for example 0.5")

    def of(self, layer: Layer) -> float | None:
        """The sparsity of a layer, None if it stays whole."""
        if isinstance(self.pattern, NM):
            return self.pattern.sparsity
        return self.sparsity.get(layer.name) if isinstance(self.sparsity, Mapping) else self.sparsity

    def names(self, layer: Layer) -> bool:
        """Whether a mapping of sparsities has the layer, on purpose then."""
        return isinstance(self.sparsity, Mapping) and layer.name in self.sparsity


@dataclass(frozen=True)
class Fit:
    """One layer: relative error of its outputs, weights that went and were there, tokens seen, damping, seconds."""

    name: str
    error: float = 0.0
    removed: int = 0
    total: int = 0
    tokens: int = 0
    damping: float = 0.0
    seconds: float = 0.0
    skipped: str = ""

    def __str__(self) -> str:
        if self.skipped:
            return f"{self.name}: left whole, {self.skipped}"
        return f"{self.name}: {self.removed / self.total:.1%} removed, error {self.error:.3%} ({self.tokens} tokens)"


@dataclass(frozen=True)
class Solving:
    """What `solve_` did: every layer in the order of execution, and the blocks' errors before and after refining."""

    fits: tuple[Fit, ...]
    refined: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def sparsity(self) -> float:
        """Of the layers that were pruned."""
        total = sum(fit.total for fit in self.fits)
        return sum(fit.removed for fit in self.fits) / total if total else 0.0

    def __str__(self) -> str:
        done = [fit for fit in self.fits if not fit.skipped]
        lines = [*map(str, self.fits), f"{len(done)} layers, sparsity {self.sparsity:.4f} of their weights"]
        return "\n".join(lines)


OnLayer = Callable[[Fit, int, int], None]
"""Called after each layer with its fit, how many are done, and how many there are."""


@solver(source="Frantar and Alistarh 2023, arXiv:2301.00774 (block by block); Boza 2024, arXiv:2401.02938")
def solve_(
    model: nn.Module,
    inputs: Inputs,
    how: OneShot,
    *,
    data: Iterable[Any],
    loss: Loss | None = None,
    skip: Sequence[str] = (),
    on_layer: OnLayer | None = None,
    processes: Processes = ALONE,
) -> Solving:
    """Prune `model` in place, layer by layer, from the inputs that each layer has in the pruned model.

    Residual blocks are found from the data flow. In each, layers that share an input are solved together from one Gram
    matrix `H = sum x x^T` of what reaches them once everything before is pruned, by `how.method`, which minimises
    `tr((V - W) H (V - W)^T)` under the pattern. Memory: the Gram matrix of one input at a time, and the stream between
    two blocks for all batches (twice with `refine`). Masks are remembered as by `apply_`: a `Pruner` holds them.
    Data: batches, no labels.

    inputs: an example batch, as for `plan`. loss: how to run the model on a batch. skip: patterns of layers that stay
    whole. Layers outside the blocks (heads, embeddings) stay whole too, and so do grouped convolutions, routers of a
    mixture, and weights that are read in other ways; the result names them. Experts that lie in one stacked weight are
    solved one by one, each from its own tokens; one that gets none goes by magnitude. processes: `processes()` under
    torchrun, where `data` is this process's share: Gram matrices are summed over all, each solves some layers and hands
    them round, and each step of `refine` is that of the process whose batch it is. Errors: RequestError when no layer
    is left.

    Use: large pretrained models without training. Avoid: small networks that can be trained: `Pruner` does better.
    """
    root = unwrap(model)
    source = Source(None, loss)
    held = list(batches(data))
    with mode(root, training=False), uncached(root), torch.no_grad():
        graph = couple(root, inputs)
    with mode(root, training=False), uncached(root), experts_run(root, "eager"), torch.no_grad():
        check_patterns(graph, skip, ())
        feed = Feed(root, held, source.run, blocks_of(root, graph, held[0], source.run))
        layers = {
            layer.entity: layer
            for layer in first_seen(graph.layers)
            if not chosen(names_of_layer(graph, layer), skip, ()) and how.of(layer) is not None
        }
        routing = [
            layers.pop(entity) for entity in routers(graph) if entity in layers and not how.names(layers[entity])
        ]
        inside = [[x for x in layers.values() if _within(graph.entities[x.entity].names, b)] for b in feed.blocks]
        if not any(inside):
            raise RequestError("there is no layer to prune", "skip=, or the mapping of sparsities, leaves none", "")
        job = Job(root, how, feed, on_layer, sum(map(len, inside)), processes)
        for block, some in zip(feed.blocks, inside, strict=True):
            job.block(block, some)
    within = {layer.entity for some in inside for layer in some}
    whole = [Fit(x.name, skipped="it is outside the blocks") for x in layers.values() if x.entity not in within]
    whole += [Fit(x.name, skipped="it chooses experts") for x in routing]
    whole += [Fit(name, skipped="its matrices are read all at once") for name in unread_stacks(root, graph)]
    return Solving((*job.fits, *whole), job.refined)


def _within(names: Iterable[str], block: Block) -> bool:
    """Whether a parameter lives in the block; one that is shared with the outside does not."""
    return all(name.startswith(f"{block.path}.") or not block.path for name in names)


class Feeding(Protocol):
    """Where the calls of the blocks come from, in turn: `Feed`, or one that reads the blocks from files."""

    @property
    def keep(self) -> Keep:
        """Keeps a stream, one tensor a batch."""

    def calls(self, block: Block) -> Sequence[Call]:
        """What the block is called with."""

    def call(self, block: Block, call: Call) -> Any:
        """The block on one of its calls."""

    def advance(self, block: Block, outputs: Sequence[Tensor] | None = None) -> None:
        """Make the inputs of the next block, or take the `outputs` of this one for them."""


Part = int | None
"""The place of a matrix in a stack of them, None for a plain weight."""
Piece = tuple[nn.Parameter, Layer, Part]


@dataclass
class Made:
    """What became of a weight: its mask, and for each of its matrices the error, tokens, damping and seconds."""

    mask: Mask
    solved: list[tuple[float, int, float, float]] = field(default_factory=list)

    def fit(self, name: str) -> Fit:
        """All matrices together: the error is their mean by tokens."""
        errors, tokens, damping, seconds = zip(*self.solved, strict=True)
        error = errors[0]
        if len(errors) > 1:
            error = sum(e * n for e, n in zip(errors, tokens, strict=True)) / max(sum(tokens), 1)
        removed = int((~self.mask).sum())
        return Fit(name, error, removed, self.mask.numel(), sum(tokens), max(damping), sum(seconds))


@dataclass
class Job:
    """One call of `solve_`: blocks go in one after the other."""

    model: nn.Module
    how: OneShot
    feed: Feeding
    on_layer: OnLayer | None
    count: int
    processes: Processes = ALONE
    fits: list[Fit] = field(default_factory=list)
    refined: dict[str, tuple[float, float]] = field(default_factory=dict)
    solved: int = 0
    dense_stream: Sequence[Tensor] = ()

    def block(self, block: Block, layers: Sequence[Layer]) -> None:
        """Prune the layers of one block, refine it, and pass its outputs on."""
        calls = self.feed.calls(block)
        wanted = self.wanted(block, calls)
        masks: dict[nn.Parameter, Mask] = {}
        named = dict(self.model.named_parameters(remove_duplicate=False))
        mine = {named[layer.entity]: layer for layer in layers}
        groups = self._shared(block, calls, mine)
        order = [mine[weight].name for shared, _ in groups for weight in shared]
        for shared, uses in groups if self.how.true_sequential else reversed(groups):  # the last one disturbs no other
            made = {weight: Made(torch.ones_like(weight, dtype=torch.bool)) for weight in shared}
            for parts in in_turns(shared[0], mine[shared[0]]):
                grams = self._grams(block, calls, shared[0], mine[shared[0]], uses, parts)
                pieces = [(weight, mine[weight], part) for weight in shared for part in parts]
                self._solve_(pieces, grams, made)
            for weight in shared:
                self._done(made[weight].fit(mine[weight].name))
                masks[weight] = made[weight].mask
        if order:
            self.fits[-len(order) :] = sorted(self.fits[-len(order) :], key=lambda fit: order.index(fit.name))
        record_(self.model, masks)
        outputs: Sequence[Tensor] | None = None
        if self.how.refine is not None and block.path and masks:
            runs = [partial(self._output, block, calls, k) for k in range(len(calls))]
            module = self.model.get_submodule(block.path)
            done = refine_(module, runs, wanted, masks, self.how.refine, self.feed.keep, self.processes)
            self.refined[block.path], outputs = (done.before, done.after), done.outputs
        self.feed.advance(block, outputs)

    def _output(self, block: Block, calls: Sequence[Call], k: int) -> Tensor:
        return tensors(self.feed.call(block, calls[k]))[0]

    def wanted(self, block: Block, calls: Sequence[Call]) -> Sequence[Tensor]:
        """The outputs of the dense block on the dense stream, which is kept from block to block."""
        if self.how.refine is None or not block.path:
            return []
        if block.linked and len(self.dense_stream):
            calls = Calls(calls, self.dense_stream)
        twin = copy.deepcopy(self.model.get_submodule(block.path))
        self.dense_stream = self.feed.keep(tensors(call.run(twin))[0] for call in calls)
        return self.dense_stream

    def _shared(
        self, block: Block, calls: Sequence[Call], mine: Mapping[nn.Parameter, Layer]
    ) -> list[tuple[list[nn.Parameter], int]]:
        """The weights in the order in which they are first read, those with one input together; reads in a pass."""
        reads: dict[nn.Parameter, list[Read]] = {}
        watch = Watch(mine, lambda read: reads.setdefault(read.weight, []).append(read), stacks=True)
        with watch:
            self.feed.call(block, calls[0])
        watch.finish()
        groups: list[tuple[list[nn.Parameter], int]] = []
        last: Tensor | None = None
        for weight, layer in mine.items():
            reason = _unfit(reads.get(weight, []), watch.others.get(id(weight)), layer, self.how.pattern, weight)
            if reason:
                self._done(Fit(layer.name, skipped=reason))
                reads.pop(weight, None)
        for weight, some in reads.items():
            plain = some[0].conv is None and some[0].part is None
            if last is not None and plain and some[0].x.shape == last.shape and some[0].x.equal(last):
                groups[-1][0].append(weight)
            else:
                groups.append(([weight], len(some) if some[0].part is None else 0))
            last = some[0].x if len(some) == 1 and some[0].part is None else None
        self.processes.agree(len(groups) * 10_000 + sum(uses for _, uses in groups), f"the layers of {block.path}")
        return groups

    def _grams(
        self, block: Block, calls: Sequence[Call], weight: nn.Parameter, layer: Layer, uses: int, parts: Sequence[Part]
    ) -> dict[Part, tuple[Gram, int]]:
        """`sum x x^T` over all reads of these parts of a weight, and how many tokens each had.

        A pass ends when a plain weight was read so often as it is. The products are added up in float64, so that the
        order of the batches, and with it the number of processes, leaves no trace that a mask could show. The inputs of
        an expert that no token chose are taken to be independent: what is kept then goes by magnitude.
        """
        wide = to_matrix(*matrix_of(weight, layer, parts[0])).shape[1]
        total = {part: weight.new_zeros(wide, wide, dtype=torch.float64) for part in parts}
        tokens, left = dict.fromkeys(parts, 0), uses

        def add(read: Read) -> None:
            nonlocal left
            if read.part not in total:
                return
            with torch.autocast(read.x.device.type, enabled=False):
                for x, _ in rows(read):
                    single = x.to(torch.promote_types(x.dtype, torch.float32))
                    total[read.part] += single.T @ single
                    tokens[read.part] += len(single)
            left -= 1
            if not left and read.part is None:
                raise Stop

        for call in calls:
            left = uses
            watch = Watch([weight], add, stacks=True)
            with suppress(Stop):
                with watch:
                    self.feed.call(block, call)
                watch.finish()
        seen = torch.tensor([tokens[part] for part in parts], device=weight.device)
        self.processes.sum_(*total.values(), seen)
        kind = torch.promote_types(weight.dtype, torch.float32)
        counted = dict(zip(parts, seen.tolist(), strict=True))
        for part, count in counted.items():
            if not count:
                total[part].fill_diagonal_(1.0)
        return {part: (gram.to(kind), counted[part]) for part, gram in total.items()}

    def _solve_(
        self, pieces: Sequence[Piece], grams: Mapping[Part, tuple[Gram, int]], made: Mapping[nn.Parameter, Made]
    ) -> None:
        """Solve these matrices, each by the process whose turn it is, and write them to the weights."""
        team, start = self.processes, time.perf_counter()
        owners = [(self.solved + k) % team.count for k in range(len(pieces))]
        self.solved += len(pieces)
        # In several processes each solves all of its own before it waits for others; one process holds one at a time.
        mine = [k for k, owner in enumerate(owners) if owner == team.rank and team.count > 1]
        ahead = {k: self._matrix(pieces[k], grams) for k in mine}
        for k, (weight, layer, part) in enumerate(pieces):
            view, axes = matrix_of(weight.detach(), layer, part)
            if team.count == 1:
                found = self._matrix(pieces[k], grams)
            else:
                found = team.told(ahead.pop(k, None), _wide(to_matrix(view, axes)), owners[k])
            view.copy_(from_matrix(found.weight, view, axes))
            matrix_of(made[weight].mask, layer, part)[0].copy_(from_matrix(found.mask, view, axes))
            end = time.perf_counter()
            made[weight].solved.append((found.error, grams[part][1], found.damping, end - start))
            start = end

    def _matrix(self, piece: Piece, grams: Mapping[Part, tuple[Gram, int]]) -> Solved:
        """One matrix by the method."""
        weight, layer, part = piece
        sparsity = self.how.of(layer)
        assert sparsity is not None
        wide = _wide(to_matrix(*matrix_of(weight.detach(), layer, part)))
        with torch.autocast(weight.device.type, enabled=False):
            return self.how.method(wide, grams[part][0], self.how.pattern, sparsity=sparsity)

    def _done(self, fit: Fit) -> None:
        self.fits.append(fit)
        log.info("%s", fit)
        if self.on_layer:
            self.on_layer(fit, len(self.fits), self.count)


def _wide(matrix: Tensor) -> Tensor:
    return matrix.to(torch.promote_types(matrix.dtype, torch.float32))


def _unfit(reads: Sequence[Read], other: str | None, layer: Layer, pattern: Pattern, weight: Tensor) -> str:
    """Why a layer stays whole, or nothing."""
    if not reads:
        return f"{other} reads it, which is not solved" if other else "it does not run on the data"
    if other is not None:
        return f"{other} reads the same weight"
    if reads[0].conv is not None and reads[0].conv.groups > 1:
        return f"a convolution with {reads[0].conv.groups} groups is not solved"
    if (reads[0].part is None) != (stack_axis(weight, layer) is None):
        return "it is read in two ways"
    if isinstance(pattern, NM) and not pattern.fits(tuple(to_matrix(*matrix_of(weight, layer, reads[0].part)).shape)):
        return f"{pattern.m} does not divide its columns"
    return ""
