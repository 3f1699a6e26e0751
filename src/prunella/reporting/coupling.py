"""The coupling of a model as a picture: a row per layer, a rail per group from producers to readers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prunella.graph.data import Graph, Group
from prunella.planning.coverage import of_graph
from prunella.reporting.page import templates

ROW, RAIL, LEFT = 26, 16, 14
"""Height of a row, distance of two rails, margin in pixels."""
COLORS = 6
"""Classes `c0` to `c5` of the style sheet, taken in turn."""
_FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class CoupledStop:
    """A layer of a group: it produces the units (`out`) or reads them (`in`)."""

    row: int
    makes: bool
    title: str


@dataclass(frozen=True)
class Rail:
    """One group: its column, its stops in the order of execution, and a color."""

    name: str
    column: int
    color: int
    stops: tuple[CoupledStop, ...]

    @property
    def x(self) -> int:
        """The position in the drawing."""
        return LEFT + self.column * RAIL


def rails(graph: Graph) -> tuple[Rail, ...]:
    """The groups as rails; a column is reused after the end of its group."""
    rows = {layer.entity: row for row, layer in enumerate(graph.layers)}
    spans = [(stops, group) for group in graph.groups if (stops := _stops(graph, group, rows))]
    free_after: list[int] = []
    rails = []
    for number, (stops, group) in enumerate(sorted(spans, key=lambda pair: (pair[0][0].row, pair[0][-1].row))):
        first, last = stops[0].row, stops[-1].row
        column = next((k for k, end in enumerate(free_after) if end < first), len(free_after))
        free_after[column:] = [last, *free_after[column + 1 :]]
        rails.append(Rail(group.name, column, number % COLORS, stops))
    return tuple(rails)


def _stops(graph: Graph, group: Group, rows: dict[str, int]) -> tuple[CoupledStop, ...]:
    stops = {}
    for member in group.members:
        if member.entity in rows and member.role in ("in", "out"):
            makes = member.role == "out"
            verb = "makes" if makes else "reads"
            stops[rows[member.entity], makes] = CoupledStop(
                rows[member.entity], makes, f"{member.entity} {verb} {group.name}"
            )
    return tuple(stops[key] for key in sorted(stops))


def render_coupling(graph: Graph, title: str) -> str:
    """The page as text: the picture, the members and costs of each group, and the frozen axes. Names are escaped."""
    environment = templates()
    from markupsafe import Markup

    drawn = rails(graph)
    width = LEFT + RAIL * (1 + max((rail.column for rail in drawn), default=0))
    context: dict[str, Any] = {
        "title": title,
        "graph": graph,
        "caveats": of_graph(graph),
        "rails": drawn,
        "row": ROW,
        "labels_at": width + 6,
        "width": width + 620,
        "height": ROW * len(graph.layers) + 8,
        "shapes": {x.entity: "×".join(map(str, graph.entities[x.entity].shape)) for x in graph.layers},
        "groups": [_card(graph, group) for group in (*graph.groups, *graph.stacks)],
        "frozen": _frozen(graph),
        "style": Markup((_FOLDER / "report.css").read_text(encoding="utf-8")),
    }
    return environment.get_template("coupling.html").render(context)


def _card(graph: Graph, group: Group) -> dict[str, Any]:
    """A group with the cost of one unit, and its tensors by their roles."""
    less = {group.name: torch.arange(group.size, device="cpu") > 0}
    by_role: dict[str, list[str]] = {}
    for member in group.members:
        by_role.setdefault(member.role, []).append(f"{member.entity}[{member.axis}]")
    return {
        "group": group,
        "params": graph.params() - graph.params(less),
        "macs": graph.macs() - graph.macs(less),
        "roles": by_role,
    }


def _frozen(graph: Graph) -> list[tuple[str, str, int, list[str]]]:
    """Reason, place, positions and names, the largest first."""
    count: Counter[tuple[str, str]] = Counter()
    names: dict[tuple[str, str], list[str]] = {}
    for item in (*graph.frozen, *graph.rooted):
        count[item.reason, item.where] += item.count
        names.setdefault((item.reason, item.where), []).append(
            item.entity if item.axis < 0 else f"{item.entity}[{item.axis}]"
        )
    return [(*key, total, names[key]) for key, total in count.most_common()]
