"""What `doctor` says of patterns follows from what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from prunella.app import doctor
from prunella.runtime.kernels import library
from prunella.runtime.tuning import survey
from prunella.runtime.tuning.survey import Pattern, Try
from tests.runtime.standin import Calls


def pattern(*lows: float) -> Pattern:
    tries = tuple(Try(0.1 * k, low + 0.1, low, low + 0.2, "rows fp32") for k, low in enumerate(lows))
    return Pattern("x", "Element()", (4, 4), 1, tries)


@pytest.mark.parametrize(
    ("lows", "pays"),
    [((0.5, 1.1, 1.2), 0.1), ((1.1, 0.9, 1.2), 0.2), ((1.1, 1.2, 1.0), None), ((), None), ((1.1,), 0.0)],
)
def test_it_pays_from_where_no_gap_follows(lows: tuple[float, ...], pays: float | None) -> None:
    found = pattern(*lows).pays_from
    assert found == pays if pays is None else found == pytest.approx(pays)


def test_masks_have_the_pattern_that_their_name_says() -> None:
    generator = torch.Generator().manual_seed(0)
    assert bool((survey._two_of_four((8, 12), 0.5, generator).reshape(8, 3, 4).sum(-1) == 2).all())
    tiles = survey._blocks((32, 50), 0.8, generator).reshape(2, 16, 50)
    assert bool((tiles == tiles[:, :1]).all()) and 0.05 < tiles.float().mean() < 0.4
    assert 0.7 < 1 - survey._scattered((100, 100), 0.75, generator).float().mean() < 0.8


@pytest.mark.usefixtures("eager_to_skip")
def test_every_pattern_is_tried_with_kernels(kernels: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey, "_SIZE", 32)
    found = survey.survey(seconds=0.01)
    assert [p.granularity for p in found] == ["Element()", "Block(16, 1)", "NM(2, 4)", "Element()"]
    assert found[1].tries[0].kernel == "groups fp32" and found[-1].tries[0].kernel == "decode fp32"
    assert all(p.pays_from == p.tries[0].sparsity for p in found)


@pytest.mark.usefixtures("eager_to_skip")
def test_without_kernels_the_doctor_says_what_is_lost(monkeypatch: pytest.MonkeyPatch, no_kernels: str) -> None:
    monkeypatch.setattr(library, "FILE", Path("nowhere"))
    monkeypatch.setattr(doctor, "trials", lambda seconds, seed: ())
    monkeypatch.setattr(survey, "_SIZE", 32)
    found = doctor.checkup(seconds=0.01).as_dict()
    assert found["system"]["sparse kernels"] == "not built" and "install prunella from a wheel" in found["lost"]
    assert found["lost"].startswith(no_kernels) and found["lost"].count(".") == 0  # one sentence
    assert [p["name"] for p in found["patterns"]] == ["scattered zeros"]
    assert found["patterns"][0]["tries"][0]["kernel"] == "torch CSR"
