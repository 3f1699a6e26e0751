"""Pages made from the code: one per registered method, and the command line. Run by mkdocs at each build."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import mkdocs_gen_files

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

import prunella
from prunella.registry.catalogue import methods
from prunella.registry.method import Method

PLURAL = {
    "recipe": "Recipes",
    "criterion": "Criteria",
    "control": "Controls",
    "granularity": "Granularities",
    "allocation": "Allocations",
    "schedule": "Schedules",
    "cycle": "Schedules that fall on their way",
    "solver": "Solvers",
    "search": "Searches",
    "training": "Training",
    "recovery": "Recovery",
    "compression": "Compression",
    "metric": "Metrics",
    "importer": "Importers",
}


def write(path: str, text: str) -> None:
    with mkdocs_gen_files.open(path, "w") as page:
        page.write(text)


def method_page(method: Method) -> str:
    lines = [f"# {method.name}", "", f"*{method.kind}* · {method.status}", ""]
    lines += [inspect.getdoc(method.function) or "", "", f"**Source:** {method.source}", ""]
    if method.needs:
        lines += ["**Needs:** " + ", ".join(f"`{name}`" for name in method.needs), ""]
    if method.knobs:
        lines += ["| knob | type | default |", "| --- | --- | --- |"]
        lines += [f"| `{k.name}` | `{annotation(k)}` | `{default(k)}` |" for k in method.knobs]
    lines += ["", f"On the command line: `prunella explain {method.name}`.", ""]
    return "\n".join(lines)


def annotation(knob: inspect.Parameter) -> str:
    kind = knob.annotation
    return str(kind if isinstance(kind, str) else getattr(kind, "__name__", kind)).replace("|", "\\|")


def default(knob: inspect.Parameter) -> str:
    return "required" if knob.default is knob.empty else repr(knob.default)


def method_pages() -> None:
    families: dict[str, list[Method]] = defaultdict(list)
    for method in methods():
        families[method.kind].append(method)
        write(f"methods/{method.name}.md", method_page(method))
    lines = ["# Methods", "", "Made from the functions themselves; `prunella methods` prints the same list.", ""]
    for kind, title in PLURAL.items():
        if families[kind]:
            lines += [f"## {title}", "", "| name | what it does | source |", "| --- | --- | --- |"]
            rows = [f"| [{m.name}]({m.name}.md) | {m.summary} | {m.source} |" for m in families[kind]]
            lines += [*rows, ""]
    write("methods/index.md", "\n".join(lines))


def command_page() -> None:
    import typer

    from prunella.cli.app import app

    group: Any = typer.main.get_command(app)
    lines = ["# Command line", "", "Made from the program; `prunella VERB --help` says the same.", ""]
    for name, command in group.commands.items():
        context = command.context_class(command, info_name=f"prunella {name}")
        lines += [f"## {name}", "", "```text", command.get_help(context).strip(), "```", ""]
    write("cli.md", "\n".join(lines))


def api_page() -> None:
    lines = ["# Python API", "", "`import prunella as pr`; every name is loaded when it is first used.", ""]
    for name in prunella.__all__:
        value = getattr(prunella, name)
        if name.startswith("__") or not callable(value):
            continue
        kind = "class" if inspect.isclass(value) else "def"
        lines += [f"## {name}", "", "```python", f"{kind} {name}{signature(value)}", "```", ""]
        lines += [inspect.getdoc(value) or "", "", f"In `{value.__module__}`.", ""]
    write("api.md", "\n".join(lines))


def signature(value: Any) -> str:
    """The parameters, one a line where they are many."""
    parts: list[str] = []
    for parameter in inspect.signature(value).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not any(part.startswith("*") for part in parts):
            parts.append("*")
        parts.append(
            str(parameter).replace("'", "") if parameter.default is parameter.empty else with_default(parameter)
        )
    joined = ", ".join(parts)
    return f"({joined})" if len(joined) < 90 else "(\n    " + ",\n    ".join(parts) + ",\n)"


def with_default(parameter: inspect.Parameter) -> str:
    kind = annotation(parameter).replace("\\|", "|")
    return f"{parameter.name}: {kind} = {shown(parameter.default)}"


def shown(value: Any) -> str:
    """A default as one would write it: functions by name, dataclasses without their own defaults."""
    if dataclasses.is_dataclass(value):
        return f"{type(value).__name__}()"
    return str(getattr(value, "__name__", repr(value)))


def concept_page() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    import concept_table

    head = "# All concepts\n\nThe subject in 85 concepts: where each is, and the test that proves it by a number.\n\n"
    write("concepts.md", head + concept_table.table(concept_table.read()) + "\n")


method_pages()
command_page()
api_page()
concept_page()
