"""Convolutions that follow each other in a program, in one step: what a call costs beside its kernel is paid once.

A small convolution takes as long as the Python around it. Here the sizes and layouts of all of them are found once for
each shape of the inputs, and whether they still hold is asked once a call.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from prunella.runtime.kernels import chain as together
from prunella.runtime.kernels.chain import Prepared, Ready, Step
from prunella.runtime.kernels.convolution import is_last
from prunella.runtime.kernels.library import Config
from prunella.runtime.layers import PLAIN, SparseConv2d
from prunella.runtime.packed_cache import Watch

_MOST_PLANS = 16


@dataclass(frozen=True)
class _Plans:
    """What was found for each size of the inputs, and what tells that no layer has changed since."""

    stamp: Any
    made: dict[Any, Prepared | None]


@final
class Chain(nn.Module):
    """Runs convolutions one after another. They stay where they are in the model, and come along with every call.

    Gradients, autocast, hooks, other types and whatever a kernel does not do are left to the layers themselves.
    """

    def __init__(self, steps: Sequence[Step], outputs: Sequence[int]) -> None:
        super().__init__()
        self.steps, self.outputs = tuple(steps), tuple(outputs)
        self.plans, self.watch = _Plans(None, {}), Watch()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "plans": _Plans(None, {})}  # a copy makes its own layouts

    def forward(self, inputs: Sequence[Tensor], layers: Sequence[SparseConv2d]) -> tuple[Tensor, ...]:
        """What those layers give whose results are read elsewhere."""
        plan = None if torch.compiler.is_compiling() else self._plan(inputs, layers)
        found = None if plan is None else together.run(plan, inputs)
        if found is not None:
            return found
        values: list[Any] = list(inputs)
        for step, layer in zip(self.steps, layers, strict=True):
            values.append(layer(values[step.x], None if step.residual is None else values[step.residual]))
            for place in step.free:
                values[place] = None
        return tuple(values[place] for place in self.outputs)

    def _plan(self, inputs: Sequence[Tensor], layers: Sequence[SparseConv2d]) -> Prepared | None:
        wanted = torch.is_grad_enabled()
        if torch.is_autocast_enabled("cpu") or (wanted and any(x.requires_grad for x in inputs)):
            return None
        if not all(type(x) in PLAIN and x.dtype is torch.float32 and x.is_cpu and x.dim() == 4 for x in inputs):
            return None
        parts: list[Tensor | None] = []
        for layer in layers:
            if type(layer) is not SparseConv2d or layer._forward_hooks or layer._forward_pre_hooks:
                return None
            some = layer.parts()
            if some is None:
                return None
            parts += some
        if wanted and any(part is not None and part.requires_grad for part in parts):
            return None
        stamp = [layer.store.key for layer in layers], self.watch.stamp(parts)
        if stamp != self.plans.stamp or len(self.plans.made) >= _MOST_PLANS:
            self.plans = _Plans(stamp, {})
        last = any(map(is_last, inputs))
        layout = torch.channels_last if last else torch.contiguous_format
        if not all(x.is_contiguous(memory_format=layout) for x in inputs):
            return None
        made, key = self.plans.made, (last, *(x.shape for x in inputs))
        if key not in made:
            made[key] = self._made([x.shape for x in inputs], last, layers)
        return made[key]

    def _made(self, shapes: list[torch.Size], last: bool, layers: Sequence[SparseConv2d]) -> Prepared | None:
        found, inputs = list[Ready](), len(shapes)
        for step, layer in zip(self.steps, layers, strict=True):
            patches = layer.store.patches(shapes[step.x], last)
            if patches is None or not isinstance(layer.store.choice(patches.positions), Config):
                return None
            if step.residual is not None and shapes[step.residual] != patches.out:
                return None
            shapes.append(torch.Size(patches.out))
            packed, bias = layer.held(patches.positions)
            found.append(Ready(packed, patches, bias, layer.activation))
        return together.prepared(self.steps, found, inputs, self.outputs)


def chain_(program: GraphModule) -> None:
    """Put a `Chain` in place of every run of at least two of these layers that follow each other in the program."""
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
            made = graph.call_module(name, (tuple(inputs), layers))
        with graph.inserting_after(made):
            for place, node in enumerate(outputs):
                one = graph.call_function(operator.getitem, (made, place))
                one.meta["shape"] = node.meta.get("shape")
                node.replace_all_uses_with(one, delete_user_cb=lambda user, run=run: user not in run)  # type: ignore[misc]
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


def _wired(run: Sequence[Node]) -> tuple[list[Step], list[Node], list[Node]]:
    """What each layer of a run reads, what the run reads, and what is read of it."""
    inputs = list(dict.fromkeys(arg for node in run for arg in node.all_input_nodes if arg not in run))
    outputs = [node for node in run if any(user not in run for user in node.users)]
    place = {node: number for number, node in enumerate([*inputs, *run])}
    ends = {place[arg]: number for number, node in enumerate(run) for arg in node.all_input_nodes}
    kept = {place[node] for node in outputs}
    steps = []
    for number, node in enumerate(run):
        residual = place[node.args[1]] if len(node.args) > 1 else None  # type: ignore[index]
        free = tuple(sorted(p for p, last in ends.items() if last == number and p not in kept))
        steps.append(Step(place[node.args[0]], residual, free))  # type: ignore[index]
    return steps, inputs, outputs
