"""A tokenizer with some of the tokens cuts their texts as the whole one does."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from prunella.errors import NotSupported
from prunella.llm.smaller_tokenizer import closed, cuts_alike, smaller

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")
TEXTS = [
    "the cat sat on the mat and the rat ran at the cat",
    "thirty three thieves thought that they thrilled the throne",
]
OTHER = "zebras quiz lazy foxes"


def _unigram() -> Any:
    """Words and letters with scores."""
    words = sorted({word for text in [*TEXTS, OTHER] for word in text.split()})
    pieces = [(word, -2.0) for word in words if len(word) > 1] + [(chr(k), -9.0) for k in range(97, 123)]
    return tokenizers.models.Unigram([("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *pieces], 0)


def tokenizer(kind: str) -> Any:
    """A small tokenizer of a kind, trained on the texts."""
    models, trainers, pre = tokenizers.models, tokenizers.trainers, tokenizers.pre_tokenizers
    shared = {"special_tokens": ["<unk>", "<s>", "</s>"], "show_progress": False}
    model, trainer = {
        "bpe": (models.BPE, partial(trainers.BpeTrainer, vocab_size=400, initial_alphabet=pre.ByteLevel.alphabet())),
        "words": (partial(models.WordLevel, unk_token="<unk>"), trainers.WordLevelTrainer),
        "pieces": (partial(models.WordPiece, unk_token="<unk>"), partial(trainers.WordPieceTrainer, vocab_size=90)),
        "unigram": (_unigram, None),
    }[kind]
    made = tokenizers.Tokenizer(model())
    made.pre_tokenizer = pre.ByteLevel(add_prefix_space=False) if kind == "bpe" else pre.Whitespace()
    if trainer is not None:
        made.train_from_iterator([*TEXTS, OTHER], trainer(**shared))
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.mark.parametrize("kind", ["bpe", "words", "pieces", "unigram"])
def test_texts_of_kept_tokens_are_cut_alike(kind: str, tmp_path: Any) -> None:
    whole = tokenizer(kind)
    used = {token for text in TEXTS for token in whole(text).input_ids}
    kept = torch.tensor(sorted(closed(whole, used | set(whole.all_special_ids))))
    made = smaller(whole, kept)
    assert len(made) == len(kept) < len(whole)
    assert all(cuts_alike(whole, made, kept, text) for text in TEXTS)
    for text in TEXTS:  # with what is put around a text, and after a round on the disk
        made.save_pretrained(tmp_path)
        again = transformers.AutoTokenizer.from_pretrained(tmp_path)
        assert kept[again(text).input_ids].tolist() == whole(text).input_ids
        assert again.decode(again(text).input_ids) == whole.decode(whole(text).input_ids)
    assert (made.bos_token_id, made.eos_token_id) == tuple(torch.searchsorted(kept, torch.tensor([1, 2])).tolist())


def test_merges_need_their_parts() -> None:
    whole = tokenizer("bpe")
    word = whole("the", add_special_tokens=False).input_ids
    assert len(word) == 1
    kept = closed(whole, word)
    pairs = {whole.convert_tokens_to_ids(part) for part in ("t", "h", "e")}
    assert pairs < kept and len(kept) > 256


def test_a_text_with_a_pruned_word_is_not_alike() -> None:
    whole = tokenizer("words")
    kept = torch.tensor(sorted(closed(whole, whole(TEXTS[0]).input_ids)))
    assert not cuts_alike(whole, smaller(whole, kept), kept, OTHER)


def test_a_tokenizer_without_a_description_is_refused() -> None:
    with pytest.raises(NotSupported, match="no tokenizer fits"):
        closed(object(), {1})
