"""Residual blocks: modules of a list whose output is their input with something added. Found from the data flow.

A block may go if it runs once in a pass, gives its first tensor input back in the same shape and type through sums
and norms, and nothing else that it computes is read outside. The blocks of one list are the units of a group, a
*stack*. Of nested ones the outermost count, unless the outer list has but one of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch import nn

from prunella.graph.data import Entity, Frozen, Graph, Group, Layer, Member, Place, ReasonKind, Role
from prunella.graph.trace.dataflow import Flow, ModuleCall


def add_stacks(graph: Graph, model: nn.Module, flow: Flow) -> Graph:
    """The graph with its stacks, the blocks that must stay, and where every parameter and cost lives."""
    calls: dict[str, list[ModuleCall]] = {}
    for call in flow.calls:
        calls.setdefault(call.path, []).append(call)
    found: dict[str, list[str]] = {}
    reasons: dict[str, str] = {}
    for path, parent in _elements(model):
        runs = calls.get(path, [])
        if runs and flow.residual(runs[0]):
            found.setdefault(parent, []).append(path)
            reasons[path] = _reason(model, path, runs)
    chosen = _outermost(found)
    free = {parent: [path for path in paths if not reasons[path]] for parent, paths in chosen.items()}
    stacks = tuple(_stack(graph, parent, paths) for parent, paths in free.items() if paths)
    named = [path for paths in chosen.values() for path in paths if reasons[path]]
    rooted = tuple(Frozen(path, -1, 1, reasons[path], "") for path in named)
    orders = {stack.name: tuple(model.get_submodule(stack.name)._modules) for stack in stacks}
    return replace(with_stacks(graph, stacks, rooted), orders=orders)


def with_stacks(graph: Graph, stacks: Sequence[Group], rooted: tuple[Frozen, ...]) -> Graph:
    """The graph with these stacks, everything that lives in a block counted as its own."""
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
    """The graph without the blocks at the paths `spared`, each with the reason why it stays."""
    stacks = []
    for stack in graph.stacks:
        stays = np.array([path not in spared for path in stack.paths])
        if stays.any():
            stacks.append(stack if stays.all() else _some(stack, stays))
    rooted = tuple(Frozen(path, -1, 1, reason, "", ReasonKind.REQUEST) for path, reason in spared.items())
    return with_stacks(graph, stacks, graph.rooted + rooted) if spared else graph


def inside(name: str, path: str) -> bool:
    """Whether a name is that of `path` or of something in it."""
    return name == path or name.startswith(path + ".")


def _elements(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Path of every element of a list or sequence, and the path of the container, from outside in."""
    for path, module in model.named_modules():
        if path and isinstance(module, nn.ModuleList | nn.Sequential):
            yield from ((f"{path}.{name}", path) for name in module._modules)


def _reason(model: nn.Module, path: str, runs: list[ModuleCall]) -> str:
    """Why a residual block must stay, empty if it may go."""
    block = model.get_submodule(path)
    if len(runs) > 1:
        return f"the block runs {len(runs)} times in one pass, always with the same weights"
    if runs[0].escaped:
        return "the block computes something beside its output that is read elsewhere"
    if not any(p.dim() for p in block.parameters()):
        return "the block has no parameters"
    twins = sum(module is block for _, module in model.named_modules(remove_duplicate=False))
    return "the block stands in the model more than once" if twins > 1 else ""


def _outermost(found: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Containers by depth; one within a block of another counts only if the other has a single block."""
    chosen: dict[str, list[str]] = {}
    for parent in sorted(found, key=lambda name: name.count(".")):
        around = [p for p in chosen if any(inside(parent, path) for path in chosen[p])]
        if around and len(chosen[around[0]]) > 1:
            continue
        if around and len(found[parent]) > 1:
            del chosen[around[0]]
        if not around or around[0] not in chosen:
            chosen[parent] = found[parent]
    return {parent: chosen[parent] for parent in found if parent in chosen}


def _stack(graph: Graph, parent: str, paths: list[str]) -> Group:
    layers = {layer.entity: layer for layer in graph.layers}
    biases = {layer.bias for layer in graph.layers}
    members = []
    for unit, path in enumerate(paths):
        mine = [e for e in graph.entities.values() if e.parameter and e.shape and all(inside(n, path) for n in e.names)]
        members += [_member(e, unit, layers.get(e.name), e.name in biases) for e in mine]
    return Group(parent, len(paths), "block", tuple(members), paths=tuple(paths))


def _member(entity: Entity, unit: int, layer: Layer | None, bias: bool) -> Member:
    axis = layer.out_axis if layer else 0
    role: Role = "out" if layer else "bias" if bias else "other"
    index = np.arange(entity.shape[axis], dtype=np.int64)
    return Member(entity.name, axis, index, np.full(len(index), unit, dtype=np.int64), role)


def _some(stack: Group, stays: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]) -> Group:
    number = np.cumsum(stays) - 1
    members = tuple(
        replace(m, unit=number[m.unit].astype(np.int64)) for m in stack.members if len(m.unit) and stays[m.unit[0]]
    )
    paths = tuple(path for path, stay in zip(stack.paths, stays, strict=True) if stay)
    return replace(stack, size=len(paths), members=members, paths=paths)


def _homes(names: Iterable[str], units: Sequence[tuple[str, Place]]) -> tuple[Place, ...]:
    """The blocks that hold all the names between them; empty if one name is outside all blocks."""
    places = []
    for name in names:
        place = next((place for path, place in units if inside(name, path)), None)
        if place is None:
            return ()
        places.append(place)
    return tuple(dict.fromkeys(places))
