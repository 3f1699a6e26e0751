"""Measure in a few seconds which patterns of zeros are faster on this machine, and from which sparsity."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from prunella.runtime.kernels import library
from prunella.runtime.kernels.config import Precision
from prunella.runtime.tuning.choice import Problem, describe
from prunella.runtime.tuning.tune import Tuner

_SIZE, _TOKENS = 768, 64
_SPARSITIES = (0.3, 0.5, 0.7, 0.8, 0.9)
Mask = Callable[[tuple[int, int], float, torch.Generator], Tensor]


def without_kernels() -> str:
    """One sentence on the effect of missing kernels, and how to get them; empty if they are usable."""
    if library.available():
        return ""
    effect = "so zeros are skipped only by torch's CSR, which is faster from about 90 % zeros"
    return f"{library.missing()}, {effect}: {library.remedy()}"


@dataclass(frozen=True)
class Try:
    """At one sparsity, the best kernel that skips zeros against the best dense one; a ratio above 1 is faster."""

    sparsity: float
    ratio: float
    low: float
    high: float
    kernel: str


@dataclass(frozen=True)
class Pattern:
    """A pattern of zeros in a matrix of `shape`, measured with this number of tokens."""

    name: str
    granularity: str
    shape: tuple[int, int]
    tokens: int
    tries: tuple[Try, ...]

    @property
    def pays_from(self) -> float | None:
        """The lowest measured sparsity from which on the kernel is faster, or None."""
        lowest = None
        for trial in reversed(self.tries):
            if trial.low <= 1:
                break
            lowest = trial.sparsity
        return lowest


def survey(*, seconds: float = 4.0, seed: int = 0) -> tuple[Pattern, ...]:
    """Measure for about `seconds`, with the current number of threads."""
    cases = list(_cases())
    each = seconds / sum(len(case[-1]) for case in cases)
    with torch.inference_mode(False), torch.no_grad():
        return tuple(_pattern(*case, each, seed) for case in cases)


Case = tuple[str, str, tuple[int, int], int, Mask, tuple[float, ...]]


def _cases() -> Iterator[Case]:
    square = (_SIZE, _SIZE)
    yield "scattered zeros", "Element()", square, _TOKENS, _scattered, _SPARSITIES
    if library.available():
        yield "blocks of 16 rows", "Block(16, 1)", square, _TOKENS, _blocks, _SPARSITIES
        yield "2 of 4", "NM(2, 4)", square, _TOKENS, _two_of_four, (0.5,)
        yield "scattered zeros, one token", "Element()", (2048, 2048), 1, _scattered, (0.5, 0.7, 0.9)


def _pattern(
    name: str,
    granularity: str,
    shape: tuple[int, int],
    tokens: int,
    mask: Mask,
    sparsities: tuple[float, ...],
    seconds: float,
    seed: int,
) -> Pattern:
    generator = torch.Generator().manual_seed(seed)
    tries = []
    for sparsity in sparsities:
        weight = torch.randn(shape, generator=generator, device="cpu") * mask(shape, sparsity, generator)
        tuner = Tuner(Precision.FP32, seconds, seed)
        verdict = tuner.linear(weight, None, (Problem(tokens),))[0]
        if verdict.ratio is not None and verdict.best is not None:
            ratio = verdict.ratio
            tries.append(Try(sparsity, ratio.value, ratio.low, ratio.high, describe(verdict.best)))
    return Pattern(name, granularity, shape, tokens, tuple(tries))


def _scattered(shape: tuple[int, int], sparsity: float, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, device="cpu") >= sparsity


def _blocks(shape: tuple[int, int], sparsity: float, generator: torch.Generator) -> Tensor:
    rows = torch.rand((shape[0] // 16, shape[1]), generator=generator, device="cpu") >= sparsity
    return rows.repeat_interleave(16, 0)


def _two_of_four(shape: tuple[int, int], sparsity: float, generator: torch.Generator) -> Tensor:
    order = torch.rand((shape[0], shape[1] // 4, 4), generator=generator, device="cpu").argsort(-1)
    return (order < 2).reshape(shape)
