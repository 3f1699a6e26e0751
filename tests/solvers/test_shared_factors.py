"""Layers that read one input share what a solver computes from their Gram matrix alone."""

from __future__ import annotations

import gc
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import prunella as pr
from prunella.solvers.linalg import for_each_gram
from tests.llm.streaming.models import data, write

SOLVERS = (pr.solvers.sparsegpt, pr.solvers.admm, partial(pr.solvers.alps, steps=9))


def gram(seed: int = 0) -> Tensor:
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(seed))
    return x.T @ x


@pytest.mark.parametrize("solver", SOLVERS, ids=["sparsegpt", "admm", "alps"])
def test_results_are_those_of_a_matrix_of_its_own(solver: Any) -> None:
    torch.manual_seed(0)
    shared, weights = gram(), [torch.randn(rows, 8) for rows in (4, 6, 2)]
    for weight in weights:
        for damping in (0.01, 0.1):
            together = solver(weight, shared, pr.NM(2, 4), damping=damping)
            alone = solver(weight, shared.clone(), pr.NM(2, 4), damping=damping)
            assert torch.equal(together.weight, alone.weight) and together.error == alone.error
            assert together.damping == alone.damping


def test_it_is_computed_once_while_the_matrix_is_as_it_was() -> None:
    calls: list[float] = []

    @for_each_gram
    def factors(matrix: Tensor, damping: float) -> Tensor:
        calls.append(damping)
        return matrix.sum() + damping

    matrix = gram()
    assert float(factors(matrix, 0.5)) == float(factors(matrix, 0.5)) and calls == [0.5]
    factors(matrix, 0.25)
    assert calls == [0.5, 0.25]
    before = float(factors(matrix, 0.25))
    matrix.add_(1.0)
    assert float(factors(matrix, 0.25)) == pytest.approx(before + 64) and len(calls) == 3
    factors(matrix.clone(), 0.25)
    assert len(calls) == 4
    with torch.inference_mode():
        unseen = gram()
        factors(unseen, 0.25)
        unseen.add_(1.0)
        assert float(factors(unseen, 0.25)) == pytest.approx(float(unseen.sum()) + 0.25)
    kept = weakref.ref(factors(matrix, 0.25))
    del matrix
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize("solver", SOLVERS, ids=["sparsegpt", "admm", "alps"])
def test_a_block_of_a_language_model_factors_each_input_once(
    solver: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """Of the seven matrices of a block of Llama q, k, v read one input, and gate and up another."""
    calls, plain = [0], torch.linalg.cholesky_ex

    def counted(*arguments: Any) -> Any:
        calls[0] += 1
        return plain(*arguments)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", counted)  # of `damped_factor`
    model = write(tmp_path)
    pr.llm.solve_(model, data()[0], pr.llm.OneShot(pr.NM(2, 4), method=solver), data=data())
    inputs, refits = 4 * 3, 7 * 3 if solver is SOLVERS[2] else 0
    assert calls[0] == inputs + refits
