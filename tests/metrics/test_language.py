"""Perplexity and agreement against sums over single tokens; the harness against a stand-in of its interface."""

from __future__ import annotations

import math
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunella as pr
from prunella.errors import BadInput, MissingExtra, RequestError
from tests.llm.nets import language_model, windows

TEXT = torch.randint(0, 61, (50,), generator=torch.Generator().manual_seed(3))


def surprise(model: nn.Module, start: int, place: int) -> float:
    """-log p of one token after all those from `start` on, alone in a batch."""
    with torch.no_grad():
        logits = model(input_ids=TEXT[start:place][None]).logits[0, -1].double()
    return -float(logits.log_softmax(-1)[TEXT[place]])


def test_without_overlap_every_token_but_the_first_of_each_whole_window_is_scored() -> None:
    model = language_model()
    found = pr.metrics.perplexity(model, TEXT, window=12)
    single = [surprise(model, start, t) for start in range(0, 48, 12) for t in range(start + 1, start + 12)]
    assert found.scored == len(single) == 44 and found.windows == 4
    assert found.loss == pytest.approx(sum(single) / 44, rel=1e-5)
    assert found.value == pytest.approx(math.exp(found.loss), rel=1e-9)
    assert "44 tokens (4 windows of 12 every 12, first of each not scored)" in str(found)
    first = pr.metrics.perplexity(model, TEXT, window=12, limit=1)
    assert first.loss == pytest.approx(sum(single[:11]) / 11, rel=1e-5) and first.windows == 1


def test_with_overlap_every_token_but_the_first_is_scored_once_in_the_first_window_that_reaches_it() -> None:
    model = language_model()
    found = pr.metrics.perplexity(model, TEXT, window=12, stride=5)
    single = [surprise(model, 0, t) for t in range(1, 12)]
    for start in range(5, 50, 5):
        single += [surprise(model, start, t) for t in range(start + 7, min(start + 12, 50))]
    assert found.scored == len(single) == 49
    assert found.loss == pytest.approx(sum(single) / 49, rel=1e-5)
    assert "all scored once but the first of the text" in str(found)


class Certain(nn.Module):
    """Says the same of every next word."""

    def __init__(self, row: list[float]) -> None:
        super().__init__()
        self.row = nn.Parameter(torch.tensor(row))

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.row.expand(*input_ids.shape, len(self.row))


def test_a_uniform_guess_has_the_perplexity_of_the_vocabulary() -> None:
    model = Certain([0.0] * 7).train()
    found = pr.metrics.perplexity(model, torch.randint(0, 7, (3000,)), window=1500)
    assert found.value == pytest.approx(7, rel=1e-9) and model.training


def test_agreement_by_hand() -> None:
    one, other = (
        Certain([math.log(0.5), math.log(0.25), math.log(0.25)]),
        Certain([math.log(0.25), math.log(0.5), math.log(0.25)]),
    )
    found = pr.metrics.token_agreement(one, other, [{"input_ids": torch.zeros(2, 5, dtype=torch.int64)}])
    assert found.kl == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2), rel=1e-5)
    assert found.top1 == 0 and found.tokens == 10 and "10 tokens" in str(found)
    back = pr.metrics.token_agreement(other, other, [{"input_ids": torch.zeros(2, 5, dtype=torch.int64)}])
    assert back.kl == pytest.approx(0, abs=1e-12) and back.top1 == 1


def test_agreement_is_a_mean_over_all_tokens_of_all_batches() -> None:
    dense, small = language_model(), language_model(hidden_size=16)
    data = [windows(1, length=4)[0], windows(1, length=20, seed=2)[0]]
    each = [pr.metrics.token_agreement(dense, small, [batch]) for batch in data]
    both = pr.metrics.token_agreement(dense, small, data)
    assert both.kl == pytest.approx((each[0].kl * 16 + each[1].kl * 80) / 96, rel=1e-9)
    with torch.no_grad():
        logits = [torch.cat([m(**b).logits.flatten(0, 1) for b in data]) for m in (dense, small)]
    assert both.kl == pytest.approx(pr.metrics.kl_divergence(*logits), rel=1e-6)
    assert both.top1 == pytest.approx(1 - pr.metrics.flip_rate(*logits))


def test_what_cannot_be_measured_is_said() -> None:
    model = Certain([0.0] * 7)
    with pytest.raises(RequestError, match="shorter than one window"):
        pr.metrics.perplexity(model, torch.zeros(9, dtype=torch.int64), window=10)
    for odd in ({"window": 1}, {"window": 4, "stride": 5}, {"window": 4, "stride": 0}, {"window": 4, "limit": 0}):
        with pytest.raises(RequestError, match="windows of 2 tokens"):
            pr.metrics.perplexity(model, torch.zeros(9, dtype=torch.int64), **odd)
    with pytest.raises(BadInput, match="not finite"):
        pr.metrics.perplexity(Certain([math.nan] * 3), torch.zeros(9, dtype=torch.int64), window=4)
    with pytest.raises(RequestError, match="one vocabulary"):
        pr.metrics.token_agreement(
            Certain([0.0] * 7), Certain([0.0] * 6), [{"input_ids": torch.zeros(1, 5, dtype=torch.int64)}]
        )


def test_tasks_need_the_harness_and_say_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingExtra, match="pip install lm-eval"):
        pr.metrics.zero_shot(Certain([0.0]), None, ["piqa"])
    with pytest.raises(RequestError, match="needs a task"):
        pr.metrics.zero_shot(Certain([0.0]), None, [])


def test_tasks_are_asked_of_the_harness_and_its_numbers_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    class HFLM:
        def __init__(self, **how: Any) -> None:
            asked.update(how)

    def simple_evaluate(**how: Any) -> dict[str, Any]:
        asked.update(how)
        found = {"alias": "piqa", "acc,none": 0.75, "acc_stderr,none": 0.01, "acc_norm,flexible": 1}
        return {"results": {"piqa": found}}

    harness, models, wrapper = (
        types.ModuleType(n) for n in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface")
    )
    harness.simple_evaluate, wrapper.HFLM = simple_evaluate, HFLM  # type: ignore[attr-defined]
    for module in (harness, models, wrapper):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    model = Certain([0.0])
    found = pr.metrics.zero_shot(model, "words", ["piqa"], limit=5, shots=2, batch=3)
    assert found == {"piqa": {"acc": 0.75, "acc_norm,flexible": 1.0}}
    assert asked["pretrained"] is model and asked["tokenizer"] == "words" and asked["batch_size"] == 3
    assert asked["tasks"] == ["piqa"] and asked["num_fewshot"] == 2 and asked["limit"] == 5
    assert isinstance(asked["model"], HFLM)
