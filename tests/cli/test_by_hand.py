"""Layers and numbers on the command line: the same plans as in Python, and a sentence for what cannot be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from prunella.io.plan_file import load_plan
from tests.cli.conftest import Run

IMAGE = ("--inputs", "1x3x8x8")


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        (["--remove", "0=2,5-7"], {"0": [0, 1, 3, 4]}),
        (["--keep", "0=0-3"], {"0": [0, 1, 2, 3]}),
        (["--remove", "0=1", "--remove", "3=0-7"], {"0": [0, 2, 3, 4, 5, 6, 7], "3": [*range(8, 16)]}),
    ],
)
def test_positions(prunella: Run, shop: str, options: list[str], kept: dict[str, list[int]]) -> None:
    assert prunella("plan", f"{shop}:net", *IMAGE, *options, "--json").data["kept"] == kept


@pytest.mark.parametrize(
    ("options", "widths"),
    [
        (["--ratio", "*=50%", "--ratio", "0=0.25"], {"0": 6, "3": 8}),
        (["--count", "3=12"], {"3": 4}),
        (["--ratio", "3=0.5", "--target", "macs=0.4"], {"3": 8}),
    ],
)
def test_ratios_and_counts(prunella: Run, shop: str, options: list[str], widths: dict[str, int]) -> None:
    kept = prunella("plan", f"{shop}:net", *IMAGE, *options, "--json").data["kept"]
    assert widths.items() <= {name: len(units) for name, units in kept.items()}.items()


def test_a_threshold_masks_the_weights_below_it(prunella: Run, shop: str, tmp_path: Path) -> None:
    options = ["--granularity", "element", "--threshold", "0.05", "-o", str(tmp_path / "plan.safetensors")]
    result = prunella("plan", f"{shop}:net", *IMAGE, *options)
    assert "asked threshold=0.05, got sparsity=" in result.out
    assert str(load_plan(tmp_path / "plan.safetensors").target) == "threshold=0.05"


def test_run_removes_what_is_named(prunella: Run, shop: str, tmp_path: Path) -> None:
    output = tmp_path / "small"
    result = prunella("run", f"{shop}:net", *IMAGE, "--remove", "0=2,5,7", "-o", str(output), "--json")
    assert result.code == 0, result.err
    assert load_plan(output / "plan.safetensors").keep["0"].tolist() == [k not in (2, 5, 7) for k in range(8)]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--remove", "0"], "the name of a layer and = come first"),
        (["--remove", "0=a"], "'a' is not a value for it"),
        (["--ratio", "0=half"], "for example --ratio layer1.0.conv1=0.3"),
        (["--count", "0=1.5"], "'1.5' is not a value for it"),
        (["--remove", "0=1", "--remove", "0=2"], "--remove names 0 twice"),
        (["--threshold", "0.1", "--target", "macs=0.5"], "both --target and --threshold"),
        (["--remove", "conv=1"], "there is no layer 'conv' to prune"),
    ],
)
def test_what_cannot_be_read(prunella: Run, shop: str, options: list[str], says: str) -> None:
    result = prunella("plan", f"{shop}:net", *IMAGE, *options)
    assert result.code == 2 and says in result.err


def test_auto_does_not_go_with_a_choice_by_hand(prunella: Run, shop: str) -> None:
    result = prunella("run", f"{shop}:net", *IMAGE, "--recipe", "auto", "--remove", "0=1")
    assert result.code == 2 and "--recipe auto does not go with --remove" in result.err
