"""The source distribution builds with a compiler and without one, and what is installed from its wheels works.

`make wheel` and `.ci/run` run this. With `PRUNELLA_DIST` the wheel has all kernels, goes through all their tests, and
is left in that folder. Where it is set but empty, the wheel has two tiers of instructions, and the tests of its kernels
are a slice. Without it the tests are skipped: the builds take a minute.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("scikit_build_core", reason="the build backend is not installed here")
pytestmark = pytest.mark.skipif("PRUNELLA_DIST" not in os.environ, reason="`make wheel` and `.ci/run` run this")
ROOT = Path(__file__).parents[2]
DIST = os.environ.get("PRUNELLA_DIST")
SLICE = ("kernels/test_decode", "test_artifact")
ALL = (*SLICE, "kernels/test_kernels", "test_layers", "test_sparse")
KERNELS = tuple(f"tests/runtime/{name}.py" for name in (ALL if DIST else SLICE))
TIERS = {} if DIST else {"SKBUILD_CMAKE_DEFINE": "PRUNELLA_TIERS=avx2"}
NO_KERNELS = ("tests/runtime/tuning/test_survey.py", "-k", "without_kernels")
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
        archive.extractall(made, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))  # since 3.11.4
    return next(path for path in made.iterdir() if path.is_dir())


def installed(wheel: Path, folder: Path, *words: str, kernels: bool) -> str:
    """The last line of pytest over the installed wheel, in an environment that has nothing of the sources.

    Its dependencies are those of this environment, by a path: a .pth file in there is not followed, so that a prunella
    which is installed in place stays out.
    """
    inside = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", inside], check=True)
    python = inside / "bin" / "python"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(subprocess.run([python, "-c", ask], capture_output=True, text=True, check=True).stdout.strip())
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    install = ("--quiet", "--disable-pip-version-check", "--python", python, "install", "--no-deps", "--no-index")
    # the dependencies may hold prunella too, in place: it is not to be taken for an older version
    subprocess.run([sys.executable, "-m", "pip", *install, "--ignore-installed", wheel], check=True)
    work = folder / "work"
    shutil.copytree(ROOT / "tests", work / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", work)
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHONPATH", "PYTEST"))}
    found = "import prunella; from prunella.runtime.kernels import library; print(prunella.__file__, library.isa())"
    where = subprocess.run([python, "-c", found], cwd=work, env=environment, capture_output=True, text=True, check=True)
    file, isa = where.stdout.split()
    assert Path(file).is_relative_to(packages) and (isa != "none") is kernels
    command = [python, "-m", "pytest", "-p", "no:cacheprovider", *words]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout.splitlines()[-1]


def test_without_a_compiler_it_is_pure_python(sources: Path, tmp_path: Path) -> None:
    wheel = build("wheel", sources, tmp_path, CC="/nonexistent", CXX="/nonexistent")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "prunella/__init__.py" in names
    assert "prunella/py.typed" in names
    assert any(name.startswith("prunella/reporting/") and name.endswith(".html") for name in names)
    assert not any(name.endswith(".so") or name.startswith(("kernels", "tests")) for name in names)
    assert "1 passed" in installed(wheel, tmp_path, *NO_KERNELS, kernels=False)


@pytest.mark.skipif(not (shutil.which("cmake") and shutil.which("c++")), reason="no cmake or no C++ compiler here")
@pytest.mark.timeout(900)
def test_with_a_compiler_the_library_lies_beside_its_binding(sources: Path, tmp_path: Path) -> None:
    wheel = build("wheel", sources, tmp_path, **TIERS)
    assert "-py3-none-" in wheel.name
    assert not wheel.name.endswith("-any.whl")
    assert "prunella/runtime/kernels/libprunella.so" in zipfile.ZipFile(wheel).namelist()
    assert " passed" in installed(wheel, tmp_path, *KERNELS, kernels=True)
    if DIST:
        Path(DIST).mkdir(parents=True, exist_ok=True)
        shutil.copy(wheel, DIST)
