"""Text that a model writes itself: drawn from its own distribution, filtered by its own loss, the same for a seed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunella as pr
from prunella.errors import CheckFailed, NotSupported, RequestError
from prunella.llm.own_text import _drawn, _kept
from tests.llm.streaming.models import KINDS


def built(kind: str = "Llama", **more: Any) -> nn.Module:
    """A small model of transformers with random weights."""
    transformers = pytest.importorskip("transformers")
    suffix, sizes = KINDS[kind]
    torch.manual_seed(0)
    return getattr(transformers, kind + suffix)(getattr(transformers, f"{kind}Config")(**{**sizes, **more})).eval()  # type: ignore[no-any-return]


class Chain(nn.Module):
    """The next token depends on this one only, by a table."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, words: Tensor) -> Tensor:
        return self.table[words]


@pytest.mark.parametrize("kind", ["Llama", "GPT2", "Mixtral"])
def test_the_same_seed_gives_the_same_text_whatever_the_batch(kind: str) -> None:
    model = built(kind)
    one, other = (pr.llm.own_text(model, nsamples=5, seqlen=12, seed=3, batch_size=size) for size in (16, 2))
    assert one.tokens.shape == (5, 12) and torch.equal(one.tokens, other.tokens) and one.digest == other.digest
    assert one.losses == pytest.approx(other.losses, abs=1e-5)
    assert pr.llm.own_text(model, nsamples=5, seqlen=12, seed=4).digest != one.digest


def test_the_caller_keeps_its_random_numbers_and_its_mode() -> None:
    model = built().train()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    pr.llm.own_text(model, nsamples=2, seqlen=4)
    assert torch.equal(torch.rand(1), expected) and model.training


def test_losses_are_those_of_the_model_without_a_cache() -> None:
    model = built(eos_token_id=None)
    text = pr.llm.own_text(model, nsamples=3, seqlen=12)
    for row, loss in zip(text.tokens, text.losses, strict=True):
        with torch.no_grad():
            logits = model(input_ids=row[None], use_cache=False).logits[0, :-1]
        assert float(nn.functional.cross_entropy(logits, row[1:])) == pytest.approx(loss, abs=1e-5)


def test_half_of_the_windows_begin_with_the_first_token_of_texts() -> None:
    model = built(bos_token_id=7, eos_token_id=None)
    text = pr.llm.own_text(model, nsamples=9, seqlen=4)
    assert text.tokens[:, 0].eq(7).sum() == 5 and text.discarded == 2
    others = pr.llm.own_text(built(bos_token_id=None), nsamples=9, seqlen=4).tokens[:, 0]
    assert len(set(others.tolist())) > 5


def test_after_the_end_of_a_text_the_next_one_begins() -> None:
    text = pr.llm.own_text(built(bos_token_id=7, eos_token_id=[3, *range(20, 50)]), nsamples=8, seqlen=24).tokens
    ends = torch.isin(text[:, :-1], torch.tensor([3, *range(20, 50)]))
    starts = text[:, 1:][ends]
    rows = ends.nonzero()[:, 0]
    from_bos = text[:, 0].eq(7)[rows]
    assert from_bos.any() and starts[from_bos].eq(7).all() and not starts[~from_bos].eq(7).all()
    firsts = text[:, 0][rows]
    assert not starts[~from_bos].eq(firsts[~from_bos]).all(), "each text has a beginning of its own"


def test_tokens_that_are_not_drawn_have_no_loss() -> None:
    """Token 0 ends a text, and after it each of four tokens begins the next one: only what is drawn counts."""
    chances = torch.tensor([[0.1, 0.2, 0.3, 0.4]] * 4)
    chain = Chain(chances.log())
    chain.config = SimpleNamespace(eos_token_id=0)  # type: ignore[assignment]
    text = pr.llm.own_text(chain, nsamples=6, seqlen=40, inputs=torch.zeros(1, 2, dtype=torch.long))
    for row, loss in zip(text.tokens, text.losses, strict=True):
        drawn = row[1:][row[:-1] != 0]
        assert len(drawn) < 39 and loss == pytest.approx(float(-chances[0].log()[drawn].double().mean()), abs=1e-6)


def test_tokens_follow_the_distribution_of_the_model() -> None:
    torch.manual_seed(0)
    chances = torch.rand(4, 4).softmax(1)
    text = pr.llm.own_text(Chain(chances.log()), nsamples=80, seqlen=200, inputs=torch.zeros(1, 2, dtype=torch.long))
    pairs = torch.stack([text.tokens[:, :-1].flatten(), text.tokens[:, 1:].flatten()])
    counts = torch.zeros(4, 4).index_put((pairs[0], pairs[1]), torch.ones(pairs.shape[1]), accumulate=True)
    assert torch.allclose(counts / counts.sum(1, keepdim=True), chances, atol=0.03)


def test_a_draw_is_the_token_whose_part_holds_the_number() -> None:
    chances = torch.tensor([[0.25, 0.0, 0.5, 0.25]])
    numbers = torch.tensor([0.0, 0.24, 0.25, 0.74, 0.76, 0.9999999999], dtype=torch.float64)
    words, losses = _drawn(chances.log().repeat(len(numbers), 1), numbers)
    assert words.tolist() == [0, 0, 2, 2, 3, 3]  # never 1, which has no chance
    assert torch.allclose(losses, -chances[0].log()[words])


def test_windows_of_middle_loss_are_kept_in_their_order() -> None:
    losses, starts = [5.0, 1.0, 3.0, 2.0, 4.0, 9.0, 0.0, 8.0], [True, False] * 4
    # with BOS: 5 3 4 0, without: 1 2 9 8; of each the two in the middle
    assert _kept(losses, starts, 4) == [2, 3, 4, 7]
    assert _kept(losses, [False] * 8, 4) == [0, 2, 3, 4]  # those of 5 3 2 4, without 0 1 and 8 9


def test_models_that_cannot_write() -> None:
    plain = torch.zeros(1, 2, dtype=torch.long)
    with pytest.raises(NotSupported, match="depend on later tokens"):
        pr.llm.own_text(built("Bert"), nsamples=2, seqlen=4)
    with pytest.raises(NotSupported, match="is not logits"):
        pr.llm.own_text(nn.Sequential(nn.Embedding(4, 4), nn.Flatten()), nsamples=2, seqlen=4, inputs=plain)
    with pytest.raises(CheckFailed, match="not finite"):
        pr.llm.own_text(Chain(torch.full((4, 4), float("nan"))), nsamples=2, seqlen=4, inputs=plain)


def test_requests_that_make_no_sense() -> None:
    with pytest.raises(RequestError, match="it has 64 positions"):
        pr.llm.own_text(built(), nsamples=2, seqlen=65)
    for nsamples, seqlen, batch_size in ((0, 4, 1), (2, 1, 1), (2, 4, 0)):
        with pytest.raises(RequestError, match="are out of range"):
            pr.llm.own_text(built(), nsamples=nsamples, seqlen=seqlen, batch_size=batch_size)
    with pytest.raises(NotSupported, match="no integer tensor"):
        pr.llm.own_text(built(), inputs=torch.zeros(1, 4))
