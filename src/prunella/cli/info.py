"""Verbs that only read: the machine, the methods, a model, a plan."""

from __future__ import annotations

import difflib
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunella.cli import options
from prunella.cli.console import emit, note, stage, terminal_width
from prunella.measure.text import byte_size, duration, fitted, interval, percent, ratio, short_count, table

if TYPE_CHECKING:
    from prunella.app.doctor import Checkup
    from prunella.graph.data import Graph, Group
    from prunella.registry.concepts import Concept

_SHOWN = 12
_COLUMNS = 80


def doctor(
    seconds: Annotated[float, typer.Option(help="How long to measure.")] = 4.0, as_json: options.Json = False
) -> None:
    """Show the hardware and software of this machine, and measure which kinds of sparsity are faster on it."""
    from prunella.app.doctor import checkup

    with stage("measuring"):
        checked = checkup(seconds=seconds)
    emit(checked.as_dict(), _checkup_text(checked), as_json=as_json)


def _checkup_text(checked: Checkup) -> str:
    lines = [*filter(None, [checked.busy]), "machine", table((), list(checked.system.items()))]
    lines += ["", "optional packages", table((), list(checked.extras.items()))]
    rows = [
        (
            t.name,
            t.structure,
            duration(t.dense_ms / 1e3),
            duration(t.pruned_ms / 1e3),
            ratio(t.ratio),
            interval(t.low, t.high, ".2f"),
            t.verdict,
        )
        for t in checked.trials
    ]
    header = ("what is removed", "granularity", "dense", "pruned", "speed-up", "95 %", "verdict")
    lines += ["", "what pays here", table(header, rows, right=(2, 3, 4, 5))]
    return "\n".join(
        [*lines, "", "zeros that prunella.sparse skips, against the best dense kernel", *_patterns(checked)]
    )


def _patterns(checked: Checkup) -> list[str]:
    from prunella.runtime.tuning.survey import without_kernels

    rows = [
        (p.name, p.granularity, "x".join(map(str, p.shape)), p.tokens,
         "  ".join(f"{t.sparsity:.0%}: {t.ratio:.1f}x" for t in p.tries) or "-",
         "no" if p.pays_from is None else f"from {p.pays_from:.0%}")
        for p in checked.patterns
    ]  # fmt: skip
    header = ("zeros", "granularity", "weight", "tokens", "speed-up at each sparsity", "pays")
    return [table(header, rows, right=(3,)), *filter(None, [without_kernels()])]


def methods(
    kind: Annotated[str | None, typer.Argument(help="Only this kind: criterion, allocation ...")] = None,
    as_json: options.Json = False,
) -> None:
    """List all methods and what each does; `explain NAME` gives the data it needs and its source."""
    from prunella.registry import catalogue

    methods = catalogue.methods()
    kinds = sorted({method.kind for method in methods})
    if kind is not None and kind not in kinds:
        from prunella.errors import RequestError, near_names

        near = near_names(kind, kinds)
        why = f"known are {', '.join(kinds)}{f'; {near}' if near else ''}"
        raise RequestError(f"unknown kind {kind!r}", why, "for example prunella methods criterion")
    methods = [method for method in methods if kind in (None, method.kind)]
    data = [catalogue.describe(method) for method in methods]
    text = "\n\n".join(_kind_text(name, [row for row in data if row["kind"] == name]) for name in kinds)
    emit(data, text.strip() if (width := terminal_width()) is None else fitted(text.strip(), width), as_json=as_json)


def _kind_text(kind: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The methods of a kind, in lines of at most 80 columns; nothing without methods."""
    if not rows:
        return ""
    names = min(max(len(row["name"]) for row in rows) + 2, 28)
    lines = [f"{kind} ({len(rows)})"]
    for row in rows:
        first = f"  {row['name']}".ljust(names + 2)
        lines += [first.rstrip()] if len(first) > names + 2 else []
        first = " " * (names + 2) if len(first) > names + 2 else first
        lines += textwrap.wrap(row["summary"], _COLUMNS, initial_indent=first, subsequent_indent=" " * (names + 2))
    return "\n".join(lines)


def explain(
    name: Annotated[str, typer.Argument(help="A name of `methods`, or a concept such as 2:4, lottery, gradual.")],
    as_json: options.Json = False,
) -> None:
    """Explain a method: formula, needed data, parameters and source. Or a concept: the names to type for it."""
    from prunella.errors import RequestError
    from prunella.registry import catalogue, concepts

    try:
        method = catalogue.describe(catalogue.lookup(name))
    except RequestError as unknown:
        rows = concepts.search(name)
        if not rows:
            near = concepts.near(name)
            if not near or difflib.get_close_matches(name, [method.name for method in catalogue.methods()], 1, 0.75):
                raise
            raise RequestError(unknown.what, f"did you mean {' or '.join(near)}?", unknown.todo) from unknown
        emit([asdict(row) for row in rows], "\n\n".join(map(_concept_text, rows)), as_json=as_json)
    else:
        emit(method, _method_text(method), as_json=as_json)


def _method_text(method: Mapping[str, Any]) -> str:
    from prunella.cli.typed import typed
    from prunella.registry.concepts import pages_of

    head = f"{method['name']} ({method['kind']}, {method['status']})"
    lines = [head, "", method["doc"], "", f"source: {method['source']}"]
    if method["needs"]:
        lines.append(f"needs:  {', '.join(method['needs'])}")
    lines += [f"type:   {line}" for line in typed([method["name"]])]
    lines += [f"knob:   {knob} = {value}" for knob, value in method["knobs"].items()]
    pages = (f"methods/{method['name']}.md", *pages_of(method["name"]))
    return "\n".join([*lines, f"docs:   {', '.join(pages)}"])


def _concept_text(row: Concept) -> str:
    from prunella.cli.typed import typed

    also = [f"also called: {', '.join(row.words)}"] if row.words else []
    options = [f"to type:     {line}"] if (line := ", ".join(typed(row.python))) else []
    return "\n".join([row.name, *also, f"in Python:   {', '.join(row.python)}", *options, f"docs:        {row.page}"])


def inspect(
    source: options.SourceOptions,
    factory: options.FactoryName = None,
    program: options.Program = False,
    everything: Annotated[bool, typer.Option("--all", help="Show all rows.")] = False,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Draw the coupling as a page.")] = None,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Show layers, parameters and MACs; the groups that can be pruned, with costs; what cannot be pruned, and why."""
    from prunella.cli.parse import check_new_file, open_source
    from prunella.cli.run import named
    from prunella.graph.solve.groups import couple

    check_new_file(html, source, overwrite=overwrite)
    network, example = open_source(source, factory=factory, program=program)
    with stage("coupling"):
        graph = couple(network, example)
    data = graph_data(graph)
    if data["offer"] and not program:
        from prunella.planning.reach import in_program

        with stage("capturing the program"):
            data["reach_in_program"] = in_program(network, example, graph)
    if html is not None:
        from prunella.io.files import write_atomic
        from prunella.reporting.coupling import render_coupling

        note(f"wrote {write_atomic(html, render_coupling(graph, named(source.model)).encode())}")
    emit(data, _graph_text(data, None if everything else _SHOWN), as_json=as_json)


def graph_data(graph: Graph) -> dict[str, Any]:
    """The output of `inspect` as plain data."""
    from prunella.planning import coverage, reach
    from prunella.planning.diagnostics import frees, offer
    from prunella.planning.render import remarks_of

    params, macs = graph.params(), graph.macs()
    reasons = Counter[tuple[str, str, str]]()
    for item in (*graph.frozen, *graph.rooted):
        reasons[item.reason, item.where, frees(item.kind)] += 1
    return {
        "params": params,
        "macs": macs,
        "bytes": graph.bytes(),
        "reach": reach.reach(graph, reach.EXACT),
        "reach_with_widths": reach.reach(graph, reach.WIDER),
        "reach_in_program": None,
        "layers": [
            {"name": x.name, "op": x.op, "shape": graph.entities[x.entity].shape, "macs": x.macs} for x in graph.layers
        ],
        "groups": [_group_data(graph, group, params, macs) for group in (*graph.groups, *graph.stacks)],
        "frozen": [{"reason": r, "where": w, "frees": f, "axes": n} for (r, w, f), n in reasons.most_common()],
        "offer": offer(graph.frozen),
        "uncounted": dict(graph.uncounted),
        "caveats": coverage.of_graph(graph),
        "unused": list(graph.unused),
        "tied": [list(e.names) for e in graph.entities.values() if e.parameter and len(e.names) > 1],
        "not_trained": [e.name for e in graph.entities.values() if e.parameter and not e.trainable],
        "shared": {name: n for name, n in Counter(c.layer for c in graph.costs if c.layer).items() if n > 1},
        "remarks": remarks_of(graph),
    }


def _group_data(graph: Graph, group: Group, params: int, macs: float) -> dict[str, Any]:
    """A group, and the slices that are removed with its first unit."""
    import torch

    keep = torch.ones(group.size, dtype=torch.bool, device="cpu")
    keep[0] = False
    less = {group.name: keep}
    cost = {"unit_params": params - graph.params(less), "unit_macs": macs - graph.macs(less)}
    sizes = {"units": group.size, "multiple": group.multiple, "members": len(group.members)}
    return {"name": group.name, "kind": group.kind, **sizes, **cost}


def _graph_text(data: dict[str, Any], limit: int | None) -> str:
    head = f"{short_count(data['params'])} parameters, {short_count(data['macs'])} MACs, {byte_size(data['bytes'])}"
    head += f"; within reach: {percent(data['reach'])} of the parameters by channels and heads"
    wider = data["reach_with_widths"]
    head += f", {percent(wider)} with widths and experts" if wider > data["reach"] else ""
    parts = ["\n".join([head, *data["caveats"]])]
    total = max(data["macs"], 1.0)
    layers = [
        (x["name"], x["op"], "x".join(map(str, x["shape"])), short_count(x["macs"]), percent(x["macs"] / total))
        for x in data["layers"]
    ]
    parts.append(_section("layers", ("name", "op", "weight", "MACs", "share"), layers, limit, right=(3, 4)))
    groups = [
        (g["name"], g["kind"], _units(g), g["members"], short_count(g["unit_params"]), short_count(g["unit_macs"]))
        for g in data["groups"]
    ]
    header = ("group", "kind", "units", "tensors", "params/unit", "MACs/unit")
    parts.append(_section("what can be pruned", header, groups, limit, right=(2, 3, 4, 5)))
    frozen = [(f["axes"], f["reason"], f["where"], f["frees"] or "-") for f in data["frozen"]]
    parts.append(
        _section("what cannot be pruned", ("axes", "why", "where", "what frees it"), frozen, limit, right=(0,))
    )
    captured = data["reach_in_program"]
    then = "" if captured is None else f" ({percent(captured)} of the parameters are then within reach)"
    parts += [data["offer"] + then] if data["offer"] else []
    if data["remarks"]:
        parts.append("\n".join(data["remarks"]))
    return "\n\n".join(parts)


def _units(group: dict[str, Any]) -> str:
    """The number of units, and the number of which it must remain a multiple."""
    return f"{group['units']}" + (f" (by {group['multiple']})" if group["multiple"] > 1 else "")


def _section(title: str, header: tuple[str, ...], rows: list[Any], limit: int | None, *, right: tuple[int, ...]) -> str:
    shown = rows if limit is None else rows[:limit]
    more = f"\n... {len(rows) - len(shown)} more (--all)" if len(rows) > len(shown) else ""
    return f"{title} ({len(rows)})\n{table(header, shown, right=right)}{more}" if rows else f"{title}: nothing"


def show(
    file: Annotated[Path, typer.Argument(metavar="FILE.plan", help="A plan.")], as_json: options.Json = False
) -> None:
    """Print a plan: the kept units of each group, and the resulting size."""
    from prunella.cli.parse import plan_data
    from prunella.io.plan_file import load_plan

    plan = load_plan(file)
    emit(plan_data(plan), str(plan), as_json=as_json)
