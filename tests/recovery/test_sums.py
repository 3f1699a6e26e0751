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


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_quick_sums_give_the_same_solution(centered: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    exact, quick = Sums(centered=centered), Sums(centered=centered, quick=True)
    for _ in range(2):
        x = (torch.randn(9000, 5) + (100 if centered else 0)).to(dtype)
        r = torch.randn(9000, 3, dtype=torch.float64) + x.double()[:, :3]
        exact.add(x, r, r)
        quick.add(x, r, r)
    expected, found = exact.solve(1e-3), quick.solve(1e-3)
    tolerance = 1e-9 if dtype is torch.float64 else 1e-4
    torch.testing.assert_close(found.change, expected.change, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found.shift, expected.shift, rtol=100 * tolerance, atol=100 * tolerance)
    assert found.after == pytest.approx(expected.after, rel=1e-4)
    assert quick.empty().quick
