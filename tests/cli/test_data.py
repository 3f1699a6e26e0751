"""Data without a batch, or with NaN in it: one exit code for every verb and recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import Run

DATA = """

def corrupted():
    return [(images * float("nan"), labels) for images, labels in loader()]
"""
USES = {
    "taylor": ["plan", "--target", "macs=0.6", "--recipe", "taylor", "--loss", "{shop}:loss"],
    "wanda": ["plan", "--target", "sparsity=0.5", "--granularity", "element", "--recipe", "wanda"],
    "bn": ["run", "--target", "macs=0.6", "--recover", "bn", "-o", "out"],
    "reconstruct": ["run", "--target", "macs=0.6", "--recover", "reconstruct", "-o", "out"],
    "distill": ["run", "--target", "macs=0.6", "--recover", "distill:2", "-o", "out"],
    "finetune": ["run", "--target", "macs=0.6", "--recover", "finetune:2", "--loss", "{shop}:loss", "-o", "out"],
    "auto": ["run", "--target", "macs=0.6", "-o", "out"],
    "scan": ["scan", "--ratios", "0.5"],
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("data", ["empty", "corrupted"])
def test_data_that_is_empty_or_no_number_is_bad_input_everywhere(prunella: Run, shop: str, use: str, data: str) -> None:
    file = Path(f"{shop}.py")
    file.write_text(file.read_text() + DATA)
    verb, *words = (word.format(shop=shop) for word in USES[use])
    result = prunella(verb, f"{shop}:net", "--inputs", "1x3x8x8", *words, "--data", f"{shop}:{data}")
    assert result.code == 3, result.err
    assert "Traceback" not in result.err and not Path("out").exists()
