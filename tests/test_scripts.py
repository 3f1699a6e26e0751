"""Each script of examples/ says what it is, and runs.

The longest run with `PRUNELLA_EXAMPLES`, as in `.ci/run`; `make examples` runs all scripts at their full length.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.vision import torchvision_or_skip

FOLDER = Path(__file__).resolve().parents[1] / "examples"
SCRIPTS = sorted(file.stem for file in FOLDER.glob("*.py") if file.stem != "parts")
NEEDS = {
    "trainer": ("transformers", "peft", "accelerate"),
    "lightning_digits": ("lightning",),
    "yolo": ("ultralytics",),
    "language_model": ("transformers", "tokenizers"),
    "deployment": ("onnxscript", "onnxruntime"),
    "compare_methods": ("jinja2", "matplotlib"),
    "study": ("jinja2", "matplotlib"),
}
LONG = {"language_model", "deployment"}
SKIP_LONG = pytest.mark.skipif(
    "PRUNELLA_EXAMPLES" not in os.environ, reason="`.ci/run` runs this, and `make examples` at full length"
)


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module."""
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", [pytest.param(n, marks=SKIP_LONG) if n in LONG else n for n in SCRIPTS])
@pytest.mark.filterwarnings("ignore")
def test_an_example_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("sklearn", *NEEDS.get(name, ())):
        pytest.importorskip(package)
    if name in ("trainer", "lightning_digits"):
        torchvision_or_skip()
    module = script(name, monkeypatch)
    for words, code in ((["--help"], 0), (["--quick", "--out", str(tmp_path / "out")], None)):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *words])
        if code is not None:
            with pytest.raises(SystemExit) as ended:
                module.main()
            assert ended.value.code == code
        else:
            monkeypatch.setattr(sys, "stdin", sys.stdin)
            module.main()
        assert capsys.readouterr().out.strip()


def test_every_script_is_in_the_table() -> None:
    table = (FOLDER / "README.md").read_text()
    assert set(SCRIPTS) >= LONG
    assert [name for name in SCRIPTS if f"| `{name}.py` |" not in table] == []
