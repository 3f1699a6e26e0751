"""Which patterns of zeros pay on this machine, and from which sparsity: a few seconds of measurement."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from prunella.runtime.kernels import library as native
from prunella.runtime.kernels.library import Precision
from prunella.runtime.tuning.choice import Problem, spell
from prunella.runtime.tuning.tune import Tuner

LOST = (
    "the compiled kernels are not here, so zeros are skipped by torch's CSR only, which needs about 90 % of them: "
    "install prunella from a wheel, or from source with a C++ compiler"
)
_SIZE, _TOKENS = 768, 64
_SPARSITIES = (0.3, 0.5, 0.7, 0.8, 0.9)
Mask = Callable[[tuple[int, int], float, torch.Generator], Tensor]


@dataclass(frozen=True)
class Try:
    """One sparsity: the best kernel that skips zeros against the best dense one; above 1 is faster."""

    sparsity: float
    ratio: float
    low: float
    high: float
    kernel: str


@dataclass(frozen=True)
class Pattern:
    """A pattern of zeros in a matrix of `shape`, multiplied with so many tokens."""

    name: str
    granularity: str
    shape: tuple[int, int]
    tokens: int
    tries: tuple[Try, ...]

    @property
    def pays_from(self) -> float | None:
        """The lowest sparsity measured from which on it is faster, or None."""
        found = None
        for one in reversed(self.tries):
            if one.low <= 1:
                break
            found = one.sparsity
        return found


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
    if native.available():
        yield "blocks of 16 rows", "Block(16, 1)", square, _TOKENS, _blocks, _SPARSITIES
        yield "2 of 4", "NM(2, 4)", square, _TOKENS, _two_of_four, (0.5,)
        yield "scattered zeros, one token", "Element()", (2048, 2048), 1, _scattered, (0.5, 0.7, 0.9)


def _pattern(
    name: str,
    grain: str,
    shape: tuple[int, int],
    tokens: int,
    mask: Mask,
    at: tuple[float, ...],
    each: float,
    seed: int,
) -> Pattern:
    generator = torch.Generator().manual_seed(seed)
    tries = []
    for sparsity in at:
        weight = torch.randn(shape, generator=generator) * mask(shape, sparsity, generator)
        tuner = Tuner(Precision.FP32, each, seed)
        verdict = tuner.linear(weight, None, (Problem(tokens),))[0]
        if verdict.ratio is not None and verdict.best is not None:
            ratio = verdict.ratio
            tries.append(Try(sparsity, ratio.value, ratio.low, ratio.high, spell(verdict.best)))
    return Pattern(name, grain, shape, tokens, tuple(tries))


def _scattered(shape: tuple[int, int], sparsity: float, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator) >= sparsity


def _blocks(shape: tuple[int, int], sparsity: float, generator: torch.Generator) -> Tensor:
    rows = torch.rand((shape[0] // 16, shape[1]), generator=generator) >= sparsity
    return rows.repeat_interleave(16, 0)


def _two_of_four(shape: tuple[int, int], sparsity: float, generator: torch.Generator) -> Tensor:
    order = torch.rand((shape[0], shape[1] // 4, 4), generator=generator).argsort(-1)
    return (order < 2).reshape(shape)
