"""Match the patterns of `skip` and `only` with groups and layers."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from prunella.errors import RequestError
from prunella.graph.data import Graph, Group, Layer


def names_of_group(graph: Graph, group: Group) -> set[str]:
    """Names of a group for patterns: its own, and the parameters and modules that produce or normalize its units.

    Readers are not included: `skip=["fc"]` keeps the outputs of `fc`, not the channels before `fc`.
    """
    entities = [member.entity for member in group.members if member.role != "in"]
    return {group.name} | {name for entity in entities for name in _ancestry(graph, entity)}


def spared_blocks(graph: Graph, skip: Sequence[str], only: Sequence[str]) -> dict[str, str]:
    """Path -> reason, for every excluded block. A pattern matches the path of a block or a module around the block."""
    reasons = {path: chosen(parts(path), skip, only) for stack in graph.stacks for path in stack.paths}
    return {path: reason for path, reason in reasons.items() if reason}


def names_of_layer(graph: Graph, layer: Layer) -> set[str]:
    """Names of a layer for patterns: its own, its module and the modules around it."""
    return {layer.name, layer.module, *_ancestry(graph, layer.entity)} - {""}


def chosen(names: Iterable[str], skip: Sequence[str], only: Sequence[str]) -> str:
    """Why something with these names may not be pruned; empty if it may."""
    known = tuple(names)
    if only and not any(matches(pattern, known) for pattern in only):
        return "excluded by only="
    spared = next((pattern for pattern in skip if matches(pattern, known)), None)
    return "" if spared is None else f"skip={spared!r}"


def rank_of(graph: Graph, group: Group) -> str:
    """Why units that are the rank of an adapter are kept: only= has to name them. Empty for other units.

    An adapter is a product of two trained weights, `(out, r)` by `(r, in)`, next to a frozen weight `(out, in)`. Its
    rank is a choice of the training, and a lower rank saves almost nothing after the merge of the adapter.
    """
    layers = {layer.entity: layer for layer in graph.layers}
    producers, readers = ([layers.get(m.entity) for m in group.members if m.role == role] for role in ("out", "in"))
    if (
        len(group.members) != 2
        or len(producers) != 1
        or len(readers) != 1
        or producers[0] is None
        or readers[0] is None
    ):
        return ""
    if not all(graph.entities[x.entity].trainable for x in (producers[0], readers[0])):
        return ""
    size = _size(graph, readers[0])[0], _size(graph, producers[0])[1]
    if not any(_size(graph, x) == size and not graph.entities[x.entity].trainable for x in graph.layers):
        return ""
    return "it is the rank of an adapter of a frozen weight, pruned only if only= names it"


def _size(graph: Graph, layer: Layer) -> tuple[int, int]:
    shape = graph.entities[layer.entity].shape
    return shape[layer.out_axis], shape[layer.in_axis]


def check_patterns(graph: Graph, skip: Sequence[str], only: Sequence[str]) -> None:
    """Errors: RequestError for a pattern without a match in the model, with the nearest names."""
    known = {name for entity in graph.entities for name in _ancestry(graph, entity)}
    known |= {group.name for group in graph.groups} | {layer.name for layer in graph.layers}
    check_known(known, skip, only)


def check_known(known: set[str], skip: Sequence[str], only: Sequence[str]) -> None:
    """Errors: RequestError for a pattern without a match among these names."""
    for option, patterns in (("skip", skip), ("only", only)):
        if isinstance(patterns, str):
            raise RequestError(
                f"{option}= is a single string", "a list of patterns is needed", f"{option}=[{patterns!r}]"
            )
        for pattern in patterns:
            if not matches(pattern, known):
                near = difflib.get_close_matches(pattern, sorted(known), 3, 0.4)
                why = f"near: {', '.join(near)}" if near else f"names are like {', '.join(sorted(known)[:3])}"
                todo = "`*` matches anything; the name of a module matches everything inside it"
                raise RequestError(f"the pattern {option}={pattern!r} matches nothing", why, todo)


def _ancestry(graph: Graph, entity: str) -> set[str]:
    """A parameter's names and the modules around it: `a.b.weight`, `a.b`, `a`."""
    ancestry = set()
    for name in graph.entities[entity].names or (entity,):
        ancestry |= parts(name)
    return ancestry


def parts(name: str) -> set[str]:
    """A dotted name and the modules around it."""
    steps = name.split(".")
    return {".".join(steps[:end]) for end in range(1, len(steps) + 1)}


def matches(pattern: str, names: Iterable[str]) -> bool:
    """Whether a pattern (`fnmatch`) matches one of these names."""
    return any(fnmatchcase(name, pattern) for name in names)


def spared(graph: Graph, group: Group, skip: Sequence[str], only: Sequence[str]) -> str:
    """Why a group is excluded, empty if it is not: the rules of `prunella.plan`."""
    reason = chosen(names_of_group(graph, group), skip, only) or ("" if only else rank_of(graph, group))
    return reason or ("all of its units are needed" if group.size <= group.min_units else "")
