"""Which groups and layers the patterns of `skip` and `only` mean."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from prunella.errors import RequestError
from prunella.graph.data import Graph, Group, Layer


def names_of_group(graph: Graph, group: Group) -> set[str]:
    """Names by which a group can be meant: its own, and the parameters and modules that produce or normalize its units.

    Not those that only read them: `skip=["fc"]` spares the outputs of `fc`, not the channels in front of it.
    """
    entities = [member.entity for member in group.members if member.role != "in"]
    return {group.name} | {name for entity in entities for name in _ancestry(graph, entity)}


def spared_blocks(graph: Graph, skip: Sequence[str], only: Sequence[str]) -> dict[str, str]:
    """Path -> why it stays, for every block that is left out; a block is meant by its path or a module around it."""
    reasons = {path: chosen(parts(path), skip, only) for stack in graph.stacks for path in stack.paths}
    return {path: reason for path, reason in reasons.items() if reason}


def names_of_layer(graph: Graph, layer: Layer) -> set[str]:
    """Names by which a layer can be meant: its own, its module and the modules around it."""
    return {layer.name, layer.module, *_ancestry(graph, layer.entity)} - {""}


def chosen(names: Iterable[str], skip: Sequence[str], only: Sequence[str]) -> str:
    """Empty if something of these names may be pruned, else why not."""
    known = tuple(names)
    if only and not any(_matches(pattern, known) for pattern in only):
        return "left out by only="
    spared = next((pattern for pattern in skip if _matches(pattern, known)), None)
    return "" if spared is None else f"skip={spared!r}"


def rank_of(graph: Graph, group: Group) -> str:
    """Why the units are the rank of an adapter, which is cut only by name: empty if they are not.

    An adapter is a product of two trained weights, `(out, r)` by `(r, in)`, beside a frozen weight `(out, in)`. Its
    rank is chosen by who trains it; to cut it saves next to nothing once the adapter is merged.
    """
    layers = {layer.entity: layer for layer in graph.layers}
    made, read = ([layers.get(m.entity) for m in group.members if m.role == role] for role in ("out", "in"))
    if len(group.members) != 2 or len(made) != 1 or len(read) != 1 or made[0] is None or read[0] is None:
        return ""
    if not all(graph.entities[x.entity].trainable for x in (made[0], read[0])):
        return ""
    size = _size(graph, read[0])[0], _size(graph, made[0])[1]
    if not any(_size(graph, x) == size and not graph.entities[x.entity].trainable for x in graph.layers):
        return ""
    return "it is the rank of an adapter of a frozen weight, cut only where only= names it"


def _size(graph: Graph, layer: Layer) -> tuple[int, int]:
    shape = graph.entities[layer.entity].shape
    return shape[layer.out_axis], shape[layer.in_axis]


def check_patterns(graph: Graph, skip: Sequence[str], only: Sequence[str]) -> None:
    """Errors: RequestError for a pattern that matches nothing of the model, with the nearest names."""
    known = {name for entity in graph.entities for name in _ancestry(graph, entity)}
    known |= {group.name for group in graph.groups} | {layer.name for layer in graph.layers}
    check_known(known, skip, only)


def check_known(known: set[str], skip: Sequence[str], only: Sequence[str]) -> None:
    """Errors: RequestError for a pattern that matches none of these names."""
    for option, patterns in (("skip", skip), ("only", only)):
        if isinstance(patterns, str):
            raise RequestError(f"{option}= is one text", "a list of patterns is needed", f"{option}=[{patterns!r}]")
        for pattern in patterns:
            if not _matches(pattern, known):
                near = difflib.get_close_matches(pattern, sorted(known), 3, 0.4)
                why = f"near: {', '.join(near)}" if near else f"names are like {', '.join(sorted(known)[:3])}"
                todo = "`*` stands for anything; a module's name stands for all that is in it"
                raise RequestError(f"the pattern {option}={pattern!r} matches nothing", why, todo)


def _ancestry(graph: Graph, entity: str) -> set[str]:
    """A parameter's names and the modules around it: `a.b.weight`, `a.b`, `a`."""
    found = set()
    for name in graph.entities[entity].names or (entity,):
        found |= parts(name)
    return found


def parts(name: str) -> set[str]:
    """A dotted name and the modules around it."""
    steps = name.split(".")
    return {".".join(steps[:end]) for end in range(1, len(steps) + 1)}


def _matches(pattern: str, names: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names)


def spared(graph: Graph, group: Group, skip: Sequence[str], only: Sequence[str]) -> str:
    """Why a group takes no part, empty if it does: the same rules as in `prunella.plan`."""
    reason = chosen(names_of_group(graph, group), skip, only) or ("" if only else rank_of(graph, group))
    return reason or ("all of its units are needed" if group.size <= group.least else "")
