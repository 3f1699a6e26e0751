"""The public face: few names at first sight, the rest by subject, all of them loaded when first used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import prunella
from prunella.registry.catalogue import methods

SOURCE = Path(prunella.__file__).parent
NAMESPACES = [name for name in prunella.__all__ if isinstance(getattr(prunella, name), ModuleType)]
FIRST_SIGHT = [name for name in prunella.__all__ if name not in NAMESPACES and name != "__version__"]


def test_first_sight_is_short_and_sorted() -> None:
    assert list(prunella.__all__) == sorted(set(prunella.__all__))
    assert set(prunella.__all__) <= set(dir(prunella))
    assert 30 <= len(FIRST_SIGHT) <= 41 and 16 <= len(NAMESPACES) <= 23


@pytest.mark.parametrize("name", FIRST_SIGHT)
def test_names_at_first_sight_are_documented(name: str) -> None:
    assert getattr(prunella, name).__doc__


def test_no_public_name_is_hidden_by_a_submodule() -> None:
    modules = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert not modules & set(FIRST_SIGHT)


@pytest.mark.parametrize("name", NAMESPACES)
def test_a_namespace_completes_to_its_public_names_alone(name: str) -> None:
    namespace = getattr(prunella, name)
    assert dir(namespace) == sorted(namespace.__all__)
    modules = {entry for entry in dir(namespace) if isinstance(getattr(namespace, entry), ModuleType)}
    assert modules <= {"importers", "recipes"}


def test_every_method_is_found_in_a_namespace() -> None:
    found = {
        id(getattr(getattr(prunella, namespace), name)) for namespace in NAMESPACES
        for name in dir(getattr(prunella, namespace))
    }  # fmt: skip
    assert [method.name for method in methods() if id(method.function) not in found] == []


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="No prunella attribute prune_everything"):
        prunella.prune_everything  # type: ignore[attr-defined]  # noqa: B018


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import prunella, sys; assert 'torch' not in sys.modules; prunella.MACs(0.5)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("namespace", "name", "say"),
    [
        ("", "shrnik", "did you mean 'shrink'?"),
        ("", "sparsegpt", "it is prunella.solvers.sparsegpt"),
        ("", "scann", "did you mean prunella.search.scan?"),
        ("criteria", "wnda", "did you mean 'wanda'?"),
        ("solvers", "wanda", "it is prunella.wanda"),
        ("importers", "zero", "did you mean 'zeros'?"),
        ("recipes", "networkslimming", "did you mean 'network_slimming'?"),
        ("schedules", "cubik", "did you mean 'cubic'?"),
        ("runtime", "sparsifid", "did you mean 'sparsified'?"),
        ("train", "shrink", "it is prunella.shrink"),
    ],
)
def test_a_name_that_is_missing_is_looked_for(namespace: str, name: str, say: str) -> None:
    place = getattr(prunella, namespace) if namespace else prunella
    with pytest.raises(AttributeError) as caught:
        getattr(place, name)
    assert say in str(caught.value) and type(caught.value).__name__ == "AttributeError"


@pytest.mark.parametrize("name", ["", *NAMESPACES])
def test_every_namespace_suggests_names(name: str) -> None:
    place = getattr(prunella, name) if name else prunella
    known = next(entry for entry in place.__all__ if not entry.startswith("_") and len(entry) > 5)
    with pytest.raises(AttributeError, match=f"did you mean '{known}'"):
        getattr(place, f"{known}s" if f"{known}s" not in place.__all__ else f"{known}_")
    assert not hasattr(place, "__path_to_nowhere__") and not hasattr(place, "quite_something_else")


def test_a_missing_name_imports_nothing() -> None:
    code = "import prunella, sys; hasattr(prunella, 'x'); str(getattr(prunella, 'y', 0)); import prunella.errors as e"
    code += "; print(e.suggestion('prunella', 'shrnik')); assert 'torch' not in sys.modules"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout == "did you mean 'shrink'?\n"
