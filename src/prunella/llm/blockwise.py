"""Prune a language model in memory, block by block, each block for its inputs in the pruned model: `solve_`.

This module is not called `one_shot`, which is the function that gives the default recipe.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from prunella.errors import NotSupported, RequestError
from prunella.graph.data import Graph, Layer
from prunella.graph.match import check_patterns, chosen, names_of_layer
from prunella.graph.solve.groups import couple
from prunella.llm.block_problem import BlockProblem, Fit
from prunella.llm.blocks import BlockInputs, ModelBlock, OnHost, blocks_of, uncached
from prunella.llm.calibration import AUTO, Calibration, Sources, Split, calibrated, split
from prunella.llm.distributed import SINGLE_PROCESS, ProcessGroup
from prunella.llm.experts import experts_implementation, routers, unread_experts
from prunella.llm.less_memory import in_less_memory
from prunella.llm.recipe import OneShot
from prunella.llm.shrinkage import calls_of, not_fitted
from prunella.llm.solve_block import dense_targets, layers_by_weight, solve_block_
from prunella.model.batches import listed
from prunella.model.masks import record_
from prunella.model.state import mode, restored_on_error
from prunella.model.unwrap import unwrap
from prunella.model.watch import Watch
from prunella.registry.method import solver
from prunella.stats import Source
from prunella.stats.subject import first_seen
from prunella.types import Inputs, Loss

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Solving:
    """The result of `solve_`: layers in order of execution, and errors of the blocks before and after refinement.

    strengths: the kept fraction of the weights' change of each block, if batches were held out.
    """

    fits: tuple[Fit, ...]
    refined: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    strengths: Mapping[str, float] = field(default_factory=dict)

    @property
    def sparsity(self) -> float:
        """Of the weights of all pruned layers."""
        total = sum(fit.total for fit in self.fits)
        return sum(fit.removed for fit in self.fits) / total if total else 0.0

    def __str__(self) -> str:
        pruned = [fit for fit in self.fits if not fit.skipped]
        lines = [*map(str, self.fits), f"{len(pruned)} layers, sparsity {self.sparsity:.4f} of their weights"]
        return "\n".join(lines)


OnLayer = Callable[[Fit, int, int], None]
"""Called after each layer with its fit, the number of finished layers, and the number of all layers."""


@solver(source="Frantar and Alistarh 2023, arXiv:2301.00774 (block by block); Boza 2024, arXiv:2401.02938")
def solve_(
    model: nn.Module,
    inputs: Inputs,
    how: OneShot,
    *,
    data: Iterable[Any] | Calibration | Sources | Split = AUTO,
    loss: Loss | None = None,
    skip: Sequence[str] = (),
    on_layer: OnLayer | None = None,
    distributed: ProcessGroup = SINGLE_PROCESS,
) -> Solving:
    """Prune `model` in place, layer by layer, for the inputs that each layer has in the pruned model.

    Residual blocks are found from the data flow. In each of them, layers with the same input are solved together from
    one Gram matrix `H = sum x x^T` of their inputs, computed by the already pruned layers before them. `how.method`
    minimizes `tr((V - W) H (V - W)^T)` under the pattern. Memory: the Gram matrix of one input at a time, and the
    hidden states between two blocks for all batches (twice with `refine`). Masks are recorded as by `apply_`, so that a
    `Pruner` keeps them.
    Data: batches, no labels; without any, text that the model writes itself.

    inputs: an example batch, as for `plan`. data: batches, a `Calibration`, a mapping of text files and `"auto"` to
    shares, `"auto"`, which is `Calibration()`, or a `Split` of any of them and held-out batches of another source.
    Held-out batches choose for each block the kept fraction of its weights' change, one of five from 0 to 1
    (`Solving.strengths`). loss: runs the model on a batch. skip: patterns of layers that are kept dense. Layers outside
    the blocks (heads, embeddings) are kept dense too, and so are routers of a
    mixture, and weights that no matrix describes (`prunella.model.reads`); the result names them. Groups of a
    convolution, and experts that are stacked in one weight, are solved one by one, each for its own tokens; one without
    tokens is pruned by magnitude. distributed:
    `process_group()` under torchrun, where `data` is the shard of this process: Gram matrices are summed over all
    processes, each process solves some layers and broadcasts them, and each step of `refine` is computed by the process
    that has the batch. Errors: RequestError if no layer is left. After any error `model` is as before.
    on_layer: called after each layer with its fit, the number of finished layers, and of all layers.
    Where an accelerator runs out of memory, all is tried again: with every batch in halves, as often as they have more
    than one sample (not with `refine` or held-out batches, whose steps and strengths depend on the batches), then with
    the hidden states on the CPU. Errors: OutOfResources if that does not fit either.

    Use: large pretrained models without training. Avoid: small networks that can be trained: `Pruner` does better.
    """
    root, parts = unwrap(model), split(data)
    drawn = calibrated(root, inputs, parts.data)
    samples: list[Any] = listed(cast(Iterable[Any], parts.data)) if drawn is None else distributed.shard(drawn)
    others = not_fitted(parts.held_out, distributed)
    solve = partial(_solved_, root, inputs, how, Source(None, loss), skip, on_layer, distributed, others)
    if distributed.world_size > 1:  # all processes would have to try again together
        with restored_on_error(root):
            return solve([*samples, *others], False)
    return in_less_memory(root, solve, [*samples, *others], splits=how.refine is None and not others)


def _solved_(
    root: nn.Module,
    inputs: Inputs,
    how: OneShot,
    source: Source,
    skip: Sequence[str],
    on_layer: OnLayer | None,
    distributed: ProcessGroup,
    others: Sequence[Any],
    samples: Sequence[Any],
    host: bool,
) -> Solving:
    """host: whether hidden states wait in the memory of the CPU. The last of the samples are `others`."""
    with mode(root, training=False), uncached(root), torch.no_grad():
        graph = couple(root, inputs)
    with mode(root, training=False), uncached(root), experts_implementation(root, "eager"), torch.no_grad():
        check_patterns(graph, skip, ())
        blocks, store = blocks_of(root, graph, samples[0], source.run), OnHost if host else list
        block_inputs = BlockInputs(root, samples, source.run, blocks, store, host)
        if others and not block_inputs.blocks[0].path:
            what, todo = "batches cannot be held out", "give no Split"
            raise NotSupported(what, "the model has no residual blocks to compare their outputs", todo)
        selected = _select(graph, block_inputs.blocks, how, skip)
        unread = _unread(root, graph, block_inputs.blocks, lambda: source.run(root, samples[0]))
        pruned = _solve_blocks_(block_inputs, selected.by_block, how, on_layer, distributed, len(others))
    batched = unread_experts(root, graph)
    skipped = [*selected.skipped, *(Fit(name, skipped=_BATCHED) for name in batched)]
    skipped += [Fit(name, skipped=why) for name, why in unread.items() if name not in batched]
    return Solving((*pruned.fits, *skipped), pruned.refined, pruned.strengths)


def _unread(model: nn.Module, graph: Graph, blocks: Sequence[ModelBlock], run: Callable[[], object]) -> dict[str, str]:
    """Matrices in the blocks that are not layers, with the reasons that no product reads them; the model runs once."""
    layers = {layer.entity for layer in graph.layers}
    inside = [entity for entity in graph.entities.values() if any(block.contains(entity.names) for block in blocks)]
    named = dict(model.named_parameters(remove_duplicate=False))
    others = {e.name: named[e.name] for e in inside if e.name not in layers and e.name in named}
    others = {name: parameter for name, parameter in others.items() if parameter.dim() > 1}
    if not others:
        return {}
    read = set[int]()
    watch = Watch(others.values(), lambda seen: read.add(id(seen.weight)), stacks=True)
    with watch:
        run()
    watch.finish()
    reasons = {name: _VIEWED if id(p) in read else watch.why_unread(p) for name, p in others.items()}
    return {name: why for name, why in reasons.items() if why}


_BATCHED = "its matrices are read all at once"
_VIEWED = "a product reads an expanded or reshaped view of it"


@dataclass(frozen=True)
class _Selected:
    """The layers to prune in each block, and the layers kept dense because of their place in the model."""

    by_block: list[list[Layer]]
    skipped: list[Fit]


def _select(graph: Graph, blocks: Sequence[ModelBlock], how: OneShot, skip: Sequence[str]) -> _Selected:
    """Errors: RequestError if no layer is left."""
    routing = routers(graph)
    asked = [
        layer
        for layer in first_seen(graph.layers)
        if not chosen(names_of_layer(graph, layer), skip, ()) and how.sparsity_of(layer) is not None
    ]
    layers = [layer for layer in asked if how.prunes(layer, router=layer.entity in routing)]
    by_block = [[x for x in layers if block.contains(graph.entities[x.entity].names)] for block in blocks]
    if not any(by_block):
        raise RequestError("there is no layer to prune", "skip=, or the mapping of sparsities, leaves none", "")
    inside = {layer.entity for some in by_block for layer in some}
    skipped = [Fit(x.name, skipped="it is outside the blocks") for x in layers if x.entity not in inside]
    skipped += [
        Fit(x.name, skipped="it chooses experts") for x in asked if not how.prunes(x, router=x.entity in routing)
    ]
    return _Selected(by_block, skipped)


def _solve_blocks_(
    inputs: BlockInputs,
    layers: Sequence[Sequence[Layer]],
    how: OneShot,
    on_layer: OnLayer | None,
    distributed: ProcessGroup,
    others: int,
) -> Solving:
    """Prune all blocks in order; the last `others` batches are held out."""
    fits: list[Fit] = []
    refined: dict[str, tuple[float, float]] = {}
    strengths: dict[str, float] = {}
    number, count = itertools.count(1), sum(map(len, layers))
    turn = 0
    targets: Sequence[Tensor] = ()

    def report(fit: Fit) -> None:
        log.info("%s", fit)
        if on_layer:
            on_layer(fit, next(number), count)

    for block, some in zip(inputs.blocks, layers, strict=True):
        module, calls = inputs.model.get_submodule(block.path), inputs.calls(block)
        held_out = calls_of(others, len(inputs.batches), len(calls))
        targets = dense_targets(how, block, module, calls, targets, inputs.store, held_out)
        by_weight = layers_by_weight(inputs.model, some)
        forward = partial(inputs.forward, block)
        result = solve_block_(
            BlockProblem(
                block,
                module,
                by_weight,
                calls,
                forward,
                how,
                targets,
                inputs.store,
                distributed,
                turn,
                held_out,
            ),
            report,
        )
        record_(inputs.model, result.masks)
        fits, turn = [*fits, *result.fits], result.next_solver
        if result.refined is not None:
            refined[block.path] = result.refined.before, result.refined.after
        if result.strength is not None:
            strengths[block.path] = result.strength
        inputs.next_block(block, result.outputs)
    return Solving(tuple(fits), refined, strengths)
