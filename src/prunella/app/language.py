"""A pruned language model beside the dense one: perplexity, agreement, a sample of text, tokens a second."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunella.errors import NotSupported, PruningError, RequestError
from prunella.llm.calibration import AUTO, Calibration
from prunella.llm.generate import continued
from prunella.llm.own_text import own_text
from prunella.llm.text import sample_starts, text_tokens, windows_between
from prunella.measure.text import percent, short_count, significant
from prunella.measure.throughput import Throughput, throughput
from prunella.metrics.language import TokenAgreement, perplexity, token_agreement
from prunella.model.forward import first_tensor, forward
from prunella.model.state import mode
from prunella.reporting.section import Section

_PROMPT, _WRITTEN = 16, 48
"""Tokens of a prompt, and most tokens that a model writes behind it."""
_READ, _ROUNDS = 128, 7
"""Most tokens of the prompt of a measurement of speed, and its rounds."""
Renumber = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class HeldOut:
    """Windows of text that nothing was fitted to, `(windows, tokens)`. where: in words. note: what to know of them."""

    tokens: Tensor
    where: str
    note: str = ""

    @property
    def few(self) -> list[dict[str, Tensor]]:
        """A quarter of the windows as batches, to compare whole distributions on."""
        return [{"input_ids": row[None]} for row in self.tokens[: -(-len(self.tokens) // 4)]]

    def perplexity(self, model: nn.Module, renumber: Renumber | None = None) -> float:
        """Of a model on all windows."""
        tokens = self.tokens if renumber is None else renumber(self.tokens)
        return perplexity(model, tokens.flatten().to(_device(model)), window=tokens.shape[1]).value

    def known_to(self, kept: Tensor) -> HeldOut:
        """The windows whose tokens are all kept. Errors: NotSupported if there is none."""
        known = torch.isin(self.tokens, kept).all(1)
        if not bool(known.any()):
            why = f"each of the {self.where} has a token that was pruned"
            raise NotSupported("nothing is left to judge by", why, "calibrate on text of the same kind")
        missing = int((~known).sum())
        note = f"{missing} more windows have tokens that were pruned" if missing else ""
        return HeldOut(self.tokens[known], self.where, "; ".join(filter(None, [self.note, note])))


def _device(model: nn.Module) -> torch.device:
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def held_out_file(folder: Path, file: str | Path, *, samples: int, seqlen: int) -> HeldOut:
    """The first windows of a text, one behind the other. A text shorter than one is one window."""
    tokens = text_tokens(folder, file)
    window = min(seqlen, len(tokens))
    if window < 2:
        raise RequestError(f"{file} has {len(tokens)} tokens", "a window has 2 at least", "give more text")
    count = min(samples, len(tokens) // window)
    return _windows(tokens, [k * window for k in range(count)], window, Path(file).name)


def held_out_of(folder: Path, calibration: Calibration, *, samples: int, seqlen: int) -> HeldOut | None:
    """Windows of the calibration text that calibrate nothing; None if the model writes all of its text itself.

    If the samples leave no room, the text is taken from its start, with a note: numbers on it are too good.
    """
    counts = {name: count for name, count in calibration.windows.items() if name != AUTO}
    if not counts:
        return None
    name = max(counts, key=lambda name: calibration.shares[name])
    tokens, size = text_tokens(folder, name), calibration.seqlen
    starts = sample_starts(len(tokens), name, nsamples=counts[name], seqlen=size, seed=calibration.seed)
    for window in dict.fromkeys((seqlen, seqlen // 2, seqlen // 4, size)):
        free = windows_between(len(tokens), starts, seqlen=size, window=window) if window > 1 else []
        if len(free) >= min(samples, 4):
            step = len(free) / min(samples, len(free))
            chosen = [free[int(k * step)] for k in range(min(samples, len(free)))]
            return _windows(tokens, chosen, window, f"{Path(name).name}", apart=True)
    whole = held_out_file(folder, name, samples=samples, seqlen=seqlen)
    note = f"{Path(name).name} calibrates too, so that numbers on it are too good: give another text by --text"
    return HeldOut(whole.tokens, whole.where, note)


def held_out_by(model: nn.Module, *, samples: int, seqlen: int, seed: int) -> HeldOut:
    """Text that the dense model writes, with another seed than that of its calibration."""
    own = own_text(model, nsamples=samples, seqlen=seqlen, seed=seed + 1)
    where = f"{len(own.tokens)} windows of {seqlen} tokens that the dense model wrote"
    return HeldOut(own.tokens, where, "the dense model is at its best on its own text: give another text by --text")


def _windows(tokens: Tensor, starts: Sequence[int], window: int, name: str, *, apart: bool = False) -> HeldOut:
    rows = torch.stack([tokens[start : start + window] for start in starts])
    return HeldOut(rows, f"{len(rows)} {'other ' if apart else ''}windows of {window} tokens of {name}")


@torch.no_grad()
def check_left_to_right(model: nn.Module, tokens: Tensor) -> None:
    """Errors: NotSupported unless the model gives logits of each next token that depend on earlier tokens only.

    The perplexity of any other model would be a number that means nothing. tokens: `(1, length)`.
    """
    what, todo = "the model has no perplexity", "judge it by a metric of its own: prunella run --metric"
    other = tokens.clone()
    other[:, -1] = other[:, 0] if int(other[0, 0]) != int(other[0, -1]) else (other[:, -1] + 1) % (other.max() + 1)
    with mode(model, training=False):
        first, second = (first_tensor(forward(model, {"input_ids": row.to(_device(model))})) for row in (tokens, other))
    if first.dim() != 3 or first.shape[:2] != tokens.shape:
        raise NotSupported(what, f"its output is {tuple(first.shape)}, not logits (rows, tokens, words)", todo)
    if not torch.allclose(first[:, :-1], second[:, :-1], rtol=1e-3, atol=1e-4, equal_nan=True):
        raise NotSupported(what, "its logits depend on later tokens", todo)


@dataclass(frozen=True)
class JudgedLM:
    """Two language models side by side. perplexity: dense and pruned. samples: the prompt, then what each writes.

    left_out: what could not be measured, and why.
    """

    where: str
    note: str
    perplexity: tuple[float, float]
    agreement: TokenAgreement | None = None
    samples: tuple[str, str, str] | None = None
    speed: Throughput | None = None
    left_out: tuple[str, ...] = ()

    @property
    def rows(self) -> tuple[tuple[str, str, str], ...]:
        """Measure, dense, pruned."""
        dense, small = map(significant, self.perplexity)
        rows = [("perplexity", dense, small)]
        if self.agreement is not None:
            rows.append(("same most likely token as the dense model", "", percent(self.agreement.top1)))
            rows.append(("KL from the dense model, nats a token", "", significant(self.agreement.kl)))
        if self.speed is not None:
            for name, rates in self.speed.rates().items():
                dense, small = map(short_count, rates)
                rows.append((f"{name}, tokens a second", dense, small))
        return tuple(rows)

    def data(self) -> dict[str, Any]:
        """As plain data."""
        agreement = None if self.agreement is None else asdict(self.agreement)
        return {
            "text": self.where, "note": self.note, "perplexity": list(self.perplexity), "agreement": agreement,
            "samples": self.samples and dict(zip(("prompt", "dense", "pruned"), self.samples, strict=True)),
            "speed": self.speed and self.speed.data(), "left_out": list(self.left_out),
        }  # fmt: skip

    def sections(self) -> tuple[Section, ...]:
        """For the report page."""
        lead = "; ".join(filter(None, [f"on {self.where}", self.note, *self.left_out]))
        sections = [Section("As a language model", lead, ("measure", "dense", "pruned"), self.rows)]
        if self.speed is not None:
            lines = str(self.speed).splitlines()
            sections.append(Section("Tokens a second", "; ".join(lines)))
        if self.samples is not None:
            prompt, *written = self.samples
            rows = tuple(zip(("dense", "pruned"), written, strict=True))
            sections.append(Section("A sample of text", f"behind: {prompt}", ("model", "the likeliest words"), rows))
        return tuple(sections)

    def __str__(self) -> str:
        return "\n\n".join(map(str, self.sections()))


def judge_lm(
    dense: nn.Module,
    small: nn.Module,
    held_out: HeldOut,
    *,
    tokenizer: Any = None,
    small_tokens: Renumber | None = None,
    large_tokens: Renumber | None = None,
) -> JudgedLM:
    """Both models on the same windows. small_tokens, large_tokens: from the numbers of the dense model, and back.

    What a model cannot do (write text, keep a cache) is left out, with the reason; perplexity has to be measured.
    Errors: those of `check_left_to_right`.
    """
    check_left_to_right(dense, held_out.tokens[:1])
    values = held_out.perplexity(dense), held_out.perplexity(small, small_tokens)
    left: list[str] = []

    def tried(what: str, measure: Callable[[], Any]) -> Any:
        try:
            return measure()
        except PruningError as error:
            left.append(f"{what} is left out: {error.why or error.what}")
            return None

    prompt = held_out.tokens[:1].to(_device(dense))
    if small_tokens is None:
        few = [{"input_ids": batch["input_ids"].to(_device(dense))} for batch in held_out.few]
        agreement = tried("agreement", lambda: token_agreement(dense, small, few))
        speed = tried("speed", lambda: throughput(dense, small, prompt[:, :_READ], rounds=_ROUNDS))
    else:
        agreement = speed = None
        left.append("agreement and speed are left out: the models have other tokens")
    samples = tried("a sample", lambda: _samples(dense, small, prompt, tokenizer, small_tokens, large_tokens))
    return JudgedLM(held_out.where, held_out.note, values, agreement, samples, speed, tuple(left))


def _samples(
    dense: nn.Module,
    small: nn.Module,
    row: Tensor,
    tokenizer: Any,
    small_tokens: Renumber | None,
    large_tokens: Renumber | None,
) -> tuple[str, str, str]:
    """The prompt, and what the models write behind it."""
    if tokenizer is None:
        raise NotSupported("no text can be shown", "there is no tokenizer", "")
    prompt = row[:, : min(_PROMPT, row.shape[1] - 1)]
    first = continued(dense, prompt, new=_WRITTEN)
    second = continued(small, prompt if small_tokens is None else small_tokens(prompt), new=_WRITTEN)
    second = second if large_tokens is None else large_tokens(second)
    written = [str(tokenizer.decode(tokens.tolist())) for tokens in (prompt[0], first, second)]
    return written[0], written[1], written[2]
