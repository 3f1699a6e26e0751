"""The source distribution builds with a compiler and without one. `make wheel` tests what such a wheel does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("scikit_build_core", reason="the build backend is not installed here")
ROOT = Path(__file__).parents[2]
SOURCES = ("CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE", "kernels", "src")


def build(what: str, source: Path, to: Path, **environment: str) -> Path:
    """One step of the backend in a process of its own; what it made."""
    code = f"import sys; from scikit_build_core.build import build_{what}; print(build_{what}(sys.argv[1]))"
    command = [sys.executable, "-W", "ignore", "-c", code, str(to)]
    done = subprocess.run(
        command, cwd=source, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return to / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution."""
    if not all((ROOT / name).exists() for name in SOURCES):
        pytest.skip("the sources are not here")
    copy, made = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("made")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(ROOT / name, copy / name)
    with tarfile.open(build("sdist", copy, made)) as archive:
        archive.extractall(made, filter="data")
    return next(path for path in made.iterdir() if path.is_dir())


@pytest.mark.slow
def test_without_a_compiler_it_is_pure_python(sources: Path, tmp_path: Path) -> None:
    wheel = build("wheel", sources, tmp_path, CC="/nonexistent", CXX="/nonexistent")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "prunella/__init__.py" in names
    assert "prunella/py.typed" in names
    assert any(name.startswith("prunella/reporting/") and name.endswith(".html") for name in names)
    assert not any(name.endswith(".so") or name.startswith(("kernels", "tests")) for name in names)


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("c++")), reason="no cmake or no C++ compiler here")
@pytest.mark.timeout(900)
def test_with_a_compiler_the_library_lies_beside_its_binding(sources: Path, tmp_path: Path) -> None:
    wheel = build("wheel", sources, tmp_path)
    assert "-py3-none-" in wheel.name
    assert not wheel.name.endswith("-any.whl")
    assert "prunella/runtime/libprunella.so" in zipfile.ZipFile(wheel).namelist()
