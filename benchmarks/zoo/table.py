"""The results of the zoo as a page of the documentation."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "zoo.md"
SUITES = ("torchvision", "timm", "transformers")
WILD = "wild"
Row = dict[str, Any]


def read(folder: Path) -> list[Row]:
    """The results of one suite."""
    return [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]


def write(results: Path) -> str:
    """Write the page and return its first table."""
    parts = {suite: (read(results / suite), read(results / f"{suite}-rival")) for suite in SUITES}
    summary = "\n".join(
        [
            "| suite | models | exact | refused with a reason | wrong without a word | traceback or time | parameters"
            " out of reach (median) | Torch-Pruning 1.6.1: tried | exact | differs | broken or traceback"
            " | nothing removed | not judged: time |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
            *(_summary(suite, *found) for suite, found in parts.items() if found[0]),
        ]
    )
    wild = [row for row in read(results / WILD) if row["verdict"] != "not built"]
    text = [HEAD, summary, _others(parts), *(_suite(suite, *found) for suite, found in parts.items() if found[0])]
    text[3:3] = [_wild(wild)] if wild else []
    PAGE.write_text("\n\n".join(text) + "\n")
    return summary


def _others(parts: dict[str, tuple[list[Row], list[Row]]]) -> str:
    """Widths, experts, blocks and tokens, where a model has them."""
    lines = [
        "The same share of other units, each kind alone, as far as a model has them. *Masked* has its own meaning for"
        " each (`docs/granularity.md`). Here the tool's own check compares: the oracle of the zoo knows channels and"
        " heads.",
        "",
        "| suite | unit | models that have it | exact | refused with a reason | traceback |",
        "|---|---|---|---|---|---|",
    ]
    for suite, (ours, _) in parts.items():
        found = [tuple(pair) for row in ours for pair in row.get("others", ())]
        for kind in sorted({kind for kind, _ in found}):
            words = Counter(text.partition(":")[0] for name, text in found if name == kind)
            counts = " | ".join(str(words[key]) for key in ("exact", "refused", "traceback"))
            lines.append(f"| {suite} | {kind} | {sum(words.values())} | {counts} |")
    return "\n".join(lines)


def _summary(suite: str, ours: list[Row], theirs: list[Row]) -> str:
    built = [row for row in ours if row["verdict"] != "not built"]
    count = Counter(row["verdict"] for row in built)
    rival = Counter(row["verdict"] for row in theirs if row["verdict"] != "not built")
    reach = [row["reach"] for row in built if row["verdict"] == "exact"]
    share = f"{count['exact'] / max(len(built), 1):.1%}"
    other = count["traceback"] + count["time"]
    shown = [f"{1 - median(reach):.0%}" if reach else ""]
    shown.append(str(sum(rival.values())) if theirs else "not run")
    shown += [str(rival[k]) if theirs else "" for k in ("exact", "differs")]
    judged = (rival["broken"] + rival["traceback"], rival["refused"], rival["time"])
    shown += [str(number) if theirs else "" for number in judged]
    return (
        f"| {suite} | {len(built)} | {count['exact']} ({share}) | {count['refused']} | {count['wrong']} | {other} | "
        + " | ".join(shown)
        + " |"
    )


def _suite(suite: str, ours: list[Row], theirs: list[Row]) -> str:
    rival = {row["name"]: row for row in theirs}
    lines = [
        f"## {suite}",
        "",
        "| model | verdict | error, float64 | float32 | parameters left | in reach | groups | set aside | couple, s |"
        " plan and shrink, s | loads again | pt2 | onnx | Torch-Pruning |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in ours:
        if row["verdict"] == "not built":
            continue
        other = rival.get(row["name"], {}).get("verdict", "")
        if row["verdict"] in ("exact", "wrong") and "error64" in row:
            numbers = (
                f"{row['error64']:.0e} | {row['error32']:.0e} | {row['params_left']:.2f} | {row['reach']:.0%} "
                f"| {row['groups']} | {row['set_aside']} | {row['couple_s']:.1f} | {row['prune_s']:.1f} "
                f"| {_short(row['reload'])} | {_short(row['exported'])} | {_short(row['onnx'])}"
            )
        else:
            numbers = " | " * 10
        lines.append(f"| {row['name']} | {row['verdict']} | {numbers} | {other} |")
    notes = [
        f"- {row['name']}: {row['verdict']}: {row['why']}"
        for row in ours
        if row["verdict"] not in ("exact", "not built")
    ]
    return "\n".join([*lines, "", *[note.replace("|", "/").replace("<", "&lt;") for note in notes]]).rstrip()


def _wild(rows: list[Row]) -> str:
    """Packages of PyPI: the summary, one line for each model, and the reasons of those with little within reach."""
    built, exact = len(rows), [row for row in rows if row["verdict"] == "exact"]
    count = Counter(row["verdict"] for row in rows)
    best = {row["name"]: _best(row) for row in rows}
    attention = [best[row["name"]] for row in exact if any(word in row["name"] for word in ATTENTION)]
    packages = {row["name"].partition(".")[0] for row in rows}
    little = [row for row in rows if best[row["name"]] < LITTLE]
    seconds = [row["plan_cpu_s"] for row in exact]
    facts = [
        f"{built} models of {len(packages)} packages: {count['exact']} exact ({count['exact'] / built:.1%}),"
        f" {count['refused']} refused with a reason, {count['wrong']} wrong without a word,"
        f" {count['traceback'] + count['time']} tracebacks or out of time.",
        f"Within reach, median: {median(row['reach'] for row in exact):.0%} by channels and heads,"
        f" {median(best[row['name']] for row in exact):.0%} with widths and experts (models of attention:"
        f" {median(attention):.0%}). Below half: {len(little)} ({len(little) / built:.1%}).",
        f"`plan` takes {median(seconds):.2f} s of processor time in the median, {max(seconds):.1f} s at most, on a"
        " machine that other work shared.",
    ]
    lines = [
        "## Packages of PyPI",
        "",
        WILD_HEAD,
        "",
        *facts,
        "",
        "| model | verdict | error, float64 | second batch | second size | gradients | training step | parameters left"
        " | in reach | with widths | widths, experts | plan, s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
        *map(_wild_row, rows),
        "",
        f"With less than {LITTLE:.0%} within reach, or refused, and what keeps most of it:",
        "",
    ]
    return "\n".join([*lines, *map(_little, [row for row in rows if row in little or row["verdict"] != "exact"])])


def _best(row: Row) -> float:
    """The largest share of the parameters that any way reaches."""
    return float(max(row.get("reach", 0.0), row.get("reach_wide", 0.0), row.get("reach_program") or 0.0))


def _wild_row(row: Row) -> str:
    answers = dict(map(tuple, row.get("second", ())))
    shown = [answers.get(key, "") for key in ("second batch", "second size", "gradients", "training step")]
    other = ", ".join(f"{kind} {text.partition(':')[0]}" for kind, text in row.get("others", ()))
    error = f"{row['error64']:.0e}" if row.get("error64", -1.0) >= 0 else ""
    numbers = (
        f"{row.get('params_left', 1):.2f} | {row.get('reach', 0):.0%} | {row.get('reach_wide', 0):.0%} | {other} | "
        f"{row.get('plan_cpu_s', 0):.1f}"
    )
    return f"| {row['name']} | {row['verdict']} | {error} | {' | '.join(shown)} | {numbers} |"


def _little(row: Row) -> str:
    reasons = "; ".join(f"{text} ({count})" for text, count in row.get("frozen", [])[:3])
    why = f"{row['verdict']}: {row['why'][:160]}" if row["verdict"] != "exact" else f"{_best(row):.0%}"
    return f"- {row['name']}: {why}: {reasons}".replace("|", "/").replace("<", "&lt;")


def _short(text: str) -> str:
    return text if text in ("", "yes") else "no"


HEAD = """# The zoo

What the coupling engine does on models that people use. Measured by `python benchmarks/zoo/run.py SUITE`, then
`run.py table`. With `--full` the artifact is stored, loaded in a fresh process and exported as well: those columns are
empty where that was not run. Models of a suite that were not run are not in the table.

Every model has random weights and random norm statistics and runs in a process of its own. 30 % of the units of every
group go, chosen at random; the oracle reads what was removed off the values of the smaller model, sets it to zero in
the dense one, and compares the outputs: `exact` is a relative difference of at most 1e-9 in float64 (where the model
runs in float64) and 1e-4 in float32, with outputs of the same shape. Where float32 moves the output of the smaller
model by more than that on its own, four times its own rounding is allowed. Detectors, which sort boxes by scores that
random weights make nearly equal, are compared in float64 alone.

*In reach* is the part of the parameters that would go if every group kept a single unit; the rest is frozen, and
`prunella inspect` says why. *Set aside* counts groups that the tool's own check could not prove and kept dense.
Torch-Pruning is used as its documentation says for a model that one does not know, without telling it about heads;
`differs` means that it runs but does not compute what the masked model computes (a normalization over a pruned axis
counts as that). Its limit was 20 to 90 seconds a model: one that ran into it was not judged, and has a column
of its own. A row is the last run of its model; the engine has gone on since some of them."""

WILD_HEAD = """Models as others write them, small and with random weights (`benchmarks/zoo/wild_models.py` names them),
under the same oracle, which also compares a second number of samples, a second size, and the gradients of the masked
model at the positions that are kept; then the smaller model takes one step of training. `not taken` is what the dense
model itself refuses. *With widths* adds the units along which a norm runs, and experts; they are cut by `Width()` and
`Expert()`, where the tool's own check compares."""

ATTENTION = ("vit_pytorch", "x_transformers", ".lm", "transformer", "former", "vit", "ViT", "UNETR", "perceiver", ".ft")
LITTLE = 0.5
