"""Ridge regression from running sums: only `(in, in)` and `(in, out)` matrices are stored."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prunella.solvers.linalg import damped_solve
from prunella.types import Gram


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

    With `centred`, X is relative to the mean of its first batch, so that large offsets cost no precision.
    """

    def __init__(self, *, centred: bool) -> None:
        self.centred = centred
        self.tokens = 0
        self.squares = 0.0

    def add(self, x: Tensor, y: Tensor, residual: Tensor) -> None:
        """Add the tokens of one call."""
        y, residual = y.double(), residual.double()
        if not self.tokens:
            width = x.shape[1]
            self.x_origin = x.mean(0, dtype=torch.float64) if self.centred else y.new_zeros(width)
            self.y_origin = y.mean(0)
            self.x, self.y, self.r = y.new_zeros(width), y.new_zeros(y.shape[1]), y.new_zeros(y.shape[1])
            self.y_squares = y.new_zeros(y.shape[1])
            self.gram: Gram = y.new_zeros(width, width)
            self.cross = y.new_zeros(width, y.shape[1])
        x, y = x - self.x_origin, y - self.y_origin  # the difference is float64, whatever x is
        self.tokens += x.shape[0]
        self.x += x.sum(0)
        self.r += residual.sum(0)
        self.y += y.sum(0)
        self.y_squares += y.square().sum(0)
        self.gram.addmm_(x.T, x)
        self.cross.addmm_(x.T, residual)
        self.squares += float(residual.square().sum())

    @property
    def finite(self) -> bool:
        """Whether every sum is finite."""
        return bool(torch.isfinite(self.gram.sum() + self.cross.sum() + self.y_squares.sum()))

    @property
    def variation(self) -> float:
        """Sum of squares of Y around its mean."""
        return float((self.y_squares - self.y.square() / self.tokens).clamp_min(0).sum())

    def solve(self, ridge: float) -> Solution:
        """`min over D, s of |R - X D - s|^2 + ridge * mean(diag(X^T X)) * |D|^2`; s is 0 unless centred."""
        gram, cross, total, shift = self.gram, self.cross, self.squares, torch.zeros_like(self.r)
        if self.centred:
            gram = gram - torch.outer(self.x, self.x) / self.tokens
            cross = cross - torch.outer(self.x, self.r) / self.tokens
            total = total - float(self.r.square().sum()) / self.tokens
        change, damping = damped_solve(gram, cross, ridge)
        after = total - 2 * float((change * cross).sum()) + float((change * (gram @ change)).sum())
        if self.centred:
            shift = self.r / self.tokens - (self.x_origin + self.x / self.tokens) @ change
        return Solution(change, shift, self.squares, max(after, 0.0), damping)

    def error(self, solution: Solution) -> float:
        """`|R - X D - s|^2` on these tokens, of a solution from other sums."""
        shift = solution.shift + self.x_origin @ solution.change
        explained = 2 * float((solution.change * self.cross).sum())
        explained -= float((solution.change * (self.gram @ solution.change)).sum())
        offset = 2 * float((shift * (self.x @ solution.change - self.r)).sum())
        return max(self.squares - explained + offset + self.tokens * float(shift.square().sum()), 0.0)
