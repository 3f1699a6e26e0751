"""What a run takes in several processes, from a configuration alone: memory, bytes and time for each number."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from prunella.errors import RequestError
from prunella.granularity import Element
from prunella.graph.data import Layer
from prunella.graph.matrix import to_matrix
from prunella.llm.blocks import BlockCall
from prunella.llm.calibration import AUTO, Calibration, Sources, Split, as_calibration, split
from prunella.llm.distributed import SINGLE_PROCESS
from prunella.llm.experts import expert_chunks, matrix_of
from prunella.llm.recipe import OneShot
from prunella.llm.streaming.capture import constants_on_meta
from prunella.llm.streaming.memory import Peak, parse_bytes
from prunella.llm.streaming.runner import StreamingRun
from prunella.llm.streaming.skeleton import Skeleton
from prunella.llm.streaming.texts import placeholder
from prunella.measure.clock import now, since
from prunella.measure.text import byte_size, duration, table
from prunella.model.batches import listed
from prunella.model.device import CPU, synchronize
from prunella.model.hooks import removed_after

RANKS = (1, 2, 4, 8, 16, 32, 64)
_TRIAL = 512
"""The side of the products and of the layer by which costs are measured."""
_SOLUTION = 5
"""Bytes of a solved weight that is sent: float32, and its mask."""


@dataclass(frozen=True)
class UnitCosts:
    """Seconds of one multiply-add of a product, and of one unit `rows columns^2 + columns^3` of a solver.

    read: bytes a second from the disk of one process. network: those that one process sends. Both are assumed.
    """

    multiply: float
    solve: float
    read: float = 1e9
    network: float = 1e9

    @classmethod
    def measured(cls, how: OneShot, device: torch.device | str = CPU) -> UnitCosts:
        """The costs on a device of this machine, with its present threads."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(2 * _TRIAL, _TRIAL, generator=generator, device="cpu").to(device)
        gram, weight = x.T @ x, x[:_TRIAL]

        def multiply() -> None:
            for _ in range(3):
                x.T @ x

        def solve() -> None:
            how.method(weight, gram, Element(), sparsity=0.5)

        products, solving = (_seconds(work, device) for work in (multiply, solve))
        return cls(products / 3 / (2 * _TRIAL**3), solving / (2 * _TRIAL**3))


def _seconds(work: Callable[[], None], device: torch.device | str) -> float:
    """Of work, after one call on an accelerator, which loads its code at the first one."""
    if torch.device(device) != CPU:
        work()
        synchronize(device)
    start = now()
    work()
    synchronize(device)
    return since(start)


@dataclass(frozen=True)
class InputGroup:
    """Matrices that are solved from one reading of the data. shapes: `(out, in)` of each; grams: columns of each Gram
    matrix; share: the fraction of the tokens that one matrix sees.
    """

    shapes: tuple[tuple[int, int], ...]
    grams: tuple[int, ...]
    share: float = 1.0

    @property
    def reduced(self) -> int:
        """Bytes that are summed over the processes: Gram matrices in float64, and numbers of tokens."""
        return sum(8 * columns * columns for columns in self.grams) + 8 * len(self.grams)

    @property
    def sent(self) -> int:
        """Bytes of the solutions that one process sends to all others."""
        return sum(_SOLUTION * rows * columns + 16 for rows, columns in self.shapes)

    def solving(self, processes: int, costs: UnitCosts) -> float:
        """Seconds until all are solved: matrices are whole, so that more processes than matrices do not help."""
        rounds = -(-len(self.shapes) // processes)
        return rounds * max(costs.solve * (rows * cols**2 + cols**3) for rows, cols in self.shapes)


@dataclass(frozen=True)
class RankForecast:
    """One process of several. read: bytes from its disk. written: by the first one. reduced, sent: payloads of all sums
    and broadcasts. moved: bytes that this process sends for them, in a ring.
    """

    processes: int
    peak: Peak
    read: int
    written: int
    reduced: int
    sent: int
    seconds: float

    @property
    def moved(self) -> int:
        """Of a ring: a sum passes each process twice, a broadcast once."""
        share = (self.processes - 1) / self.processes
        return round(share * (2 * self.reduced + self.sent))


@dataclass(frozen=True)
class Scaling:
    """The forecast of a model for several numbers of processes. limits: what stops it from scaling, in sentences."""

    blocks: int
    layers: int
    weights: int
    size: int
    rows: tuple[RankForecast, ...]
    costs: UnitCosts
    limits: tuple[str, ...]

    def __str__(self) -> str:
        head = ("processes", "memory each", "read each", "moved each", "time")
        rows = [
            (
                str(row.processes), byte_size(row.peak.bytes), byte_size(row.read), byte_size(row.moved),
                duration(row.seconds),
            )
            for row in self.rows
        ]  # fmt: skip
        first = f"{self.blocks} blocks, {self.layers} layers, {self.weights:,} weights in them, {byte_size(self.size)}"
        how = (
            f"time by a product of {1 / self.costs.multiply / 1e9:.3g} billion multiply-adds a second and the solver, "
            f"both measured here, and {byte_size(self.costs.read)} a second of disk and of network, which is assumed"
        )
        return "\n".join([first, table(head, rows, right=range(5)), how, *self.limits])


def forecast_scaling(
    source: str | Path,
    how: OneShot,
    *,
    data: Iterable[Any] | Calibration | Sources | Split = AUTO,
    memory: str | int | None = None,
    skip: Sequence[str] = (),
    ranks: Sequence[int] = RANKS,
    costs: UnitCosts | None = None,
    device: torch.device | str = CPU,
) -> Scaling:
    """Memory, bytes and time of `solve_folder` under torchrun, for each number of processes; nothing is written.

    source: a folder with a `config.json`; weights are not needed. Numbers above that of the batches are left out.
    device: where the costs are measured.
    Errors: those of `solve_folder`; RequestError if a process of the last number would take more than `memory`.
    """
    source, parts = Path(source), split(data)
    drawn = as_calibration(parts.data)
    samples: list[Any] = (
        listed(cast(Iterable[Any], parts.data)) if drawn is None else list(placeholder(drawn, source).batches)
    )
    skeleton = Skeleton(source, None)
    run = StreamingRun(source, how, samples, SINGLE_PROCESS, budget=None, skip=skip, skeleton=skeleton)
    groups = {path: input_groups(run, path) for path in run.paths}
    costs = costs or UnitCosts.measured(how, device)
    possible = [count for count in ranks if count <= len(samples)]
    rows = tuple(_row(run.for_processes(count), groups, costs) for count in possible)
    if memory is not None and rows and rows[-1].peak.bytes > parse_bytes(memory):
        what = f"{byte_size(parse_bytes(memory))} of memory are not enough"
        raise RequestError(what, f"one of {possible[-1]} processes takes {rows[-1].peak}", "give more, or fewer tokens")
    layers = [layer for some in run.layers.values() for layer in some]
    weights = sum(skeleton.like[layer.entity].numel() for layer in layers)
    size = sum(stored.size for stored in skeleton.stored.values())
    limits = tuple(_limits(run, groups, len(samples), max(ranks)))
    return Scaling(len(run.paths), len(layers), weights, size, rows, costs, limits)


def _row(run: StreamingRun, groups: Mapping[str, Sequence[InputGroup]], costs: UnitCosts) -> RankForecast:
    count = run.distributed.world_size
    size = sum(stored.size for stored in run.skeleton.stored.values())
    blocks = sum(run.skeleton.like[n].numel() * run.skeleton.like[n].element_size() for n in _inside(run))
    read = blocks + 2 * sum(stored.size for stored in run.skeleton.around())  # to check the run, and to begin it
    flat = [group for some in groups.values() for group in some]
    reduced = sum(group.reduced for group in flat) + 16 * len(groups) if count > 1 else 0
    sent = sum(group.sent for group in flat) if count > 1 else 0
    row = RankForecast(count, run.peak, read, size, reduced, sent, 0.0)
    tokens = run.tokens / count
    seconds = sum(group.solving(count, costs) for group in flat) + read / costs.read + row.moved / costs.network
    for some in groups.values():
        macs = sum(group.share * rows * columns for group in some for rows, columns in group.shapes)
        # A pass for the inputs of each group ends at its layers: half of the block. One more gives the next inputs.
        seconds += costs.multiply * tokens * macs * (len(some) / 2 + 1)
        seconds += costs.multiply * tokens * sum(g.share * columns**2 for g in some for columns in g.grams)
    return replace(row, seconds=seconds)


def _inside(run: StreamingRun) -> list[str]:
    return [name for path in run.paths for name in run.skeleton.names_in(path)]


def input_groups(run: StreamingRun, path: str) -> list[InputGroup]:
    """The layers of a block in the order of their first call, those with the same input together.

    A pass on the meta device shows which modules get the same tensor. Experts of one weight are read together.
    """
    skeleton, call = run.skeleton, run.first.calls(path)[0]
    layers = {layer.entity: layer for layer in run.layers[path]}
    inputs = _called(skeleton.model, path, call, layers)
    groups: list[InputGroup] = []
    last: object = None
    for entity in sorted(layers, key=lambda entity: inputs.get(entity, (len(inputs), None))[0]):
        layer, weight, key = layers[entity], skeleton.like[entity], inputs.get(entity, (0, None))[1]
        chunks = list(expert_chunks(weight, layer))
        parts = [part for chunk in chunks for part in chunk]
        shapes = tuple(_shape(weight, layer, part) for part in parts)
        if key is not None and key == last and len(parts) == 1:
            groups[-1] = InputGroup((*groups[-1].shapes, *shapes), groups[-1].grams)
        elif len(parts) == 1:
            groups.append(InputGroup(shapes, (shapes[0][1],)))
        else:
            share = _routed(skeleton.model, len(parts))
            groups += [InputGroup(shapes, tuple(columns for _, columns in shapes), share)]
        last = key if len(parts) == 1 else None
    return groups


def _shape(weight: Tensor, layer: Layer, part: Any) -> tuple[int, int]:
    rows, columns = to_matrix(*matrix_of(weight, layer, part)).shape
    return rows, columns


def _called(model: nn.Module, path: str, call: BlockCall, layers: Mapping[str, Layer]) -> dict[str, tuple[int, object]]:
    """Entity -> its place in the order of calls, and a key that is the same for modules with the same input."""
    seen: dict[str, tuple[int, object]] = {}
    kept: list[Tensor] = []

    def note(entity: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        if entity not in seen and args and isinstance(args[0], Tensor):
            kept.append(args[0])  # alive, so that no storage has the address of an earlier one
            seen[entity] = len(seen), (args[0].untyped_storage()._cdata, tuple(args[0].shape))

    modules = {entity: model.get_submodule(entity.rpartition(".")[0]) for entity in layers}
    handles = [module.register_forward_pre_hook(partial(note, entity)) for entity, module in modules.items()]
    there = pytree.tree_map_only(Tensor, lambda t: t.to("meta"), (list(call.args), call.kwargs))
    block = model.get_submodule(path)
    with removed_after(handles), constants_on_meta(block), torch.no_grad(), suppress(RuntimeError, NotImplementedError):
        block(*there[0], **there[1])
    return seen


def _routed(model: nn.Module, experts: int) -> float:
    """The fraction of the tokens that one expert sees, if they are spread evenly."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    chosen = getattr(config, "num_experts_per_tok", None)
    return min(1.0, chosen / experts) if isinstance(chosen, int) and experts else 1.0


def _limits(run: StreamingRun, groups: Mapping[str, Sequence[InputGroup]], batches: int, ranks: int) -> list[str]:
    """What stops the run from taking less time or memory in more processes."""
    flat = [group for some in groups.values() for group in some]
    widest = max(columns for group in flat for columns in group.grams)
    most = max(len(group.shapes) for group in flat)
    said = [
        f"every process reads every block, and holds one with the Gram matrix of its widest layer: {widest} columns, "
        f"{byte_size(8 * widest**2)} in float64",
        f"the solver runs on at most {most} processes at once: one matrix is solved by one process, and no more than "
        f"{most} share an input",
    ]
    thin = [(run.tokens * group.share, group.grams[0]) for group in flat if group.share < 1]
    for tokens, columns in sorted(thin)[:1]:
        if tokens < 2 * columns:
            said.append(f"an expert sees about {tokens:.0f} tokens for {columns} columns: give more windows of text")
    if batches < ranks:
        said.append(f"there are {batches} batches: no more processes than that can be used")
    return said
