"""Without a usable library everything imports, runs by torch, and says in one sentence what is missing."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import prunella as pr
from prunella.errors import NotSupported
from prunella.runtime.kernels import library
from prunella.runtime.kernels.config import Config, Kind
from prunella.runtime.kernels.library import Loaded
from prunella.runtime.tuning.survey import without_kernels

ROOT = Path(__file__).parents[3]
WINDOWS = "the compiled kernels are not built for Windows"
NOT_BUILT = WINDOWS if sys.platform == "win32" else "the compiled kernels were not built when prunella was installed"


@pytest.fixture(params=["missing", "damaged", "of another platform", "without the interface"])
def unusable(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Loaded:
    """A library that cannot be used, loaded as at the first call of a process."""
    file = tmp_path / library.file_name()
    if request.param == "damaged":
        file.write_bytes(b"not a library")
    elif request.param == "of another platform":
        file.write_bytes(b"\xcf\xfa\xed\xfe" + bytes(60))  # the first bytes of a library of macOS
    elif request.param == "without the interface":
        file.write_bytes(Path(torch._C.__file__).read_bytes())
    monkeypatch.setattr(library, "FILE", file)
    library.load.cache_clear()
    library.entries.cache_clear()
    yield library.load()
    library.load.cache_clear()
    library.entries.cache_clear()


def pruned() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 8)).eval()
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.mul_(torch.rand_like(layer.weight) > 0.95)
    return model


def test_it_says_so_in_one_sentence_and_runs_by_torch(unusable: Loaded) -> None:
    assert unusable.library is None and not library.available()
    assert library.missing() == unusable.why and "\n" not in unusable.why
    assert unusable.why.startswith((NOT_BUILT, "the compiled kernels cannot be loaded: "))
    assert library.isa() == "none" and library.tiers() == ()
    lost = without_kernels()
    assert lost.startswith(unusable.why) and "install prunella from a wheel" in lost and "\n" not in lost
    model, x = pruned(), torch.randn(16, 64)
    quick = pr.sparse(model, x, seconds=0.02)
    torch.testing.assert_close(quick(x), model(x), rtol=1e-4, atol=1e-5)
    assert f"kernels: none, only those of torch ({unusable.why})" in str(pr.runtime.sparsified(quick))


def test_what_needs_a_kernel_is_refused(unusable: Loaded) -> None:
    with pytest.raises(NotSupported, match="cannot be used") as error:
        library.pack(torch.eye(4), Config(Kind.ROWS))
    assert error.value.why == unusable.why and "install prunella" in error.value.todo
    with pytest.raises(NotSupported):
        library.use_tier()


def test_only_a_file_that_cannot_be_used_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                   caplog: pytest.LogCaptureFixture) -> None:  # fmt: skip
    monkeypatch.setattr(library, "FILE", tmp_path / "nowhere")
    with caplog.at_level(logging.WARNING):
        assert library.load.__wrapped__().library is None and not caplog.records
        library.FILE.write_bytes(b"not a library")
        assert library.load.__wrapped__().library is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]


@pytest.mark.parametrize(("platform", "name"), [("linux", "libprunella.so"), ("darwin", "libprunella.dylib"),
                                                ("win32", "libprunella.dll")])  # fmt: skip
def test_the_file_is_named_as_the_platform_names_libraries(platform: str, name: str) -> None:
    assert library.file_name(platform) == name


def test_windows_is_told_that_there_are_no_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library.sys, "platform", "win32")
    assert library._open(tmp_path / "nowhere") == Loaded(None, WINDOWS)
    assert "compiler" not in library.remedy() and "WSL" in library.remedy()


def test_a_process_without_the_library_imports_all_and_the_doctor_says_it() -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom prunella.runtime.kernels import library\n"
        "library.FILE = Path('nowhere')\nimport prunella as pr\n"
        "import prunella.runtime.artifact, prunella.runtime.dense, prunella.app.backends\n"
        "from prunella.cli import main\nsys.argv = ['prunella', 'doctor', '--seconds', '0.05', '--json']\nmain()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["system"]["sparse kernels"] == "not built"
    assert found["lost"].startswith(f"{NOT_BUILT}, so zeros are")


@pytest.mark.parametrize(("platform", "cmake"), [("win32", False), ("linux", True), ("darwin", True)])
def test_the_build_leaves_the_kernels_out_on_windows(
    monkeypatch: pytest.MonkeyPatch, platform: str, cmake: bool
) -> None:
    overrides = pytest.importorskip("scikit_build_core.settings.skbuild_overrides")
    reader = pytest.importorskip("scikit_build_core.settings.skbuild_read_settings").SettingsReader
    if not (ROOT / "pyproject.toml").exists():
        pytest.skip("the sources are not here")
    with monkeypatch.context() as patch:
        patch.setattr(overrides.sys, "platform", platform)
        settings = reader.from_file(str(ROOT / "pyproject.toml"), state="wheel").settings
    assert settings.wheel.cmake is cmake
