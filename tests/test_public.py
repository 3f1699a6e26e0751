"""The public names: complete, sorted, and each found where the package says."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import prunella

SOURCE = Path(prunella.__file__).parent


def declared() -> dict[str, str]:
    """Name -> module of the imports under `if TYPE_CHECKING`, which is what type checkers see."""
    tree = ast.parse((SOURCE / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    return {
        alias.asname or alias.name: str(node.module)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def test_all_is_sorted_and_has_no_doubles() -> None:
    assert list(prunella.__all__) == sorted(set(prunella.__all__))
    assert set(dir(prunella)) == set(prunella.__all__)


def test_type_checkers_and_python_see_the_same_names() -> None:
    homes = {name: f"prunella.{home}" for name, home in prunella._HOME.items()}
    assert declared() == homes


@pytest.mark.parametrize("name", [name for name in prunella.__all__ if not name.startswith("__")])
def test_every_name_resolves(name: str) -> None:
    value = getattr(prunella, name)
    home = importlib.import_module(f"prunella.{prunella._HOME[name]}")
    assert value is getattr(home, name)


def test_no_public_name_is_hidden_by_a_submodule() -> None:
    modules = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert not modules & set(prunella.__all__)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'prune_everything'"):
        prunella.prune_everything  # noqa: B018


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import prunella, sys; assert 'torch' not in sys.modules; prunella.MACs(0.5)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_functions_and_classes_of_the_api_are_documented() -> None:
    bare = [name for name in prunella.__all__ if callable(value := getattr(prunella, name)) and not value.__doc__]
    assert bare == []
