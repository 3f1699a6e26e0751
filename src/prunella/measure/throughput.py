"""Throughput of language models: prefill and decode in tokens a second, compared to the dense model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from prunella.errors import NotSupported, RequestError
from prunella.measure.text import short_count
from prunella.measure.timing import Comparison, compare_latency
from prunella.model.state import mode
from prunella.registry.method import metric
from prunella.types import TokenIds


@dataclass(frozen=True)
class Throughput:
    """Prefill: prompt tokens read per second; decode: tokens written per second, one at a time with a cache.

    prompt: tokens per row; new: tokens written per round; batch: number of rows.
    """

    prefill: Comparison
    decode: Comparison
    prompt: int
    new: int
    batch: int

    def rates(self) -> dict[str, tuple[float, float]]:
        """Tokens per second, dense and pruned, of prefill and decode."""
        pairs = {"prefill": (self.prefill, self.prompt), "decode": (self.decode, self.new)}
        by_name = {}
        for name, (times, tokens) in pairs.items():
            first, second = (self.batch * tokens / latency.median for latency in times.latencies)
            by_name[name] = first, second
        return by_name

    def data(self) -> dict[str, Any]:
        """As plain data."""
        ratios = {name: asdict(times.ratio) for name, times in (("prefill", self.prefill), ("decode", self.decode))}
        return {"rates": self.rates(), "ratios": ratios, "threads": self.prefill.threads, "prompt": self.prompt,
                "new": self.new, "batch": self.batch}  # fmt: skip

    def __str__(self) -> str:
        lines = []
        for name, times in (("prefill", self.prefill), ("decode", self.decode)):
            dense, small = self.rates()[name]
            lines.append(f"{name}: {short_count(dense)} -> {short_count(small)} tokens a second, {times.ratio.verdict}")
        how = f"{self.batch} x {self.prompt} tokens read, {self.new} written; medians of {self.prefill.rounds} "
        return "\n".join([*lines, f"{how}interleaved rounds, {self.prefill.threads} threads, {self.prefill.device}"])


@metric(source="Efron 1979, doi:10.1214/aos/1176344552 (interval)")
def throughput(
    dense: nn.Module, small: nn.Module, tokens: TokenIds, *, new: int = 16, rounds: int = 20, seed: int = 0
) -> Throughput:
    """Prefill and decode of a transformers model in tokens per second, dense and pruned in interleaved rounds.

    `batch * prompt / seconds` for one pass over the prompt without a cache, `batch * new / seconds` for `new` single
    tokens after it, decoded greedily, with the cache cut back to the prompt after every round. The
    ratio is of medians, with a 95 % bootstrap interval over rounds. Data: a prompt `(batch, tokens)`.

    new: tokens written in a round. rounds: at least 5. seed: of the order within rounds.
    Errors: NotSupported for models without a cache that can be cut back.

    Use: the effect of pruned width or depth on this machine. Avoid: predictions for another machine, batch or number of
    threads.
    """
    if tokens.dim() != 2 or not tokens.numel() or new < 1:
        shape = tuple(tokens.shape)
        raise RequestError("throughput needs a prompt (batch, tokens)", f"got shape {shape} and new={new}", "new=16")
    device, models = str(tokens.device), {"dense": dense, "pruned": small}
    with mode(dense, training=False), mode(small, training=False), torch.no_grad():
        compare = partial(compare_latency, rounds=rounds, warmup=1, device=device, seed=seed)
        read = compare({name: partial(model, input_ids=tokens, use_cache=False) for name, model in models.items()})
        write = compare({name: _writer(model, tokens, new) for name, model in models.items()})
    return Throughput(read, write, tokens.shape[1], new, tokens.shape[0])


def _writer(model: nn.Module, tokens: Tensor, new: int) -> Callable[[], Tensor]:
    """A function that writes `new` tokens after the prompt, and restores the cache."""
    first: Any = model(input_ids=tokens, use_cache=True)
    cache: Any = getattr(first, "past_key_values", None)
    if not hasattr(cache, "crop"):
        why = f"{type(model).__name__} keeps {type(cache).__name__}, which cannot be cut back"
        raise NotSupported("decode cannot be timed", why, "time generate() with compare_latency")

    def run() -> Tensor:
        word: Tensor = first.logits[:, -1:].argmax(-1)
        for _ in range(new):
            output: Any = model(input_ids=word, past_key_values=cache, use_cache=True)
            word = output.logits[:, -1:].argmax(-1)
        cache.crop(-new)
        return word

    return run
