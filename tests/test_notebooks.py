"""The notebooks: six, each with a title and a way on. `make notebooks` executes all; the shortest runs here too."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("[0-9]_*.py"))


def cells(file: Path) -> list[tuple[bool, str]]:
    """Whether it is text, and what stands in it."""
    parts = re.split(r"^# %%(.*)\n", file.read_text(encoding="utf-8"), flags=re.M)[1:]
    return [("[markdown]" in kind, text.strip()) for kind, text in zip(parts[::2], parts[1::2], strict=True)]


def test_there_are_six() -> None:
    assert [file.stem for file in NOTEBOOKS] == [
        "1_first_pruning", "2_coupling", "3_sensitivity", "4_sparse_training", "5_language_model", "6_deploy",
    ]  # fmt: skip


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_it_has_a_title_plots_and_links_that_lead_somewhere(file: Path) -> None:
    found = cells(file)
    is_text, first = found[0]
    assert is_text and first.startswith("# # ") and found[-1][0]
    assert all(line.startswith("#") for text, content in found if text for line in content.splitlines())
    code = "\n".join(content for text, content in found if not text)
    assert "plt.show()" in code and "import prunella as pr" in code
    links = re.findall(r"\]\(([^)#]+)", "\n".join(content for text, content in found if text))
    assert links and all((FOLDER / link).is_file() for link in links), links


@pytest.mark.filterwarnings("ignore")
def test_the_shortest_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    shown: list[int] = []
    monkeypatch.setattr(pyplot, "show", lambda: shown.append(len(pyplot.get_fignums())))
    runpy.run_path(str(FOLDER / "2_coupling.py"))
    pyplot.close("all")
    assert shown == [1]
    said = capsys.readouterr().out
    assert "stem: 16 units" in said and "made by stem.weight, blocks.0.conv2.weight, blocks.1.conv2.weight" in said
    assert "read by blocks.0.conv1.weight, blocks.1.conv1.weight, head.weight" in said
    difference = float(re.search(r"masked network: (\S+)", said)[1])  # type: ignore[index]
    assert difference < 1e-5
