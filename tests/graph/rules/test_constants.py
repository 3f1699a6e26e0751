"""Tables in plain attributes follow a cut, and an attention follows it whichever kernel the source chooses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import prunella as pr
from prunella.graph.data import Graph
from prunella.graph.solve.groups import couple
from prunella.model.constants import constants

X = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))


def waves(length: int, width: int) -> Tensor:
    return (torch.arange(length)[:, None] * torch.linspace(0.1, 1, width)).sin()


class Stream(nn.Module):
    """A stream with a norm, to which a table of positions is added."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.norm, self.leave = nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 3)
        self.again = nn.Linear(8, 8)
        self.table = waves(5, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.enter(x) + self.positions(x)
        return self.leave(self.norm(h + self.again(h).relu()))  # type: ignore[no-any-return]

    def positions(self, x: Tensor) -> Tensor:
        return self.table.to(x.device)


class Shared(Stream):
    """Two modules with the same table."""

    def __init__(self) -> None:
        super().__init__()
        self.other = Stream()
        self.other.table = self.table

    def positions(self, x: Tensor) -> Tensor:
        return self.table + self.other.table


class Cached(Stream):
    """The table is computed when it is first needed."""

    def __init__(self) -> None:
        super().__init__()
        del self.table
        self.cache: Tensor | None = None

    def positions(self, x: Tensor) -> Tensor:
        if self.cache is None or len(self.cache) != x.shape[1]:
            self.cache = waves(x.shape[1], self.enter.out_features)
        return self.cache


class Fused(nn.Module):
    """Attention in the kernel that the source asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(4, 24), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.enter(x).unflatten(-1, (3, -1, 4)).permute(2, 0, 3, 1, 4)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            heads = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.leave(heads.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def widths(model: nn.Module) -> list[tuple[str, str, int]]:
    graph: Graph = couple(model, X)
    return [(group.name, group.kind, group.size) for group in graph.groups]


def halved(model: nn.Module) -> pr.Plan:
    return pr.plan(model, X, pr.Recipe(pr.criteria.magnitude, pr.Width()), target=pr.Sparsity(0.5))


@pytest.mark.parametrize("kind", [Stream, Shared])
def test_a_table_is_cut_with_its_stream(kind: type[Stream]) -> None:
    model = kind().eval()
    before = model.table.clone()
    plan = halved(model)
    small = pr.shrink(model, plan)
    kept = plan.keep["enter"].nonzero().flatten()
    assert torch.equal(small.table, before[:, kept]) and torch.equal(model.table, before)
    assert small(X).shape == model(X).shape and len(kept) < 8


def test_both_modules_keep_one_table() -> None:
    model = Shared().eval()
    small = pr.shrink(model, halved(model))
    assert small.table is small.other.table


def test_what_a_run_sets_is_no_constant() -> None:
    fresh, used = Cached().eval(), Cached().eval()
    used(X)
    assert used.cache is not None and not constants(used)
    assert widths(fresh) == widths(used) == []


def test_a_tensor_with_a_history_is_no_constant() -> None:
    model = Stream()
    model.table = model.table * model.leave.weight[0]
    assert not constants(model)
    assert constants(Stream()).keys() == {"table"}


def test_masks_are_of_the_parameters_alone() -> None:
    model = Stream().eval()
    before = model.table.clone()
    pr.apply_(model, halved(model))
    assert torch.equal(model.table, before)
    assert int((model.enter.bias == 0).sum()) == 8 - int(halved(model).keep["enter"].sum())


def test_an_artefact_with_a_cut_table_loads(tmp_path: Path) -> None:
    model = Stream().eval()
    plan = halved(model)
    small = pr.shrink(model, plan)
    saved = pr.save(small, tmp_path / "small", plan=plan, dense=model, factory=Stream)
    assert torch.equal(pr.load(saved.path, factory=Stream)(X), small(X))


def test_a_kernel_that_the_source_chooses_has_heads() -> None:
    model = Fused().eval()
    assert [(group.kind, group.size) for group in couple(model, X).groups] == [("head", 2)]
    plan = pr.plan(model, X, pr.Recipe(granularity=pr.Head()), target=pr.Sparsity(0.5))
    assert pr.shrink(model, plan).enter.out_features == 12
