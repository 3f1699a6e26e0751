"""Norms that a source writes out: their statistics are those of the kept positions, and the units are a width."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import prunella as pr
from prunella.graph.data import Graph
from prunella.graph.solve.groups import couple

X = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(1))
Norm = Callable[["Normed", Tensor], Tensor]


def global_norm(m: Normed, h: Tensor) -> Tensor:
    mean = h.mean((1, 2), keepdim=True)
    return (h - mean) / ((h - mean).pow(2).mean((1, 2), keepdim=True) + 1e-8).sqrt()


def by_variance(m: Normed, h: Tensor) -> Tensor:
    return (h - h.mean(1, keepdim=True)) / (h.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()


def by_both(m: Normed, h: Tensor) -> Tensor:
    variance, mean = torch.var_mean(h, 1, keepdim=True)
    return (h - mean) * (variance + 1e-5).rsqrt()


NORMS: dict[str, Norm] = {
    "normalize": lambda m, h: F.normalize(h, dim=1) * m.root,
    "normalize by its size": lambda m, h: F.normalize(h, dim=1) * m.gain.shape[0] ** 0.5,
    "normalize by order": lambda m, h: F.normalize(h, 3.0, 1),
    "root of a size": lambda m, h: F.normalize(h, dim=-2) * math.sqrt(h.size(1)),
    "global": global_norm,
    "variance": by_variance,
    "deviation": lambda m, h: (h - h.mean(1, keepdim=True)) / (h.std(1, keepdim=True) + 1e-5),
    "variance and mean": by_both,
    "sum of squares": lambda m, h: h * (h.pow(2).sum(1, keepdim=True) + 1e-5).rsqrt() * m.root,
    "sum by a size": lambda m, h: h * ((h * h).sum(1, keepdim=True) / h.shape[1] + 1e-5).rsqrt(),
    "mean of squares": lambda m, h: h * torch.rsqrt(h.square().mean(1, keepdim=True) + 1e-5),
    "norm": lambda m, h: h / (h.norm(dim=1, keepdim=True) + 1e-5) * m.root,
    "vector norm": lambda m, h: h / (torch.linalg.vector_norm(h, dim=1, keepdim=True) + 1e-5),
    "one group": lambda m, h: m.group(h),
    "one group, no parameters": lambda m, h: F.group_norm(h, 1),
}
BACKS = ("none", "residual", "second norm", "gate")


class Normed(nn.Module):
    """A convolution, a norm by hand, and what reads it."""

    def __init__(self, norms: tuple[str, ...], width: int, back: str, root: float) -> None:
        super().__init__()
        self.norms, self.back, self.root = norms, back, root
        self.first, self.inner = nn.Conv1d(4, width, 1), nn.Conv1d(width, width, 1)
        self.gain = nn.Parameter(torch.rand(width, 1) + 0.5)
        self.group = nn.GroupNorm(1, width)
        self.last = nn.Conv1d(width, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.sigmoid(self.first(x))  # removed positions are not zero
        for norm in self.norms:
            h = NORMS[norm](self, h) * self.gain
        if self.back == "residual":
            h = h + self.inner(h.relu())
        elif self.back == "gate":
            h = h * torch.sigmoid(self.inner(h))
        out: Tensor = self.last(h)
        return out


def widths(graph: Graph) -> list[int]:
    return [group.size for group in graph.groups if group.kind == "width"]


@settings(max_examples=14, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.sampled_from(sorted(NORMS)), min_size=1, max_size=2),
    st.sampled_from(BACKS),
    st.integers(6, 9),
    st.booleans(),
)
def test_a_width_with_norms_by_hand_is_that_of_the_same_source(
    norms: list[str], back: str, width: int, known: bool
) -> None:
    torch.manual_seed(0)
    model = Normed(tuple(norms), width, back, width**0.5).eval()
    before = widths(couple(model, X))
    assert before == [width]
    model(X).sum().backward()
    assert widths(couple(model.train(), X)) == before
    model.eval()
    plan = pr.plan(model, X, pr.Recipe(pr.criteria.random, pr.Width(), pr.uniform), target=pr.Params(0.8))
    small = pr.shrink(model, plan)
    (kept,) = [mask.nonzero().flatten() for mask in plan.keep.values()]
    assert len(kept) < width
    expected = Normed(tuple(norms), len(kept), back, width**0.5).eval()
    cuts: dict[str, Any] = {"first.weight": (0,), "inner.weight": (0, 1), "last.weight": (1,), "last.bias": ()}
    for name, parameter in expected.named_parameters():
        if name.startswith("inner") and back not in {"residual", "gate"}:
            continue
        if name.startswith("group") and not any(norm == "one group" for norm in norms):
            continue
        value = dict(model.named_parameters())[name]
        for axis in cuts.get(name, (0,)):
            value = value.index_select(axis, kept)
        with torch.no_grad():
            parameter.copy_(value)
    for inputs in (X, X[:1, :, :4]):
        with torch.no_grad():
            assert torch.allclose(small(inputs), expected(inputs), atol=1e-5)


@pytest.mark.parametrize("norm", ["normalize", "global", "one group", "normalize by its size"])
def test_channels_alone_stay_since_a_norm_would_change(norm: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(pr.PruningError, match="width"):
        pr.plan(Normed((norm,), 8, "none", 1.0).eval(), X, target=pr.Params(0.6))


class Summed(nn.Module):
    """A sum of channels, and a size in a calculation of whole numbers: neither is a norm."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.first, self.last = what, nn.Conv1d(4, 8, 1), nn.Conv1d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.what == "sum":
            h = h - h.sum(1, keepdim=True)
        else:
            h = h * int(h.shape[1])
        out: Tensor = self.last(h)
        return out


@pytest.mark.parametrize("what", ["sum", "whole number"])
def test_what_is_no_norm_stays(what: str) -> None:
    torch.manual_seed(0)
    assert not couple(Summed(what), X).groups
