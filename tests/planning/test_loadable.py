"""`loadable="transformers"`: plain `AutoModel` reads the result, and the plan says what that cost."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import prunella as pr
from prunella.errors import RequestError
from tests.llm.streaming.models import write

BATCH = {"input_ids": torch.arange(12).view(1, 12)}
GLOBAL = pr.Recipe(pr.magnitude, (pr.Channel(), pr.Head()), pr.global_)


@pytest.mark.parametrize("kind", ["Llama", "GPT2", "Bert"])
def test_auto_model_reads_what_free_widths_would_not(tmp_path: Path, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    dense = write(tmp_path / "in", kind)
    with torch.no_grad():  # layers of different size, so that a common ranking takes them apart
        for number, parameter in enumerate(dense.parameters()):
            parameter.mul_(1 + number % 7 / 3)
    free = pr.plan(dense, BATCH, GLOBAL, target=pr.Params(0.8))
    even = pr.plan(dense, BATCH, GLOBAL, target=pr.Params(0.8), loadable="transformers")
    free_saved = pr.save(pr.shrink(dense, free), tmp_path / "free", plan=free, source=tmp_path / "in")
    saved = pr.save(pr.shrink(dense, even), tmp_path / "even", plan=even, source=tmp_path / "in")
    assert (free_saved.reader, saved.reader) == ("prunella.load", "from_pretrained")
    auto = transformers.AutoModelForMaskedLM if kind == "Bert" else transformers.AutoModelForCausalLM
    again = auto.from_pretrained(tmp_path / "even").eval()
    torch.testing.assert_close(again(**BATCH).logits, pr.shrink(dense, even)(**BATCH).logits)
    (line,) = [remark for remark in even.remarks if "from_pretrained reads it" in remark]
    here, there = (float(number) for number in re.findall(r"([\d.]+)%", line))
    assert here >= there > 0 and not any("from_pretrained reads it" in remark for remark in free.remarks)


def test_nothing_is_lost_where_widths_are_even_anyway(tmp_path: Path) -> None:
    dense = write(tmp_path / "in")
    recipe = pr.Recipe(pr.magnitude, pr.Depth())
    plan = pr.plan(dense, BATCH, recipe, target=pr.Params(0.8), loadable="transformers")
    (line,) = [remark for remark in plan.remarks if "from_pretrained reads it" in remark]
    here, there = re.findall(r"([\d.]+)%", line)
    free = pr.plan(dense, BATCH, recipe, target=pr.Params(0.8)).keep
    assert here == there and plan.keep.keys() == free.keys() > set()
    assert all(torch.equal(mask, free[name]) for name, mask in plan.keep.items())


def test_it_is_for_models_of_transformers_and_known_readers(tmp_path: Path) -> None:
    net, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(2, 8)
    with pytest.raises(RequestError, match="is not a model of transformers"):
        pr.plan(net, x, target=pr.Params(0.5), loadable="transformers")
    with pytest.raises(RequestError, match="names no reader"):
        pr.plan(net, x, target=pr.Params(0.5), loadable="keras")  # type: ignore[arg-type]
