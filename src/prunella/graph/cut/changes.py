"""The structural changes of a plan: the kept positions on every axis, and their consequences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from prunella.graph.data import Graph, Ints, placed
from prunella.types import Keep

Cuts = Mapping[str, Mapping[int, Tensor]]
Sizes = Mapping[tuple[str, str], int | tuple[int, ...]]
Dropped = Mapping[str, tuple[str, ...]]
Lists = Mapping[tuple[str, str], tuple[int, ...]]


@dataclass(frozen=True)
class Along:
    """The `number`-th call of `name` in a run, restricted to the positions `kept` on `axis` of its first tensor.

    example: the run in which it is counted, by the number of its example. calls: how many calls of `name` this run has;
    0 in plans of older formats, which do not know it.
    """

    name: str
    number: int
    axis: int
    kept: Tensor
    example: int = 0
    calls: int = 0


@dataclass(frozen=True)
class Renumbered:
    """New index `i` of these inputs, and of the positions on these (output, axis), is the old index `kept[i]`.

    An axis counts from the last, which is -1; plans of older versions count from the first.
    """

    inputs: tuple[int, ...]
    outputs: tuple[tuple[int, int], ...]
    kept: Tensor


@dataclass(frozen=True)
class Changes:
    """All structural changes of a plan.

    cuts: entity -> axis -> kept positions (int64). attributes: (owner, name) -> new value of a size or of tokens.
    along: calls that run along a cut axis. In the masked model these calls see only the kept positions.
    renumbered: inputs and outputs with new indices.
    dropped: container -> names of the removed blocks. lists: (owner, name) -> positions removed from a plain list.
    """

    cuts: Cuts = field(default_factory=dict)
    attributes: Sizes = field(default_factory=dict)
    along: tuple[Along, ...] = ()
    renumbered: tuple[Renumbered, ...] = ()
    dropped: Dropped = field(default_factory=dict)
    lists: Lists = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.cuts or self.attributes or self.dropped)

    def on(self, example: int) -> Changes:
        """The changes with the calls of the run on this example alone."""
        return replace(self, along=tuple(call for call in self.along if call.example == example))


def changes(graph: Graph, keep: Keep) -> Changes:
    """The changes after which only `keep` remains of the model."""
    removed_blocks = dropped(graph, keep)
    return Changes(
        cuts=cuts(graph, keep),
        attributes=attributes(graph, keep),
        along=tuple(_along(graph, keep)),
        renumbered=tuple(_renumbered(graph, keep)),
        dropped=removed_blocks,
        lists=_shortened(graph, removed_blocks),
    )


def dropped(graph: Graph, keep: Keep) -> dict[str, tuple[str, ...]]:
    """Container -> names of its removed blocks."""
    removed: dict[str, tuple[str, ...]] = {}
    for stack in graph.stacks:
        mask = keep.get(stack.name)
        if mask is not None and not bool(mask.all()):
            removed[stack.name] = tuple(stack.paths[k].rpartition(".")[2] for k in (~mask).nonzero().flatten().tolist())
    return removed


def _renumbered(graph: Graph, keep: Keep) -> Iterator[Renumbered]:
    for numbered in graph.numbered:
        mask = keep.get(numbered.group)
        if mask is not None and not bool(mask.all()):
            yield Renumbered(numbered.inputs, numbered.outputs, mask.nonzero().flatten())


def _along(graph: Graph, keep: Keep) -> Iterator[Along]:
    for run in graph.runs:
        mask = keep.get(run.group)
        if mask is not None and not bool(mask.all()):
            kept = (run.unit < 0) | mask.numpy()[run.unit]
            positions = torch.from_numpy(np.flatnonzero(kept))
            yield Along(run.name, run.number, run.axis, positions, run.example, run.calls)


def _shortened(graph: Graph, removed: Mapping[str, tuple[str, ...]]) -> dict[tuple[str, str], tuple[int, ...]]:
    """(owner, name) -> removed positions, for each list with one entry per block."""
    return {
        place: tuple(graph.orders[stack].index(name) for name in names)
        for stack, names in removed.items()
        for place in graph.lists.get(stack, ())
    }


def cuts(graph: Graph, keep: Keep) -> dict[str, dict[int, Tensor]]:
    """Entity -> axis -> kept positions (int64, ascending), for each axis that loses positions."""
    removed: dict[tuple[str, int], list[Ints]] = {}
    for group in graph.groups:
        mask = keep.get(group.name)
        if mask is None or bool(mask.all()):
            continue
        lost = ~mask.numpy()
        for member in group.members:
            removed.setdefault((member.entity, member.axis), []).append(member.index[lost[member.unit]])
    result: dict[str, dict[int, Tensor]] = {}
    for (entity, axis), parts in removed.items():
        kept = np.ones(graph.entities[entity].shape[axis], dtype=bool)
        kept[np.concatenate(parts)] = False
        result.setdefault(entity, {})[axis] = torch.from_numpy(np.flatnonzero(kept))
    return result


def attributes(graph: Graph, keep: Keep) -> dict[tuple[str, str], int | tuple[int, ...]]:
    """(owner, name) -> new value, for each attribute that changes: a size, or a token."""
    return {**_followed(graph, keep), **_sizes(graph, keep), **dict(_tokens(graph, keep))}


def _sizes(graph: Graph, keep: Keep) -> dict[tuple[str, str], int | tuple[int, ...]]:
    """The attributes that operations read and that change; lists as a whole."""
    sizes: dict[tuple[str, str], int | tuple[int, ...]] = {}
    for entry in graph.attributes:
        place, new = (entry.owner, entry.name), entry.new(keep)
        if new != entry.value:
            sizes[place] = placed(sizes.get(place, graph.lists_of_sizes.get(place)), entry.index, new)
    return sizes


def _followed(graph: Graph, keep: Keep) -> dict[tuple[str, str], int | tuple[int, ...]]:
    """The attributes that no operation reads and that equal sizes which all become the same."""
    sizes: dict[tuple[str, str], int | tuple[int, ...]] = {}
    for unread in graph.unread:
        place, new = (unread.owner, unread.name), unread.new(keep)
        if len(new) == 1 and new[0] != unread.value:
            old = sizes.get(place, graph.lists_of_sizes.get(place, unread.value))
            sizes[place] = unread.placed(old, new[0])
    return sizes


def _tokens(graph: Graph, keep: Keep) -> Iterator[tuple[tuple[str, str], int | tuple[int, ...]]]:
    """The attributes that name tokens, with new token ids."""
    group = graph.tokens
    mask = keep.get(group.name) if group else None
    if group is None or mask is None or bool(mask.all()):
        return
    number, tables = mask.cumsum(0) - 1, {m.entity for m in group.members}
    for (owner, name), old in graph.specials.items():
        other = f"{owner}.weight" in graph.entities and f"{owner}.weight" not in tables
        many = old if isinstance(old, tuple) else (old,)
        if not other and all(0 <= k < group.size and bool(mask[k]) for k in many):
            new = tuple(int(number[k]) for k in many)
            yield (owner, name), new if isinstance(old, tuple) else new[0]
