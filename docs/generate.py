"""Pages made from the code: one per registered method, and the command line. Run by mkdocs at each build."""

from __future__ import annotations

import html
import importlib
import inspect
import re
import sys
import typing
from collections import defaultdict
from pathlib import Path
from types import FunctionType
from typing import Any

import mkdocs_gen_files

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import docstrings

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
    text, names = inspect.getdoc(method.function) or "", set(inspect.signature(method.function).parameters)
    lines += [docstrings.markdown(text, names, f"methods.{method.name}"), "", f"**Source:** {method.source}", ""]
    if method.needs:
        lines += ["**Needs:** " + ", ".join(f"`{name}`" for name in method.needs), ""]
    if method.knobs:
        lines += ["| knob | type | default |", "| --- | --- | --- |"]
        lines += [f"| `{k.name}` | {cell(annotation(k))} | {cell(default(k))} |" for k in method.knobs]
    lines += ["", f"On the command line: `prunella explain {method.name}`.", ""]
    return "\n".join(lines)


def annotation(knob: inspect.Parameter) -> str:
    kind = knob.annotation
    return str(kind if isinstance(kind, str) else getattr(kind, "__name__", kind))


def default(knob: inspect.Parameter) -> str:
    if knob.default is knob.empty:
        return "required"
    shown = repr(knob.default) if not inspect.isfunction(knob.default) else knob.default.__name__
    return re.sub(r"<function (\w+) at 0x\w+>", r"\1", shown)


def cell(text: str) -> str:
    """Code in a table, where a bar would end the cell."""
    return f"<code>{html.escape(text)}</code>".replace("|", "&#124;")


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


def api_pages() -> None:
    """A page for the names at first sight and one for each namespace; mkdocstrings fills them from the docstrings."""
    values = {name: getattr(prunella, name) for name in prunella.__all__ if not name.startswith("__")}
    namespaces = {name: value for name, value in values.items() if inspect.ismodule(value)}
    first = {name: value for name, value in values.items() if name not in namespaces}
    lines = ["# Python API", "", "`import prunella as pr`. Every name is loaded when it is first used.", ""]
    lines += ["| namespace | what is in it |", "| --- | --- |"]
    lines += [f"| [`pr.{name}`]({name}.md) | {summary(value)} |" for name, value in namespaces.items()]
    lines += [
        "| [types and errors](types.md) | What signatures name: example inputs, losses, targets; all exceptions. |"
    ]
    lines += ["", "The names at first sight:", "", *entries("pr", first)]
    write("api/index.md", "\n".join(lines))
    for name, namespace in namespaces.items():
        members = {entry: getattr(namespace, entry) for entry in dir(namespace)}
        lines = [f"# pr.{name}", "", summary(namespace), "", *entries(f"pr.{name}", members)]
        write(f"api/{name}.md", "\n".join(lines))


def types_page() -> None:
    """What signatures name and no namespace holds, so that their names are links."""
    from prunella import errors, types
    from prunella.targets import Target

    kinds = [kind for kind in vars(errors).values() if inspect.isclass(kind) and issubclass(kind, Exception)]
    aliases = [name for name in vars(types) if name[0].isupper() and name not in vars(typing) and name != "Tensor"]
    lines = ["# Types and errors", "", "Shapes are those of weights seen as matrices `(out, in)`.", ""]
    aliases = [name for name in aliases if all(vars(types)[name] is not value for value in SHOWN)]
    lines += [line for name in aliases for line in (f"::: prunella.types.{name}", "")]
    lines += ["## Targets and errors", "", f"::: {Target.__module__}.Target", ""]
    for kind in kinds:
        if kind is not errors.PruningError and kind.__module__ == errors.__name__:
            lines += [f"::: prunella.errors.{kind.__name__}", ""]
    write("api/types.md", "\n".join(lines))


def summary(value: Any) -> str:
    """The first sentence of a docstring, on one line."""
    return (inspect.getdoc(value) or "").split("\n\n")[0].replace("\n", " ")


SHOWN: list[Any] = []
"""What a page shows already."""


def entries(prefix: str, members: dict[str, Any]) -> list[str]:
    """What mkdocstrings renders for each function and class, where it is defined."""
    lines: list[str] = []
    for name, value in members.items():
        home = getattr(value, "__module__", "")
        if (inspect.isfunction(value) or inspect.isclass(value)) and home.startswith("prunella."):
            lines += [f"::: {home}.{value.__qualname__}", "    options:", f'      heading: "{prefix}.{name}"']
            lines += [f"      members: {methods_of(value)}"]
            lines += ["      skip_local_inventory: true"] if value in SHOWN else []  # links go to the first page
            lines += [""]
            SHOWN.append(value)
    return lines


def methods_of(value: Any) -> list[str]:
    """Public methods and properties that a class documents itself; a function has none."""
    if not inspect.isclass(value):
        return []
    kinds = (property, classmethod, staticmethod, FunctionType)
    fields = vars(value).get("__annotations__", {})  # a field may have a function as its default
    own = {name: entry for name, entry in vars(value).items() if not name.startswith("_") and name not in fields}
    return [name for name, entry in own.items() if isinstance(entry, kinds) and entry.__doc__]


def copied_pages() -> None:
    """Pages of the repository's root, so that the site has them too."""
    for name in ("CONTRIBUTING", "SECURITY", "CHANGELOG"):
        text = (Path(__file__).resolve().parents[1] / f"{name}.md").read_text(encoding="utf-8")
        write(f"{name.lower()}.md", text)


def concept_pages() -> None:
    """The table, and below each section what of the library belongs to it and what proves it."""
    import concept_table

    rows = concept_table.read()
    head = "# All concepts\n\nThe subject in 85 concepts: where each is, and the test that proves it by a number.\n\n"
    write("concepts.md", head + concept_table.table(rows) + "\n")
    for page in {row.page.partition("#")[0] for row in rows}:
        text = (concept_table.ROOT / "docs" / page).read_text(encoding="utf-8")
        for row in rows:
            old = concept_table.section(row) if row.page.startswith(f"{page}#") else ""
            text = text.replace(old, f"{old.rstrip()}\n{concept_links(row)}\n") if old else text
        write(page, text)


def evidence_page() -> None:
    import evidence

    write("evidence.md", evidence.page_text(evidence.read()) + "\n")


def concept_links(row: Any) -> str:
    """Two more entries for the list of a section: functions, with links to the pages of methods, and tests."""
    known = {f"{method.function.__module__}.{method.function.__qualname__}": method.name for method in methods()}
    places = [known.get(path, known.get(actual(path), "")) for path in row.functions]
    names = [path.rpartition(".")[2] for path in row.functions]
    links = [f"[`{n}`](../methods/{p}.md)" if p else f"`{n}`" for n, p in zip(names, places, strict=True)]
    tests = [f"`{test.removeprefix('tests/')}`" for test in row.tests]
    return "- **In the library:** " + ", ".join(links) + "\n- **Proven by:** " + ", ".join(tests)


def actual(path: str) -> str:
    """Where what a dotted path names is defined."""
    owner, _, name = path.rpartition(".")
    value = getattr(importlib.import_module(owner), name)
    return f"{value.__module__}.{value.__qualname__}"


method_pages()
command_page()
api_pages()
types_page()
copied_pages()
concept_pages()
evidence_page()
