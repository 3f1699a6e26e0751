"""Text that a language model writes itself: calibration data without a file."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunella.errors import CheckFailed, NotSupported, RequestError
from prunella.io.identity import digest_of
from prunella.model.forward import first_tensor, forward
from prunella.model.state import mode
from prunella.model.unwrap import unwrap
from prunella.types import Inputs, TokenIds

SPARE = 0.25
"""Fraction of additional windows that are written; those of the highest and the lowest loss are left out."""
_GIVE_TEXT = "pass batches of text by data="
OnWindows = Callable[[int, int], None]
"""Called after each batch with the number of windows that are written, and of all windows."""


@dataclass(frozen=True)
class OwnText:
    """Windows `(windows, tokens)` that a model wrote, and the settings to write them again.

    losses: of each window, the mean negative log-likelihood in nats of the drawn tokens. discarded: number of windows
    left out because of their loss.
    """

    tokens: TokenIds
    losses: tuple[float, ...]
    seed: int
    discarded: int

    @property
    def digest(self) -> str:
        """The digest of the tokens."""
        return digest_of(self.tokens)


@torch.no_grad()
def own_text(
    model: nn.Module,
    *,
    nsamples: int = 128,
    seqlen: int = 512,
    seed: int = 0,
    batch_size: int = 16,
    inputs: Inputs | None = None,
    on_windows: OnWindows | None = None,
) -> OwnText:
    """Text sampled from the model at temperature 1, in windows, filtered by its own perplexity (arXiv:2410.17711).

    Half of the windows begin with the first token of the model's texts (BOS), half with a random token, all if it has
    no BOS: `x_t ~ p(x | x_1 .. x_{t-1})`. After the end of a text (EOS) the next one begins in the same window. A
    quarter more windows are written than requested: in each half those of the lowest loss, which are repetitive, and
    those of the highest loss, which are incoherent, are left out. Each window has its own random numbers from `seed`,
    so that `batch_size` changes time and memory, but no draw; rounding may still differ between machines.
    Data: none.

    nsamples, seqlen: windows, and tokens in each. inputs: an example batch, which shows how the model takes tokens: a
    mapping with one integer tensor `(rows, tokens)`, or the tensor; None is `{"input_ids": tokens}`. Models with
    `past_key_values` read each token once, others the whole window for each token. Errors: NotSupported for a model
    that does not give logits of the next token, RequestError for a window longer than its positions.

    Use: calibration of a language model for any use. Avoid: one known domain: its own text is better.
    """
    root = unwrap(model)
    if nsamples < 1 or seqlen < 2 or batch_size < 1:
        asked = f"{nsamples} windows of {seqlen} tokens, {batch_size} at a time"
        raise RequestError(
            f"{asked}, are out of range", "at least 1 window of 2 tokens, 1 at a time", "for example 128 of 512"
        )
    with mode(root, training=False):
        writer = _Writer(root, inputs, seqlen)
        starts = writer.starts(nsamples)
        written = _written(writer, starts, seed, batch_size, on_windows)
    kept = _kept(written.losses, starts, nsamples)
    tokens = torch.tensor(written.rows, device="cpu")[kept]
    return OwnText(tokens, tuple(written.losses[k] for k in kept), seed, len(starts) - nsamples)


@dataclass(frozen=True)
class _Written:
    rows: list[list[int]]
    losses: list[float]


def _written(
    writer: _Writer, starts: Sequence[bool], seed: int, batch_size: int, on_windows: OnWindows | None
) -> _Written:
    """All windows; the uniform numbers of window k depend on `seed`, not on the batches."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(len(starts), writer.seqlen, generator=generator, dtype=torch.float64, device="cpu")
    rows: list[list[int]] = []
    losses: list[float] = []
    for first in range(0, len(starts), batch_size):
        some = slice(first, first + batch_size)
        tokens, means = writer.write(starts[some], uniform[some])
        rows, losses = [*rows, *tokens.tolist()], [*losses, *means.tolist()]
        if on_windows is not None:
            on_windows(len(rows), len(starts))
    return _Written(rows, losses)


def _kept(losses: Sequence[float], starts: Sequence[bool], nsamples: int) -> list[int]:
    """The windows to keep, in order: the middle ones by loss among those with the same kind of start."""
    kept: list[int] = []
    for kind, count in zip((True, False), _halves(nsamples, starts), strict=True):
        ranked = sorted((k for k, start in enumerate(starts) if start is kind), key=lambda k: (losses[k], k))
        low = (len(ranked) - count) // 2
        kept += ranked[low : low + count]
    return sorted(kept)


def _halves(nsamples: int, starts: Sequence[bool]) -> tuple[int, int]:
    """Windows that begin with BOS and with a random token."""
    bos = nsamples - nsamples // 2 if any(starts) else 0
    return bos, nsamples - bos


class _Writer:
    """Writes windows with one model."""

    def __init__(self, model: nn.Module, inputs: Inputs | None, seqlen: int) -> None:
        self.model, self.seqlen, self.name = model, seqlen, argument_of_tokens(inputs)
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        config: Any = getattr(model, "config", None)
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        generation: Any = getattr(model, "generation_config", None)
        self.bos = next(iter(_ids(config, "bos_token_id") or _ids(generation, "bos_token_id")), None)
        self.eos = torch.tensor(
            [*_ids(config, "eos_token_id"), *_ids(generation, "eos_token_id")], dtype=torch.long, device="cpu"
        )
        limit = getattr(config, "max_position_embeddings", None)
        if isinstance(limit, int) and seqlen > limit:
            why = f"it has {limit} positions"
            raise RequestError(f"the model cannot write {seqlen} tokens", why, f"pass seqlen={limit}, or less")
        self.words = self._checked()

    def starts(self, nsamples: int) -> list[bool]:
        """For each window to write, whether it begins with BOS; the kinds take turns."""
        more = nsamples + round(SPARE * nsamples)
        return [self.bos is not None and k % 2 == 0 for k in range(more)]

    def write(self, starts: Sequence[bool], uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Windows `(rows, tokens)` and their mean losses, from uniform numbers in [0, 1)."""
        begin = (uniform * self.words).long()  # the random first token of a text without BOS
        if self.bos is not None:
            begin[torch.tensor(starts, device="cpu")] = self.bos
        tokens, cache = begin[:, :1], None
        loss, drawn = (torch.zeros(len(starts), dtype=torch.float64, device="cpu") for _ in range(2))
        for place in range(1, self.seqlen):
            logits, cache = self._next(tokens[:, -1:] if cache is not None else tokens, cache)
            word, nats = _drawn(logits, uniform[:, place])
            ended = torch.isin(tokens[:, -1], self.eos)
            word = torch.where(ended, begin[:, place], word)
            loss += nats.masked_fill(ended, 0.0)
            drawn += (~ended).double()
            tokens = torch.cat([tokens, word[:, None]], 1)
        return tokens, loss / drawn.clamp(min=1)

    def _next(self, tokens: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Logits `(rows, words)` of the next token, and the cache of a model that has one."""
        batch: Any = tokens.to(self.device)
        batch = batch if self.name is None else {self.name: batch}
        if isinstance(batch, dict) and _takes_cache(self.model):
            batch |= {"use_cache": True, "past_key_values": cache}
        output = self.model(**batch) if isinstance(batch, dict) else forward(self.model, batch)
        logits = _logits(output)[:, -1].float().cpu()
        if not bool(torch.isfinite(logits).all()):
            raise CheckFailed("the model cannot write text", "its logits are not finite", "check its weights")
        return logits, getattr(output, "past_key_values", None)

    def _checked(self) -> int:
        """The size of the vocabulary. Errors: NotSupported unless logits depend on earlier tokens only."""
        what = "the model cannot write its own calibration text"
        tokens = torch.zeros(1, min(4, self.seqlen), dtype=torch.long, device=self.device)
        other = tokens.clone()
        other[:, -1] = 1
        pair = [_logits(forward(self.model, x if self.name is None else {self.name: x})) for x in (tokens, other)]
        if any(logits.dim() != 3 or logits.shape[:2] != tokens.shape for logits in pair):
            raise NotSupported(what, "its output is not logits (rows, tokens, words)", _GIVE_TEXT)
        first, second = (logits[:, :-1] for logits in pair)
        if not torch.allclose(first, second, rtol=1e-3, atol=1e-4, equal_nan=True):
            raise NotSupported(what, "its logits depend on later tokens", _GIVE_TEXT)
        return int(pair[0].shape[-1])


def _logits(output: Any) -> Tensor:
    named = getattr(output, "logits", None)
    return named if isinstance(named, Tensor) else first_tensor(output)


def _takes_cache(model: nn.Module) -> bool:
    """Whether the model has a cache of keys and values, like those of transformers."""
    return {"past_key_values", "use_cache"} <= set(inspect.signature(type(model).forward).parameters)


def _drawn(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """The token at the quantile of the uniform number, and its negative log-likelihood."""
    logs = logits.log_softmax(-1)
    total = logs.exp().cumsum(-1, dtype=torch.float64)
    word = torch.searchsorted(total, (uniform * total[:, -1])[:, None], right=True)
    word = word.clamp(max=logits.shape[-1] - 1)
    return word[:, 0], -logs.gather(1, word)[:, 0]


def argument_of_tokens(inputs: Inputs | None) -> str | None:
    """The argument that takes tokens, None for the only one. Errors: NotSupported if `inputs` has no tokens."""
    if inputs is None:
        return "input_ids"
    entries: list[tuple[str | None, object]] = [*inputs.items()] if isinstance(inputs, Mapping) else [(None, inputs)]
    for name, value in entries:
        if isinstance(value, Tensor) and value.dim() == 2 and not value.is_floating_point():
            return name
    why = "the example batch has no integer tensor (rows, tokens)"
    raise NotSupported("the model cannot write its own calibration text", why, _GIVE_TEXT)


def _ids(config: Any, name: str) -> list[int]:
    """The token ids of a configuration under this name: none, one or several."""
    value = getattr(config, name, None)
    values = value if isinstance(value, list | tuple) else [value]
    return [entry for entry in values if isinstance(entry, int)]
