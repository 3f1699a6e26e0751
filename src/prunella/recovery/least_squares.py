"""Ridge regression from running sums: only `(in, in)` and `(in, out)` matrices are stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prunella.model.device import full_float32
from prunella.solvers.linalg import damped_solve
from prunella.stats.elimination import column_sums
from prunella.types import Gram

TOKENS = 8192
"""Tokens of one product in the precision of the inputs."""


@dataclass(frozen=True)
class Solution:
    """`change` `(in, out)`, `shift` `(out,)` for the bias; squared error before and after; damping used."""

    change: Tensor
    shift: Tensor
    before: float
    after: float
    damping: float


class Sums:
    """Sums over tokens of inputs X `(tokens, in)`, residuals R and expected outputs Y `(tokens, out)`, in float64.

    With `centered`, X is relative to the mean of its first batch, so that large offsets cost no precision. quick:
    products of `TOKENS` tokens are computed in the precision of X and summed in float64, in half the time.
    """

    def __init__(self, *, centered: bool, quick: bool = False) -> None:
        self.centered, self.quick = centered, quick
        self.tokens = 0
        self.squares = 0.0

    @full_float32()
    def add(self, x: Tensor, y: Tensor, residual: Tensor) -> None:
        """Add the tokens of one call."""
        if not self.quick:
            y, residual = y.double(), residual.double()
        if not hasattr(self, "x_origin"):
            nothing = y.new_zeros(x.shape[1], dtype=torch.float64)
            self._begin(x.mean(0, dtype=torch.float64) if self.centered else nothing, y.mean(0, dtype=torch.float64))
        x = self._relative(x)
        y = y - self.y_origin.to(y.dtype)
        self.tokens += x.shape[0]
        self.x += self._sum(x)
        self.r += self._sum(residual)
        self.y += self._sum(y)
        self.y_squares += self._sum(y.square())
        self._multiply(x, residual)
        self.squares += float(self._sum(residual.square()).sum())

    def _sum(self, values: Tensor) -> Tensor:
        return column_sums(values) if self.quick else values.sum(0, dtype=torch.float64)

    def _relative(self, x: Tensor) -> Tensor:
        if not self.quick:
            return x - self.x_origin  # the difference is float64, whatever x is
        x = x.to(x.dtype if x.dtype.itemsize >= 4 else torch.float32)
        return x - self.x_origin.to(x.dtype) if self.centered else x

    def _multiply(self, x: Tensor, residual: Tensor) -> None:
        if not self.quick:
            self.gram.addmm_(x.T, x)
            self.cross.addmm_(x.T, residual)
            return
        for few, gap in zip(torch.split(x, TOKENS), torch.split(residual.to(x.dtype), TOKENS), strict=True):
            self.gram += few.T @ few
            self.cross += few.T @ gap

    def _begin(self, x_origin: Tensor, y_origin: Tensor) -> None:
        self.x_origin, self.y_origin = x_origin, y_origin
        self.x, self.y, self.r = (torch.zeros_like(values) for values in (x_origin, y_origin, y_origin))
        self.y_squares = torch.zeros_like(y_origin)
        self.gram: Gram = x_origin.new_zeros(len(x_origin), len(x_origin))
        self.cross = x_origin.new_zeros(len(x_origin), len(y_origin))

    def empty(self) -> Sums:
        """Empty sums of the same matrix, from the same origins, so that both can be added."""
        sums = Sums(centered=self.centered, quick=self.quick)
        if self.tokens:
            sums._begin(self.x_origin, self.y_origin)
        return sums

    def __add__(self, other: Sums) -> Sums:
        """The sums of the tokens of both; `other` is from `empty`."""
        total = self.empty()
        total.tokens, total.squares = self.tokens + other.tokens, self.squares + other.squares
        for name in ("x", "y", "r", "y_squares", "gram", "cross"):
            setattr(total, name, getattr(self, name) + getattr(other, name))
        return total

    @property
    def finite(self) -> bool:
        """Whether every sum is finite."""
        return bool(torch.isfinite(self.gram.sum() + self.cross.sum() + self.y_squares.sum()))

    @property
    def variation(self) -> float:
        """Sum of squares of Y around its mean."""
        return float((self.y_squares - self.y.square() / self.tokens).clamp_min(0).sum())

    def solve(self, ridge: float) -> Solution:
        """`min over D, s of |R - X D - s|^2 + ridge * mean(diag(X^T X)) * |D|^2`; s is 0 unless centered."""
        gram, cross, total, shift = self.gram, self.cross, self.squares, torch.zeros_like(self.r)
        if self.centered:
            gram = gram - torch.outer(self.x, self.x) / self.tokens
            cross = cross - torch.outer(self.x, self.r) / self.tokens
            total = total - float(self.r.square().sum()) / self.tokens
        change, damping = damped_solve(gram, cross, ridge)
        after = total - 2 * float((change * cross).sum()) + float((change * (gram @ change)).sum())
        if self.centered:
            shift = self.r / self.tokens - (self.x_origin + self.x / self.tokens) @ change
        return Solution(change, shift, self.squares, max(after, 0.0), damping)

    def chosen(self, held_out: Sums, ridges: Sequence[float]) -> Solution:
        """The solution for all tokens with the best ridge: its solution for these tokens has the least held-out error.

        The change is zero if no ridge reduces the held-out error.
        """
        errors = {ridge: held_out.error(self.solve(ridge)) for ridge in ridges}
        best = min(errors, key=errors.__getitem__)
        total = self + held_out
        solution = total.solve(best)
        if errors[best] < held_out.squares:
            return solution
        nothing = torch.zeros_like(solution.change), torch.zeros_like(solution.shift)
        return Solution(*nothing, solution.before, solution.before, solution.damping)

    def error(self, solution: Solution) -> float:
        """`|R - X D - s|^2` on these tokens, of a solution from other sums."""
        shift = solution.shift + self.x_origin @ solution.change
        explained = 2 * float((solution.change * self.cross).sum())
        explained -= float((solution.change * (self.gram @ solution.change)).sum())
        offset = 2 * float((shift * (self.x @ solution.change - self.r)).sum())
        return max(self.squares - explained + offset + self.tokens * float(shift.square().sum()), 0.0)
