"""The verb `scan`: curves for people and as JSON, and a folder in which it goes on."""

from __future__ import annotations

from pathlib import Path

from tests.cli.conftest import Run

WORDS = ("--inputs", "2x3x8x8", "--ratios", "0.25,0.5")


def test_scan_prints_a_curve_for_every_group(prunella: Run, shop: str, tmp_path: Path) -> None:
    result = prunella("scan", f"{shop}:net", *WORDS, "-o", str(tmp_path / "scan"), "--json")
    assert result.code == 0 and result.data["base"] == 0 and set(result.data["curves"]) == {"0", "3"}
    assert all(value < 0 for curve in result.data["curves"].values() for _, value in curve)
    again = prunella("scan", f"{shop}:net", *WORDS, "-o", str(tmp_path / "scan"), "--json")
    assert again.data["curves"] == result.data["curves"] and (result.data["measured"], again.data["measured"]) == (5, 0)
    text = prunella("scan", f"{shop}:net", *WORDS)
    assert "quality of the dense model: 0" in text.out and "25%" in text.out and "dense:" in text.err


def test_scan_of_nonsense(prunella: Run, shop: str) -> None:
    assert "cannot read the ratios" in prunella("scan", f"{shop}:net", "--ratios", "half").err
    assert prunella("scan", f"{shop}:net", *WORDS, "--recipe", "wanda_2_4").code == 2


def test_a_plan_for_a_latency_that_masks_cannot_give(prunella: Run, shop: str) -> None:
    result = prunella(
        "plan", f"{shop}:net", "--inputs", "2x3x8x8", "--granularity", "element", "--target", "latency=0.5"
    )
    assert result.code == 2 and "masks do not make a model faster" in result.err
