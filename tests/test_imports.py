"""The order of imports: a module may import only what stands above it in this list (and from its own package)."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import prunella

SOURCE = Path(prunella.__file__).parent
FILES = {
    ".".join(file.relative_to(SOURCE).with_suffix("").parts).removesuffix("__init__").removesuffix("."): file
    for file in SOURCE.rglob("*.py")
}
"""All modules by their names below the package, which itself has none."""
ORDER = (
    "_version",
    "errors",
    "types",
    "model",
    "graph",
    "selection",
    "stats",
    "registry",
    "granularity",
    "criteria",
    "allocation",
    "measure",
    "targets",
    "schedules",
    "planning",
    "transform",
    "solvers",
    "compress",
    "io",
    "train",
    "recovery",
    "integrations",
    "lottery",
    "llm",
    "tokens",
    "runtime",
    "reporting",
    "metrics",
    "search",
    "experiments",
    "app",
    "cli",
    "__main__",
)


def modules() -> Iterator[tuple[str, Path]]:
    """Part (the first name below the package) and file of every module but the package itself."""
    for file in sorted(SOURCE.rglob("*.py")):
        if file != SOURCE / "__init__.py":
            yield file.relative_to(SOURCE).parts[0].removesuffix(".py"), file


def imported(file: Path) -> Iterator[tuple[int, str]]:
    """Line and part of every import of the package, lazy ones and those for types too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: imports are absolute"
            base = str(node.module)
            names = [f"{base}.{alias.name}" for alias in node.names] if base == "prunella" else [base]
        else:
            continue
        for name in names:
            if name.startswith("prunella."):
                yield node.lineno, name.split(".")[1]


def test_every_part_has_its_place() -> None:
    assert sorted({part for part, _ in modules()}) == sorted(ORDER)


def test_imports_go_only_downwards() -> None:
    wrong = [
        f"{file.relative_to(SOURCE)}:{line} imports {part}, which stands below {own}"
        for own, file in modules()
        for line, part in imported(file)
        if part != own and ORDER.index(part) > ORDER.index(own)
    ]
    assert wrong == []


def test_no_file_is_a_drawer_for_anything() -> None:
    assert [str(file) for _, file in modules() if file.stem in ("utils", "helpers", "misc", "common")] == []


def test_files_are_of_a_size_that_can_be_read() -> None:
    sizes = {str(file.relative_to(SOURCE)): len(file.read_text(encoding="utf-8").splitlines()) for _, file in modules()}
    assert {name: size for name, size in sizes.items() if size > 450} == {}


def test_no_public_class_name_is_defined_twice() -> None:
    names = Counter(
        node.name
        for _, file in modules()
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert [name for name, count in names.items() if count > 1] == []


def test_no_chain_of_imports_is_long() -> None:
    """Of imports of whole modules, not of those inside functions or for types."""
    assert max(map(depth, FILES)) <= 21


@cache
def depth(module: str) -> int:
    """Modules on the longest chain that begins with this one."""
    names = {
        full if full in FILES else base
        for node in ast.parse(FILES[module].read_text(encoding="utf-8")).body
        if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "prunella"
        for base in [str(node.module).removeprefix("prunella").lstrip(".")]
        for full in [f"{base}.{alias.name}".lstrip(".") for alias in node.names]
    }
    return 1 + max((depth(name) for name in names if name != module), default=0)
