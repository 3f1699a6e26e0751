"""Message passing, sparse products, Fourier transforms, other layouts: features pass, and what is numbered stays."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.oracle import check_exact
from torch import Tensor, nn

from prunella.graph.solve.groups import couple
from prunella.measure.count import measured_macs

pytestmark = pytest.mark.filterwarnings("ignore:Sparse")
NODES, EDGES = 7, 12
GENERATOR = torch.Generator().manual_seed(1)
X = torch.randn(NODES, 5, generator=GENERATOR)
FROM, TO = (torch.randint(0, NODES, (EDGES,), generator=GENERATOR) for _ in range(2))
Gather = Callable[[Tensor, Tensor, Tensor], Tensor]


def adjacency(h: Tensor, source: Tensor, target: Tensor) -> Tensor:
    return torch.sparse_coo_tensor(torch.stack([target, source]), torch.ones(EDGES, dtype=h.dtype), (NODES, NODES))


def mean_of_neighbors(h: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """GraphSAGE in plain torch: sums by number, divided by the degree."""
    total = torch.zeros_like(h).index_add_(0, target, h[source])
    degree = torch.zeros(NODES, dtype=h.dtype).index_add_(0, target, torch.ones(EDGES, dtype=h.dtype))
    return total / degree.clamp(min=1)[:, None]


def attended(h: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """GAT in plain torch: weights of the edges, normalized over those that end in one node."""
    score = torch.exp(torch.tanh(h[source, :1] * 0 + h.detach()[target, :1] * 0 + 1))
    norm = torch.zeros(NODES, 1, dtype=h.dtype).index_add_(0, target, score)
    return torch.zeros_like(h).index_add_(0, target, h[source] * score / norm[target])


def edge_weights(h: Tensor, source: Tensor, target: Tensor) -> Tensor:
    degree = torch.bincount(target, minlength=NODES).clamp(min=1).to(h.dtype)
    weight = (degree[source] * degree[target]).rsqrt()
    return torch.zeros_like(h).scatter_add(0, target[:, None].expand_as(h[source]), h[source] * weight[:, None])


PASSES: dict[str, Gather] = {
    "index_add": lambda h, s, t: torch.zeros_like(h).index_add_(0, t, h[s]),
    "scatter_add": lambda h, s, t: torch.zeros_like(h).scatter_add_(0, t[:, None].expand(-1, h.shape[1]), h[s]),
    "scatter": lambda h, s, t: h.scatter(0, t[:1, None].repeat(1, h.shape[1]), h[s]),
    "scatter a number": lambda h, s, t: h.scatter(0, t[:2, None].expand(-1, h.shape[1]), 1.0),
    "scatter_reduce": lambda h, s, t: h.scatter_reduce(0, t[:, None].expand(-1, h.shape[1]), h[s], "amax"),
    "segments": lambda h, s, t: torch.segment_reduce(h, "sum", lengths=torch.tensor([3, NODES - 3])).sum(0) + h,
    "sparse.mm": lambda h, s, t: torch.sparse.mm(adjacency(h, s, t), h),
    "sparse @": lambda h, s, t: adjacency(h, s, t) @ h,
    "csr @": lambda h, s, t: adjacency(h, s, t).coalesce().to_sparse_csr() @ h,
    "mean": mean_of_neighbors,
    "degrees": edge_weights,
    "gather": lambda h, s, t: h.gather(0, s[:NODES, None].expand(-1, h.shape[1])),
    "fourier": lambda h, s, t: torch.fft.ifft(torch.fft.fft(h, dim=0) * 0.5, dim=0).real,
    "real fourier": lambda h, s, t: torch.fft.irfft(torch.fft.rfft(h, dim=0), n=h.shape[0], dim=0),
    "roll": lambda h, s, t: torch.roll(h, 1, 0),
}


class Graph(nn.Module):
    """Rounds of message passing, with a norm or a recurrent cell between them."""

    def __init__(self, passes: list[str], width: int, between: str) -> None:
        super().__init__()
        self.passes, self.between = passes, between
        sizes = [5, *[width] * len(passes)]
        self.linear = nn.ModuleList(nn.Linear(n, m) for n, m in pairwise(sizes))
        self.norm, self.cell, self.out = nn.BatchNorm1d(width), nn.GRUCell(width, width), nn.Linear(width, 3)

    def forward(self, x: Tensor, source: Tensor, target: Tensor) -> Tensor:
        for name, linear in zip(self.passes, self.linear, strict=True):
            x = linear(x)
            x = torch.tanh(PASSES[name](x, source, target) + x)
            x = self.norm(x) if self.between == "norm" else self.cell(x) if self.between == "cell" else x
        out: Tensor = self.out(x)
        return out


@settings(max_examples=20, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.sampled_from(sorted(PASSES)), min_size=1, max_size=3),
    st.integers(4, 8),
    st.sampled_from(["none", "norm", "cell"]),
)
def test_features_of_graphs_are_cut_exactly(passes: list[str], width: int, between: str) -> None:
    torch.manual_seed(0)
    model = Graph(passes, width, between)
    checked = check_exact(model, (X, FROM, TO), count=False)
    assert {group.size for group in checked.graph.groups} == {width}, checked.graph.frozen
    assert checked.moved > 1e-9
    assert measured_macs(model, (X, FROM, TO)) == checked.graph.macs()
    transforms = {"fourier": {"_fft_r2c", "_fft_c2c"}, "real fourier": {"_fft_r2c", "_fft_c2r"}}
    assert set(checked.graph.uncounted) == set().union(*(transforms.get(name, set()) for name in passes))


class Odd(nn.Module):
    """Uses in which features do not pass."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.first, self.out = what, nn.Linear(5, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h, index = self.first(x), torch.zeros(2, 6, dtype=torch.int64)
        if self.what == "typed index":
            h = h.scatter_add(0, index, h[:2])
        elif self.what == "features by number":
            h = h.scatter(1, index[:, :2], 0.5)
        elif self.what == "fourier of features":
            h = torch.fft.fft(h, dim=1).real
        else:
            h = h.as_strided((6, 6), (1, 6))
        out: Tensor = self.out(h)
        return out


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("typed index", "it meets a tensor that is not cut in scatter_add"),
        ("features by number", "scatter numbers its positions"),
        ("fourier of features", "the operation _fft_r2c has no rule for the axis that it transforms"),
        ("other strides", "the operation as_strided has no rule"),
    ],
)
def test_what_mixes_features_stays_with_a_true_reason(what: str, words: str) -> None:
    torch.manual_seed(0)
    graph = couple(Odd(what), X)
    assert not graph.groups and next(f.reason for f in graph.frozen if f.entity == "first.weight") == words


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Conv2d(3, 8, 3), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(F.adaptive_avg_pool2d(self.first(x).relu(), 1).flatten(1))
        return out


def test_pooling_in_channels_last_gives_the_groups_of_the_usual_layout() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, 6)
    usual = couple(Pooled(), x)
    checked = check_exact(Pooled().to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last))
    assert (
        [(g.name, g.size) for g in checked.graph.groups] == [(g.name, g.size) for g in usual.groups] == [("first", 8)]
    )


def _in_heads(x: Tensor, heads: int) -> Tensor:
    return x.view(x.size(0), heads, x.size(1) // heads)


def _chosen(x: Tensor) -> Tensor:
    return torch.softmax(x, 1)


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    in_heads: Any = torch.jit.script(_in_heads)
    chosen: Any = torch.jit.script(_chosen)


class Scripted(nn.Module):
    """Sizes inside a scripted function, and a softmax that other runs do not see."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.first, self.out = 4, nn.Linear(5, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        q = in_heads(self.first(x), self.heads)[:, :, None]
        out: Tensor = self.out(((q @ q.mT).sigmoid() @ q).flatten(1))
        return chosen(out)


def test_sizes_inside_a_scripted_function_follow() -> None:
    torch.manual_seed(0)
    before = in_heads
    checked = check_exact(Scripted(), X, count=False)
    assert [(group.kind, group.size) for group in checked.graph.groups] == [("head", 4)]
    assert in_heads is before and type(in_heads) is torch.jit.ScriptFunction
