"""Sums over tokens against the same numbers from all tokens at once."""

from __future__ import annotations

import pytest
import torch

from prunella.recovery.least_squares import Sums


@pytest.mark.parametrize("centered", [False, True])
def test_the_error_of_a_solution_on_other_tokens(centered: bool) -> None:
    torch.manual_seed(0)
    fitted, judge = Sums(centered=centered), Sums(centered=centered)
    truth = torch.randn(5, 3, dtype=torch.float64)
    for _ in range(2):
        x = torch.randn(30, 5, dtype=torch.float64) + 4
        r = x @ truth + 2 + torch.randn(30, 3, dtype=torch.float64)
        fitted.add(x, r, r)
    solution = fitted.solve(0.1)
    parts = [(torch.randn(7, 5).double() - 3, torch.randn(7, 3).double()) for _ in range(3)]
    for x, r in parts:
        judge.add(x, r, r)
    direct = sum(float((r - x @ solution.change - solution.shift).square().sum()) for x, r in parts)
    assert judge.error(solution) == pytest.approx(direct, rel=1e-9)
    assert bool(solution.shift.any()) is centered
