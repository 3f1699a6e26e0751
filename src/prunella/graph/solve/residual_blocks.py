"""Residual blocks, identified by the data flow: modules of a list whose output is their input plus something.

A block may be removed if it runs once per pass, if its first output is its first input in the same shape and type
through sums and norms, and if no other tensor of the block is read outside. The blocks of one list are the units of a
group, a *stack*. Of nested blocks the outermost count, unless the outer list has only one block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch import nn

from prunella.graph.data import Entity, Frozen, Graph, Group, Layer, Member, Place, ReasonKind, Role
from prunella.graph.trace.dataflow import Flow, ModuleCall


def add_stacks(graph: Graph, model: nn.Module, flow: Flow) -> Graph:
    """The graph with its stacks, its frozen blocks, and the blocks of every parameter and cost."""
    calls: dict[str, list[ModuleCall]] = {}
    for call in flow.calls:
        calls.setdefault(call.path, []).append(call)
    residual: dict[str, list[str]] = {}
    reasons: dict[str, str] = {}
    for path, parent in _elements(model):
        runs = calls.get(path, [])
        if runs and flow.residual(runs[0]):
            residual.setdefault(parent, []).append(path)
            reasons[path] = _reason(model, path, runs)
    chosen = _outermost(residual)
    removable = {parent: [path for path in paths if not reasons[path]] for parent, paths in chosen.items()}
    stacks = tuple(_stack(graph, parent, paths) for parent, paths in removable.items() if paths)
    named = [path for paths in chosen.values() for path in paths if reasons[path]]
    rooted = tuple(Frozen(path, -1, 1, reasons[path], "") for path in named)
    orders = {stack.name: tuple(model.get_submodule(stack.name)._modules) for stack in stacks}
    return replace(with_stacks(graph, stacks, rooted), orders=orders)


def with_stacks(graph: Graph, stacks: Sequence[Group], rooted: tuple[Frozen, ...]) -> Graph:
    """The graph with these stacks; parameters and costs inside a block belong to the block."""
    units = [(path, (stack.name, k)) for stack in stacks for k, path in enumerate(stack.paths)]
    homes = {name: _homes(entity.names, units) for name, entity in graph.entities.items()}
    costs = tuple(replace(cost, home=_homes((cost.module,), units)) for cost in graph.costs)
    return replace(
        graph,
        stacks=tuple(stacks),
        rooted=rooted,
        homes={name: places for name, places in homes.items() if places},
        costs=costs,
    )


def narrow(graph: Graph, spared: Mapping[str, str]) -> Graph:
    """The graph without the blocks `spared` (path -> reason why the block is kept)."""
    stacks = []
    for stack in graph.stacks:
        removable = np.array([path not in spared for path in stack.paths])
        if removable.any():
            stacks.append(stack if removable.all() else _subset(stack, removable))
    rooted = tuple(Frozen(path, -1, 1, reason, "", ReasonKind.REQUEST) for path, reason in spared.items())
    return with_stacks(graph, stacks, graph.rooted + rooted) if spared else graph


def inside(name: str, path: str) -> bool:
    """Whether a name is `path` or inside `path`."""
    return name == path or name.startswith(path + ".")


def _elements(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Path of every element of a list or sequence, and path of its container, outermost first."""
    for path, module in model.named_modules():
        if path and isinstance(module, nn.ModuleList | nn.Sequential):
            yield from ((f"{path}.{name}", path) for name in module._modules)


def _reason(model: nn.Module, path: str, runs: list[ModuleCall]) -> str:
    """Why a residual block must be kept; empty if it may be removed."""
    block = model.get_submodule(path)
    if len(runs) > 1:
        return f"the block runs {len(runs)} times in one pass, always with the same weights"
    if runs[0].escaped:
        return "a tensor of the block other than its output is read outside the block"
    if not any(p.dim() for p in block.parameters()):
        return "the block has no parameters"
    places = sum(module is block for _, module in model.named_modules(remove_duplicate=False))
    return "the block occurs in the model more than once" if places > 1 else ""


def _outermost(residual: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Containers by depth. A container inside a block of another counts only if the other has a single block."""
    chosen: dict[str, list[str]] = {}
    for parent in sorted(residual, key=lambda name: name.count(".")):
        around = [p for p in chosen if any(inside(parent, path) for path in chosen[p])]
        if around and len(chosen[around[0]]) > 1:
            continue
        if around and len(residual[parent]) > 1:
            del chosen[around[0]]
        if not around or around[0] not in chosen:
            chosen[parent] = residual[parent]
    return {parent: chosen[parent] for parent in residual if parent in chosen}


def _stack(graph: Graph, parent: str, paths: list[str]) -> Group:
    layers = {layer.entity: layer for layer in graph.layers}
    biases = {layer.bias for layer in graph.layers}
    members = []
    for unit, path in enumerate(paths):
        own = [e for e in graph.entities.values() if e.parameter and e.shape and all(inside(n, path) for n in e.names)]
        members += [_member(e, unit, layers.get(e.name), e.name in biases) for e in own]
    return Group(parent, len(paths), "block", tuple(members), paths=tuple(paths))


def _member(entity: Entity, unit: int, layer: Layer | None, bias: bool) -> Member:
    axis = layer.out_axis if layer else 0
    role: Role = "out" if layer else "bias" if bias else "other"
    index = np.arange(entity.shape[axis], dtype=np.int64)
    return Member(entity.name, axis, index, np.full(len(index), unit, dtype=np.int64), role)


def _subset(stack: Group, kept: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]) -> Group:
    number = np.cumsum(kept) - 1
    members = tuple(
        replace(m, unit=number[m.unit].astype(np.int64)) for m in stack.members if len(m.unit) and kept[m.unit[0]]
    )
    paths = tuple(path for path, stay in zip(stack.paths, kept, strict=True) if stay)
    return replace(stack, size=len(paths), members=members, paths=paths)


def _homes(names: Iterable[str], units: Sequence[tuple[str, Place]]) -> tuple[Place, ...]:
    """The blocks that contain the names; empty if a name is outside all blocks."""
    places = []
    for name in names:
        place = next((place for path, place in units if inside(name, path)), None)
        if place is None:
            return ()
        places.append(place)
    return tuple(dict.fromkeys(places))
