"""Calibration text: samples of consecutive tokens, drawn with a seed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunella.errors import BadInput, RequestError
from prunella.io.files import reading
from prunella.io.load import import_transformers
from prunella.io.untrusted import check_regular


def text_samples(
    folder: str | Path, text: str | Path, *, nsamples: int = 128, seqlen: int = 512, seed: int = 0
) -> list[dict[str, Tensor]]:
    """`nsamples` random samples of `seqlen` tokens of a text file, as batches of one, by the tokenizer in `folder`.

    Samples may overlap. No first token is added: a sample is from the middle of the text. Errors: BadInput for a folder
    without a tokenizer or a file that is not text, RequestError for a text shorter than one sample.
    """
    if nsamples < 1 or seqlen < 2:
        raise RequestError(f"{nsamples} samples of {seqlen} tokens are not data", "at least 1 of 2", "128 of 512")
    ids = text_tokens(folder, text)
    starts = sample_starts(len(ids), text, nsamples=nsamples, seqlen=seqlen, seed=seed)
    return [{"input_ids": ids[start : start + seqlen][None]} for start in starts]


def sample_starts(tokens: int, text: str | Path, *, nsamples: int, seqlen: int, seed: int) -> list[int]:
    """Where the samples of a text of so many tokens begin. Errors: RequestError if it is shorter than one."""
    if tokens < seqlen:
        why = f"it has {tokens} tokens, and a sample has {seqlen}"
        raise RequestError(f"the text in {text} is too short", why, "give more text, or a smaller seqlen")
    generator = torch.Generator().manual_seed(seed)
    starts: list[int] = torch.randint(0, tokens - seqlen + 1, (nsamples,), generator=generator, device="cpu").tolist()
    return starts


def windows_between(tokens: int, starts: Sequence[int], *, seqlen: int, window: int) -> list[int]:
    """Where windows begin that overlap neither a sample nor each other: what a text has left to judge by."""
    free, place = list[int](), 0
    for start in [*sorted(starts), tokens]:
        free += range(place, start - window + 1, window)
        place = max(place, start + seqlen)
    return free


def text_tokens(folder: str | Path, text: str | Path) -> Tensor:
    """All tokens `(tokens,)` of a text file by the tokenizer in `folder`, none added. Errors: as `text_samples`."""
    try:
        with reading(text, f"cannot read {text}"):
            content = check_regular(Path(text), f"cannot read {text}").read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"cannot read {text}", str(error), "give a UTF-8 text file") from error
    tokens: Tensor = tokenizer_of(folder)(
        content, return_tensors="pt", add_special_tokens=False, verbose=False
    ).input_ids[0]
    return tokens


def tokenizer_of(folder: str | Path) -> Any:
    """The tokenizer in a folder. Errors: BadInput for a folder without one."""
    kind = import_transformers().AutoTokenizer
    try:
        return kind.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises OSError, ValueError or its own by what is missing
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise BadInput(f"{folder} has no tokenizer", why, "give batches instead: --data module:function") from error
