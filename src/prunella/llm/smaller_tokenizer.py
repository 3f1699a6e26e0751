"""The tokenizer of a model whose vocabulary was pruned: the same cuts of a text, with the numbers of the smaller model.

Works on the description that tokenizers writes (tokenizer.json): byte pairs, word pieces, words and unigrams.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from prunella.errors import NotSupported

_WHAT = "no tokenizer fits the smaller model"


def closed(tokenizer: Any, tokens: Iterable[int]) -> set[int]:
    """The tokens, with all that a text needs to be cut into them: the parts that are merged, and single characters."""
    model = _described(tokenizer)["model"]
    vocabulary = _vocabulary(model)
    words = {token: word for word, token in vocabulary.items()}
    parts: dict[str, tuple[str, str]] = {}
    for first, second in _merges(model):
        parts.setdefault(first + second, (first, second))
    kept, todo = set(tokens), list(tokens)
    while todo:
        for part in parts.get(words.get(todo.pop(), ""), ()):
            token = vocabulary.get(part)
            if token is not None and token not in kept:
                kept.add(token)
                todo.append(token)
    single = {token for word, token in vocabulary.items() if len(word) == 1 or _is_byte(word)}
    unknown = model.get("unk_token")
    return kept | single | ({vocabulary[unknown]} if unknown in vocabulary else set())


def smaller(tokenizer: Any, kept: Tensor) -> Any:
    """A tokenizer with the kept tokens alone, numbered from 0 in their order. Errors: NotSupported for another kind."""
    import tokenizers
    import transformers

    described = _described(tokenizer)
    new = {int(old): number for number, old in enumerate(kept.tolist())}
    described["model"] = _smaller_model(described["model"], new)
    described["added_tokens"] = [
        {**entry, "id": new[entry["id"]]} for entry in described.get("added_tokens") or () if entry["id"] in new
    ]
    described["post_processor"] = _renumbered(described.get("post_processor"), new)
    try:
        inner = tokenizers.Tokenizer.from_str(json.dumps(described))
    except Exception as error:  # tokenizers raises plain Exception
        raise NotSupported(_WHAT, str(error).splitlines()[0], "keep the vocabulary") from error
    special = {name: value for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    kind: Any = transformers.PreTrainedTokenizerFast
    made = kind(tokenizer_object=inner, **special)
    made.chat_template = getattr(tokenizer, "chat_template", None)
    made.model_max_length = tokenizer.model_max_length
    return made


def cuts_alike(tokenizer: Any, other: Any, kept: Tensor, text: str) -> bool:
    """Whether both cut a text into the same words."""
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids, device="cpu")
    numbers = other(text, add_special_tokens=False, verbose=False).input_ids
    return bool(torch.isin(ids, kept).all()) and torch.searchsorted(kept, ids).tolist() == numbers


def _described(tokenizer: Any) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise NotSupported(_WHAT, f"{type(tokenizer).__name__} has no tokenizer.json", "keep the vocabulary")
    described: dict[str, Any] = json.loads(backend.to_str())
    return described


def _vocabulary(model: Mapping[str, Any]) -> dict[str, int]:
    vocabulary = model.get("vocab") or {}
    if isinstance(vocabulary, list):
        return {str(entry[0]): number for number, entry in enumerate(vocabulary)}
    return dict(vocabulary)


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model.get("merges") or ())
    return [(first, second) for first, second in pairs]


def _smaller_model(model: Mapping[str, Any], new: Mapping[int, int]) -> dict[str, Any]:
    vocabulary = model.get("vocab")
    result = dict(model)
    if isinstance(vocabulary, list):
        result["vocab"] = [entry for number, entry in enumerate(vocabulary) if number in new]
        result["unk_id"] = new.get(model.get("unk_id", -1))
    else:
        result["vocab"] = {word: new[token] for word, token in _vocabulary(model).items() if token in new}
    if "merges" in model:
        words = result["vocab"]
        result["merges"] = [[a, b] for a, b in _merges(model) if a in words and b in words and a + b in words]
    return result


def _renumbered(part: Any, new: Mapping[int, int]) -> Any:
    """The description of what is put around a text: `ids`, and pairs of a word and its number."""
    if isinstance(part, dict):
        return {key: [new[i] for i in value if i in new] if key == "ids" else _renumbered(value, new)
                for key, value in part.items()}  # fmt: skip
    if isinstance(part, list):
        pair = len(part) == 2 and isinstance(part[0], str) and type(part[1]) is int
        return [part[0], new.get(part[1], 0)] if pair else [_renumbered(entry, new) for entry in part]
    return part


def _is_byte(word: str) -> bool:
    return len(word) == 6 and word.startswith("<0x") and word.endswith(">")
