"""Metrics of language models: perplexity, agreement with the dense model, and zero-shot tasks."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunella.errors import BadInput, MissingExtra, RequestError
from prunella.model.batches import batches
from prunella.model.forward import Outputs, first_tensor, forward
from prunella.model.state import mode
from prunella.registry.method import metric
from prunella.types import TokenIds

_ROWS = 1024
"""Positions whose logits are in double precision at a time."""


@dataclass(frozen=True)
class Perplexity:
    """`value` is `exp(loss)`, `loss` the mean in nats over `scored` tokens, in windows of `window` every `stride`.

    The first token of the text is not scored, nor any token without one before it in its window.
    """

    value: float
    loss: float
    scored: int
    windows: int
    window: int
    stride: int

    def __str__(self) -> str:
        rule = "all scored once but the first of the text" if self.stride < self.window else "first of each not scored"
        where = f"{self.windows} windows of {self.window} every {self.stride}, {rule}"
        return f"perplexity {self.value:.4g} over {self.scored} tokens ({where})"


@metric(source="Jelinek et al. 1977, doi:10.1121/1.2016299")
def perplexity(
    model: nn.Module,
    tokens: TokenIds,
    *,
    window: int = 1024,
    stride: int | None = None,
    limit: int | None = None,
    outputs: Outputs = forward,
) -> Perplexity:
    """exp of the mean negative log-likelihood of a text, in windows.

    `exp(-1/N sum_t log p(x_t | x_s .. x_{t-1}))`, s the start of the window in which t is scored. Window k begins at
    `k * stride`. Without overlap (the default) every token but the first of each window is scored, and a rest shorter
    than a window is left out, as is usual for pruned language models; with a stride below the window every token but
    the first of the text is scored exactly once, in the first window that contains it; the last window may be shorter.
    Data: one row of token ids `(tokens,)`, no first token added. Losses are in float64.

    window: at least 2 tokens. stride: 1 to `window`. limit: at most so many windows. outputs: how to get logits
    `(1, tokens, words)` from the model and `{"input_ids": (1, tokens)}`.
    Errors: RequestError for windows out of range or a short text, BadInput for a loss that is not finite.

    Use: one text and one protocol for all compared models. Avoid: comparisons across tokenizers or window lengths: both
    change the perplexity.
    """
    stride = window if stride is None else stride
    if window < 2 or not 0 < stride <= window or (limit is not None and limit < 1):
        why = f"got window={window}, stride={stride}, limit={limit}"
        raise RequestError("perplexity needs windows of 2 tokens or more", why, "0 < stride <= window, limit >= 1")
    spans = list(_spans(len(tokens), window, stride))[:limit]
    if not spans:
        why = f"it has {len(tokens)} tokens, a window {window}"
        raise RequestError("the text is shorter than one window", why, "pass more text, or a smaller window")
    total, scored = 0.0, 0
    with mode(model, training=False), torch.no_grad():
        for start, new, end in spans:
            part = tokens[start:end][None]
            logits = first_tensor(outputs(model, {"input_ids": part}))[0]
            first = max(new, start + 1) - start
            total += _loss(logits[first - 1 : end - start - 1], part[0, first:])
            scored += end - start - first
    loss = total / scored
    if not math.isfinite(loss):
        raise BadInput("the loss of the model on this text is not finite", f"it is {loss}", "check weights and tokens")
    return Perplexity(math.exp(min(loss, 700.0)), loss, scored, len(spans), window, stride)


def _spans(size: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(start, first new token, end) of each window."""
    reached = 0
    for start in range(0, size, stride):
        end = min(start + window, size)
        if stride == window and end - start < window:
            return
        if end - max(reached, start + 1) > 0:
            yield start, reached, end
        reached = end
        if end == size:
            return


def _loss(logits: Tensor, targets: Tensor) -> float:
    pairs = zip(torch.split(logits, _ROWS), torch.split(targets.to(logits.device), _ROWS), strict=True)
    return sum(float(F.cross_entropy(rows.double(), ids, reduction="sum")) for rows, ids in pairs)


@dataclass(frozen=True)
class TokenAgreement:
    """A pruned language model against the dense one. kl: mean KL(dense || pruned) in nats per token.

    top1: fraction of the tokens with the same most likely word in both models.
    """

    kl: float
    top1: float
    tokens: int

    def __str__(self) -> str:
        return f"KL {self.kl:.4g} nats, same first choice {self.top1:.2%}, over {self.tokens} tokens"


@metric(source="Kullback and Leibler 1951, doi:10.1214/aoms/1177729694; Hooker et al. 2019, arXiv:1911.05248 (top-1)")
def token_agreement(
    dense: nn.Module, pruned: nn.Module, data: Iterable[Any], *, outputs: Outputs = forward
) -> TokenAgreement:
    """Agreement of the distributions of a pruned language model with those of the dense one, per token.

    `kl = mean_t sum_w p_tw (log p_tw - log q_tw)`, p of the dense logits and q of the pruned ones, in float64;
    `top1 = mean_t [argmax p_t = argmax q_t]`, ties to the lowest word. Data: batches of token windows, no labels; every
    position counts. outputs: how to get logits from (model, batch).
    Errors: RequestError for logits of different shapes.

    Use: in addition to perplexity: it needs no reference text, and shows differences that perplexity averages out.
    Avoid: models with different vocabularies.
    """
    kl, same, count = 0.0, 0, 0
    with mode(dense, training=False), mode(pruned, training=False), torch.no_grad():
        for batch in batches(data):
            dense_logits, pruned_logits = (_logits(first_tensor(outputs(model, batch))) for model in (dense, pruned))
            if dense_logits.shape != pruned_logits.shape:
                why = f"{tuple(dense_logits.shape)} against {tuple(pruned_logits.shape)}"
                raise RequestError("the logits have different shapes", why, "compare models of one vocabulary")
            for p, q in zip(torch.split(dense_logits, _ROWS), torch.split(pruned_logits, _ROWS), strict=True):
                first, second = p.double().log_softmax(-1), q.double().log_softmax(-1)
                kl += float((first.exp() * (first - second)).sum())
                same += int((p.argmax(-1) == q.argmax(-1)).sum())
            count += len(dense_logits)
    return TokenAgreement(kl / count, same / count, count)


def _logits(output: Tensor) -> Tensor:
    return output.reshape(-1, output.shape[-1])


@metric(source="Gao et al. 2024, doi:10.5281/zenodo.12608602 (lm-evaluation-harness)")
def zero_shot(
    model: nn.Module, tokenizer: Any, tasks: Sequence[str], *, limit: int | None = None, shots: int = 0, batch: int = 8
) -> Mapping[str, Mapping[str, float]]:
    """Scores of a transformers model on tasks of lm-evaluation-harness: task -> metric -> number.

    The scores are those of the package, without standard errors. Data: the package downloads the data of the tasks.
    limit: examples of each task, all by default. shots: solved examples before each question. batch: questions per
    batch. Errors: MissingExtra without `lm-eval`, RequestError without a task.
    tokenizer: that of the model.

    Use: the scores of papers. Avoid: rankings with a small `limit`: a hundred questions have an error of 5 points.
    """
    if not tasks:
        raise RequestError("zero_shot needs a task", "the list is empty", 'for example tasks=["arc_easy", "piqa"]')
    try:
        harness: Any = importlib.import_module("lm_eval")
        wrapper: Any = importlib.import_module("lm_eval.models.huggingface")
    except ImportError as error:
        raise MissingExtra("zero-shot tasks need lm-eval", str(error), "pip install lm-eval") from error
    wrapped = wrapper.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)
    with mode(model, training=False):
        report = harness.simple_evaluate(model=wrapped, tasks=list(tasks), num_fewshot=shots, limit=limit)
    return {task: dict(_numbers(scores)) for task, scores in report["results"].items()}


def _numbers(scores: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """`acc,none` -> `acc`; standard errors and names are left out."""
    for key, value in scores.items():
        name, _, variant = key.partition(",")
        if isinstance(value, int | float) and "stderr" not in key:
            yield (name if variant in ("", "none") else key), float(value)
