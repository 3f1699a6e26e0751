"""Consecutive convolutions of a program as one step, which has the overhead of one call.

A small convolution takes as long as the Python around it. A chain computes the sizes and layouts of all its layers once
for each shape of the inputs, and checks once a call whether they are still valid.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from prunella.graph.work import is_counting
from prunella.runtime.fx.fuse import SHAPE
from prunella.runtime.kernels import chain as kernel_chain
from prunella.runtime.kernels.chain import ChainStep, Prepared, Ready
from prunella.runtime.kernels.config import Config
from prunella.runtime.kernels.convolution import is_channels_last
from prunella.runtime.layers import PLAIN, SparseConv2d
from prunella.runtime.packed_cache import ChangeTracker

_MOST_PLANS = 16


@dataclass(frozen=True)
class _Plans:
    """The prepared chain for each size of the inputs. version: of the layers' tensors that they were prepared from."""

    version: Any
    prepared: dict[Any, Prepared | None]


@final
class Chain(nn.Module):
    """Runs consecutive convolutions. The layers stay submodules of the model and are arguments of every call.

    The layers run one by one where a gradient is wanted, under autocast, with hooks, for other types than float32, and
    for everything else that the kernels do not support.
    """

    def __init__(self, steps: Sequence[ChainStep], outputs: Sequence[int]) -> None:
        super().__init__()
        self.steps, self.outputs = tuple(steps), tuple(outputs)
        self.plans, self.tracker = _Plans(None, {}), ChangeTracker()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "plans": _Plans(None, {})}  # a copy packs its own weights

    def forward(self, inputs: Sequence[Tensor], layers: Sequence[SparseConv2d]) -> tuple[Tensor, ...]:
        """The results that are read outside the chain."""
        prepared = None if torch.compiler.is_compiling() else self._prepared(inputs, layers)
        results = None if prepared is None else kernel_chain.run(prepared, inputs)
        if results is not None:
            return results
        values: list[Any] = list(inputs)
        for step, layer in zip(self.steps, layers, strict=True):
            values.append(layer(values[step.x], None if step.residual is None else values[step.residual]))
            for place in step.free:
                values[place] = None
        return tuple(values[place] for place in self.outputs)

    def _prepared(self, inputs: Sequence[Tensor], layers: Sequence[SparseConv2d]) -> Prepared | None:
        """The chain for these inputs; None where the layers have to run one by one."""
        with_grad = torch.is_grad_enabled()
        if is_counting() or torch.is_autocast_enabled("cpu") or (with_grad and any(x.requires_grad for x in inputs)):
            return None
        if not all(type(x) in PLAIN and x.dtype is torch.float32 and x.is_cpu and x.dim() == 4 for x in inputs):
            return None
        parts: list[Tensor | None] = []
        for layer in layers:
            if type(layer) is not SparseConv2d or layer._forward_hooks or layer._forward_pre_hooks:
                return None
            tensors = layer.parts()
            if tensors is None:
                return None
            parts += tensors
        if with_grad and any(part is not None and part.requires_grad for part in parts):
            return None
        version = [layer.cache.key for layer in layers], self.tracker.version(parts)
        if version != self.plans.version or len(self.plans.prepared) >= _MOST_PLANS:
            self.plans = _Plans(version, {})
        channels_last = any(map(is_channels_last, inputs))
        layout = torch.channels_last if channels_last else torch.contiguous_format
        if not all(x.is_contiguous(memory_format=layout) for x in inputs):
            return None
        prepared, key = self.plans.prepared, (channels_last, *(x.shape for x in inputs))
        if key not in prepared:
            prepared[key] = self._prepare([x.shape for x in inputs], channels_last, layers)
        return prepared[key]

    def _prepare(
        self, shapes: list[torch.Size], channels_last: bool, layers: Sequence[SparseConv2d]
    ) -> Prepared | None:
        ready, inputs = list[Ready](), len(shapes)
        for step, layer in zip(self.steps, layers, strict=True):
            patches = layer.cache.patches(shapes[step.x], channels_last)
            if patches is None or not isinstance(layer.cache.choice(patches.positions), Config):
                return None
            if step.residual is not None and shapes[step.residual] != patches.out:
                return None
            shapes.append(torch.Size(patches.out))
            packed, bias = layer.packed(patches.positions)
            ready.append(Ready(packed, patches, bias, layer.activation))
        return kernel_chain.prepare(self.steps, ready, inputs, self.outputs)


def chain_(program: GraphModule) -> None:
    """Replace every run of at least two consecutive sparse convolutions by a `Chain`."""
    graph, modules = program.graph, dict(program.named_modules())
    for count, run in enumerate(list(_runs(program, modules))):
        steps, inputs, outputs = _wired(run)
        with graph.inserting_before(run[0]):
            layers = tuple(graph.get_attr(str(node.target)) for node in run)
        name = f"chain_{count}"
        while hasattr(program, name):
            name += "_"
        program.add_submodule(name, Chain(steps, [len(inputs) + run.index(node) for node in outputs]))
        with graph.inserting_after(run[-1]):
            chain = graph.call_module(name, (tuple(inputs), layers))
        with graph.inserting_after(chain):
            for place, node in enumerate(outputs):
                result = graph.call_function(operator.getitem, (chain, place))
                result.meta[SHAPE] = node.meta.get(SHAPE)
                node.replace_all_uses_with(result, delete_user_cb=lambda user, run=run: user not in run)  # type: ignore[misc]
        for node in reversed(run):
            graph.erase_node(node)
    graph.lint()
    program.recompile()


def _runs(program: GraphModule, modules: dict[str, nn.Module]) -> Iterator[list[Node]]:
    run: list[Node] = []
    for node in program.graph.nodes:
        layer = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(layer, SparseConv2d) and not node.kwargs and all(isinstance(arg, Node) for arg in node.args):
            run.append(node)
            continue
        if len(run) > 1:
            yield run
        run = []


def _wired(run: Sequence[Node]) -> tuple[list[ChainStep], list[Node], list[Node]]:
    """The steps of a run, the nodes that it reads from outside, and those of its nodes that are read outside."""
    inputs = list(dict.fromkeys(arg for node in run for arg in node.all_input_nodes if arg not in run))
    outputs = [node for node in run if any(user not in run for user in node.users)]
    place = {node: number for number, node in enumerate([*inputs, *run])}
    last_reader = {place[arg]: number for number, node in enumerate(run) for arg in node.all_input_nodes}
    returned = {place[node] for node in outputs}
    steps = []
    for number, node in enumerate(run):
        residual = place[node.args[1]] if len(node.args) > 1 else None  # type: ignore[index]
        free = tuple(sorted(p for p, last in last_reader.items() if last == number and p not in returned))
        steps.append(ChainStep(place[node.args[0]], residual, free))  # type: ignore[index]
    return steps, inputs, outputs
