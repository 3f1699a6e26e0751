"""The streaming runner: prune the blocks of a folder one after the other, with one block in memory."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunella.errors import OutOfResources, RequestError
from prunella.graph.data import Layer
from prunella.graph.match import check_known, parts
from prunella.graph.matrix import to_matrix
from prunella.io.tensor_file import open_tensors, read_folder
from prunella.llm.block_problem import BlockProblem, BlockResult, Fit
from prunella.llm.blocks import BlockCall, BlockCalls, ModelBlock, StoreActivations, listed_block_paths, uncached
from prunella.llm.blockwise import Solving
from prunella.llm.distributed import ProcessGroup
from prunella.llm.experts import expert_chunks, experts_implementation, matrix_of
from prunella.llm.recipe import OneShot
from prunella.llm.shrinkage import calls_of, not_fitted
from prunella.llm.solve_block import dense_targets, layers_by_weight, solve_block_
from prunella.llm.streaming import memory as amounts
from prunella.llm.streaming.capture import Captured, capture, layers_of
from prunella.llm.streaming.offload import OnDisk
from prunella.llm.streaming.progress import BlockProgress, DoneBlock
from prunella.llm.streaming.shards import shard_name, write_shard
from prunella.llm.streaming.skeleton import Skeleton
from prunella.llm.streaming.staged import CallsOn, staged
from prunella.measure.clock import now, since
from prunella.measure.text import byte_size
from prunella.model.device import CPU, free_memory, synchronize
from prunella.model.forward import forward
from prunella.model.state import mode
from prunella.model.trees import each, tensors

_SHRUNK = 3
"""Copies of a block during shrinkage: the dense replica, its dense weights, and its solved weights."""
_BATCHES = 4
"""Batches of hidden states on an accelerator at once: the inputs of two, and the outputs of two."""
_TRAINED = 7
"""Copies of a block that is refined: itself, the dense replica, the saved weights, the gradient, Adam's two, a sum."""


@dataclass(frozen=True)
class BlockStep:
    """One finished block: number `number` of `count`, with its layers. replayed: it was solved by an earlier run."""

    path: str
    number: int
    count: int
    fits: tuple[Fit, ...]
    seconds: float
    replayed: bool = False

    def __str__(self) -> str:
        pruned = [fit for fit in self.fits if not fit.skipped]
        error = sum(fit.error for fit in pruned) / len(pruned) if pruned else 0.0
        how = "was done before" if self.replayed else f"{len(pruned)} layers, mean error {error:.2%}"
        return f"block {self.number} of {self.count}, {self.path}: {how} ({self.seconds:.1f} s)"


def _done(result: BlockResult) -> DoneBlock:
    """The record of a block, without its masks, which hold its weights."""
    refined = None if result.refined is None else (result.refined.before, result.refined.after)
    return DoneBlock(result.fits, refined, result.strength)


OnBlock = Callable[[BlockStep], None]
"""Called after each block."""


class StreamingRun:
    """A checked run: the model without weights, its blocks and layers, and a memory peak within the budget."""

    def __init__(
        self,
        source: Path,
        how: OneShot,
        data: Sequence[Any],
        distributed: ProcessGroup,
        *,
        budget: int | None,
        skip: Sequence[str] = (),
        held_out: Iterable[Any] = (),
        skeleton: Skeleton | None = None,
        device: torch.device = CPU,
    ) -> None:
        self.source, self.how, self.distributed, self.skip = source, how, distributed, tuple(skip)
        self.device = device
        self.held_out = not_fitted(held_out, distributed)
        self.batches, self.data = len(data), [*distributed.shard(data), *self.held_out]
        if device != CPU:  # the modules around the blocks run on the CPU
            self.data = [each(batch, Tensor.cpu) for batch in self.data]
        self.tokens = sum(max((t.numel() for t in tensors(batch)), default=0) for batch in data)
        self.copies = 2 if how.refine is None and not self.held_out else 3
        """Copies of the hidden states: inputs and outputs of a block; also the dense outputs, if they are a target."""
        self.skeleton = skeleton or Skeleton(source, read_folder(source))
        check_known({part for name in self.skeleton.like for part in parts(name)}, self.skip, ())
        self.paths = listed_block_paths(self.skeleton.model)
        self.first = self._capture(self.data[:1], list)
        self.layers = self._layers(self.first)
        self.stream_bytes = len(self.data) * _bytes(self.first.hidden_states[0])
        self._works: dict[str, int] = {}
        self.peak = self.peak_within(budget)
        self.there = self._peak_there()
        """The peak of the memory of the accelerator; None on the CPU, whose memory is that of the process."""

    def peak_within(self, budget: int | None) -> amounts.Peak:
        """The peak of memory of the process. Errors: RequestError if it is above the budget."""
        return amounts.largest(partial(self._moments, self.first), budget)

    def for_processes(self, count: int) -> StreamingRun:
        """The same run as the first of so many processes. Errors: RequestError for more processes than batches."""
        other = copy.copy(self)
        other.distributed = ProcessGroup(0, count)
        samples = self.data[: len(self.data) - len(self.held_out)]
        other.data = [*other.distributed.shard(samples), *self.held_out]
        other.stream_bytes = len(other.data) * _bytes(self.first.hidden_states[0])
        other.peak = other.peak_within(None)
        return other

    @property
    def disk(self) -> int:
        """Bytes that a run writes: the weights, and the hidden states where they do not fit into the memory."""
        stored = sum(stored.size for stored in self.skeleton.stored.values())
        return stored + (self.stream_bytes * self.copies if self.peak.on_disk else 0)

    def run(self, progress: BlockProgress, on_block: OnBlock | None) -> tuple[Solving, int]:
        """Prune all blocks; finished ones only run forward. Returns the result and the number of finished blocks."""
        folder = progress.folder
        store = staged(partial(OnDisk, folder=folder) if self.peak.on_disk else list, self.device)
        state = _State(self._capture(self.data, store), store, self.device)
        fits: list[Fit] = []
        refined: dict[str, tuple[float, float]] = {}
        strengths: dict[str, float] = {}
        replayed = 0
        for number, block in enumerate(state.captured.blocks, 1):
            start = now()
            shard = folder / shard_name(number, len(self.paths) + 1)
            before = progress.done(block.path)
            if before is not None:
                progress.check(block.path, shard)
                self._replay(state, block, shard)
                done, replayed = before, replayed + 1
            else:
                done = _done(self._solve(state, block, shard))
                if self.distributed.is_main:
                    progress.add(block.path, done, shard)
            fits += done.fits
            if done.refined is not None:
                refined[block.path] = done.refined
            if done.strength is not None:
                strengths[block.path] = done.strength
            if on_block:
                seconds = since(start)
                on_block(BlockStep(block.path, number, len(self.paths), done.fits, seconds, before is not None))
        return Solving(tuple(fits), refined, strengths), replayed

    def measured(self) -> float:
        """Seconds of a whole run, predicted from the time of the solver and per batch in the first block."""
        some = self.data[:2] if not self.held_out else [self.data[0], self.data[-1]]
        store = staged(list, self.device)
        state = _State(self._capture(some, store), store, self.device)
        start = now()
        with tempfile.TemporaryDirectory() as folder:
            result = self._solve(state, state.captured.blocks[0], Path(folder) / "block")
            synchronize(self.device)
        solving = sum(fit.seconds for fit in result.fits)
        by_batch = (since(start) - solving) / len(some)
        return len(self.paths) * (solving / self.distributed.world_size + by_batch * len(self.data))

    def _capture(self, batches: Sequence[Any], store: StoreActivations) -> Captured:
        with self._inference(), experts_implementation(self.skeleton.model, "batched_mm"):
            return capture(self.skeleton, batches, forward, store)

    def _solve(self, state: _State, block: ModelBlock, shard: Path) -> BlockResult:
        """Load, prune and write one block."""
        with self.skeleton.loaded(block.path, self.device) as names:
            with self._inference(), experts_implementation(self.skeleton.model, "eager"):
                result = self._pruned(state, block)
                state.next_block(self.skeleton, block, result.outputs)
            if self.distributed.is_main:
                write_shard(shard, self.skeleton.values(names))
        return result

    def _pruned(self, state: _State, block: ModelBlock) -> BlockResult:
        """Prune a block that is in memory, in place."""
        model = self.skeleton.model
        module, calls = model.get_submodule(block.path), state.calls(block)
        held_out = calls_of(min(len(self.held_out), state.batches - 1), state.batches, len(calls))
        state.targets = dense_targets(self.how, block, module, calls, state.targets, state.store, held_out)
        problem = BlockProblem(
            block,
            module,
            layers_by_weight(model, self.layers[block.path]),
            calls,
            lambda call: call.run(module),
            self.how,
            state.targets,
            state.store,
            self.distributed,
            state.next_solver,
            held_out,
        )
        result = solve_block_(problem)
        state.next_solver = result.next_solver
        return result

    def _replay(self, state: _State, block: ModelBlock, shard: Path) -> None:
        """Run a block that an earlier run has pruned, for the inputs of the next one."""
        module = self.skeleton.model.get_submodule(block.path)
        with self._inference(), experts_implementation(self.skeleton.model, "eager"):
            if self.how.refine is not None or self.held_out:
                with self.skeleton.loaded(block.path, self.device):
                    calls, others = state.calls(block), len(self.held_out)
                    state.targets = dense_targets(self.how, block, module, calls, state.targets, state.store, others)
            with self.skeleton.loaded(block.path, self.device, open_tensors(shard).tensors):
                state.next_block(self.skeleton, block)

    @contextmanager
    def _inference(self) -> Iterator[None]:
        with mode(self.skeleton.model, training=False), uncached(self.skeleton.model), torch.no_grad():
            yield

    def _layers(self, first: Captured) -> dict[str, list[Layer]]:
        """The layers to prune of each block. Errors: RequestError if there is none."""
        layers = {}
        for block in first.blocks:
            with self._inference():
                traced = layers_of(self.skeleton.model, block.path, first.calls(block.path)[0], self.skip)
            layers[block.path] = [
                layer
                for layer, router in traced.items()
                if block.contains(self.skeleton.aliases[layer.entity]) and self.how.prunes(layer, router=router)
            ]
        if not any(layers.values()):
            raise RequestError("there is no layer to prune", "skip=, or the mapping of sparsities, leaves none", "")
        return layers

    def _moments(self, first: Captured, on_disk: bool) -> list[amounts.Peak]:
        """The memory in use while the modules around the blocks run, and while each kind of block is solved."""
        base, stream = amounts.resident() + amounts.BUFFERS, 0 if on_disk else self.stream_bytes
        around = sum(stored.size for stored in self.skeleton.around())
        moments = [amounts.Peak({"process": base, "around the blocks": around, "stream": stream}, on_disk)]
        for path, names in self._kinds_of_blocks().items():
            sizes = {
                "process": base,
                "block": self._solved_bytes(names) if self.device == CPU else self._stored_bytes(names),
                "stream": stream * self.copies,
                "conversion": 2 * self.skeleton.converted(names),
                "constants": first.constants,
                "work": self._work_of(path, first) if self.device == CPU else 0,
            }
            moments.append(amounts.Peak(sizes, on_disk))
        return moments

    def _peak_there(self) -> amounts.Peak | None:
        """Errors: OutOfResources if the accelerator has less memory than the largest block takes."""
        if self.device == CPU:
            return None
        kinds, batch = self._kinds_of_blocks().items(), _bytes(self.first.hidden_states[0])
        moments = [
            amounts.Peak(
                {
                    "block": self._solved_bytes(names),
                    "batches": _BATCHES * batch,
                    "constants": self.first.constants,
                    "work": self._work_of(path, self.first),
                }
            )
            for path, names in kinds
        ]
        peak, free = max(moments, key=lambda moment: moment.bytes), free_memory(self.device)
        if free is not None and peak.bytes > free:
            why = f"one block takes {peak}, and {byte_size(free)} are free"
            todo = "give smaller batches, or a solver that takes less (by_score), or run on the CPU"
            raise OutOfResources(f"the memory of {self.device} is not enough", why, todo)
        return peak

    def _kinds_of_blocks(self) -> dict[str, list[str]]:
        """The first block of each kind, and the names of its stored tensors."""
        kinds: dict[Any, tuple[str, list[str]]] = {}
        for path in self.paths:
            names = self.skeleton.names_in(path)
            kinds.setdefault(tuple(self.skeleton.like[name].shape for name in names), (path, names))
        return dict(kinds.values())

    def _stored_bytes(self, names: Iterable[str]) -> int:
        return sum(_bytes(self.skeleton.like[name]) for name in names)

    def _solved_bytes(self, names: Iterable[str]) -> int:
        """Of the weights of a block, with the copies of them that are held while it is solved."""
        copies = (_TRAINED if self.how.refine is not None else 1) + (_SHRUNK if self.held_out else 0)
        return self._stored_bytes(names) * copies

    def _work_of(self, path: str, first: Captured) -> int:
        if path not in self._works:
            self._works[path] = self._work(path, first.calls(path)[0])
        return self._works[path]

    def _work(self, path: str, call: BlockCall) -> int:
        """The largest memory beyond the weights: a pass with its activations, or a solver and its Gram matrix."""
        hidden_states = call.hidden_states
        module = self.skeleton.model.get_submodule(path)
        passing = self._passing(module, call)
        weights = [(self.skeleton.like[layer.entity], layer) for layer in self.layers[path]]
        chunks = [next(expert_chunks(weight, layer)) for weight, layer in weights]
        shapes = [
            to_matrix(*matrix_of(weight, layer, experts[0])).shape
            for (weight, layer), experts in zip(weights, chunks, strict=True)
        ]
        reads = hidden_states.shape[:-1].numel() * sum(map(sum, shapes)) * hidden_states.element_size()
        grams = (16 * shape[1] ** 2 * len(experts) for shape, experts in zip(shapes, chunks, strict=True))
        solving = max((amounts.solver_bytes(self.how, *shape) for shape in set(shapes)), default=0)
        return int(amounts.MARGIN * max(passing + max(reads, max(grams, default=0)), solving))

    def _passing(self, module: nn.Module, call: BlockCall) -> int:
        """The memory of a pass. Experts get sorted tokens, as one by one: a batched product copies weights for each."""
        measured = partial(amounts.forward_bytes, module, call, trained=self.how.refine is not None)
        with self._inference():
            try:
                with experts_implementation(self.skeleton.model, "grouped_mm"):
                    return measured()
            except RuntimeError:  # torch knows the shapes of a grouped product in bfloat16 alone
                with experts_implementation(self.skeleton.model, "batched_mm"):
                    return measured()


@dataclass
class _State:
    """Passed from block to block: hidden states, targets of the refinement, and the rank that solves next."""

    captured: Captured
    store: StoreActivations
    device: torch.device
    targets: Sequence[Tensor] = ()
    next_solver: int = 0
    hidden_states: Sequence[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.hidden_states = self.captured.hidden_states

    @property
    def batches(self) -> int:
        """The number of batches that were captured."""
        return len(self.captured.hidden_states)

    def calls(self, block: ModelBlock) -> BlockCalls:
        """The calls of the block, after `next_block` for all blocks before it."""
        calls = self.captured.calls(block.path, self.hidden_states)
        return calls if self.device == CPU else BlockCalls(CallsOn(calls.calls, self.device), self.hidden_states)

    def next_block(self, skeleton: Skeleton, block: ModelBlock, outputs: Sequence[Tensor] | None = None) -> None:
        """Compute the inputs of the next block by running `block`, or take its `outputs`; nothing after the last."""
        if block != self.captured.blocks[-1]:
            module = skeleton.model.get_submodule(block.path)
            computed = (tensors(call.run(module))[0] for call in self.calls(block))
            self.hidden_states = self.store(computed) if outputs is None else outputs


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
