"""Sizes in lists and tuples of a module: they follow a cut, entry by entry, and a run leaves the containers alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.oracle import check_exact
from torch import Tensor, nn

import prunella as pr
from prunella.graph.nested_sizes import changed, content, sizes_in
from prunella.graph.solve.groups import couple
from prunella.io.plan_file import load_plan, save_plan

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))


class Parts(nn.Module):
    """A layer whose outputs are split by a list, and heads whose number and size are in another one."""

    def __init__(self, parts: Any, heads: Any) -> None:
        super().__init__()
        self.parts, self.heads = parts, heads
        self.first, self.heads_of = nn.Linear(6, sum(parts)), nn.Linear(6, heads[0] * heads[1])
        self.readers = nn.ModuleList(nn.Linear(size, 3) for size in parts)
        self.out = nn.Linear(heads[0] * heads[1], 3)

    def forward(self, x: Tensor) -> Tensor:
        pieces = self.first(x).relu().split(self.parts, dim=-1)
        q = self.heads_of(x).view(len(x), self.heads[0], 1, self.heads[1])
        mixed = (q @ q.mT).sigmoid() @ q
        total: Tensor = self.out(mixed.flatten(1))
        for reader, piece in zip(self.readers, pieces, strict=True):
            total = total + reader(piece)
        return total


@settings(max_examples=15, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.integers(2, 9), min_size=2, max_size=4), st.integers(2, 5), st.integers(2, 4), st.booleans())
def test_sizes_in_lists_follow(parts: list[int], heads: int, size: int, tuples: bool) -> None:
    torch.manual_seed(0)
    kind = tuple if tuples else list
    model = Parts(kind(parts), kind([heads, size]))
    held = model.parts, model.heads
    checked = check_exact(model, X, count=False)
    assert model.parts is held[0] and model.heads is held[1] and type(model.parts[0]) is int
    small: Any = checked.small
    assert type(small.parts) is kind and sum(small.parts) == small.first.out_features < sum(parts)
    assert {group.size for group in checked.graph.groups if group.kind == "head"} == {heads}
    assert small.heads[0] < heads and small.heads[1] == size


def test_a_plan_keeps_the_lists(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = Parts([4, 8], [2, 3])
    plan = pr.plan(model, X, pr.Recipe(pr.criteria.random, pr.Channel(), pr.uniform), target=pr.Params(0.8))
    save_plan(plan, tmp_path / "a.plan")
    small: Any = pr.shrink(model, load_plan(tmp_path / "a.plan"))
    assert small.parts == [small.readers[0].in_features, small.readers[1].in_features] != [4, 8]


class Split(nn.Module):
    """Splits heads by named sizes, in the manner of layers that are made from a pattern."""

    def __init__(self, **sizes: int) -> None:
        super().__init__()
        self.sizes, self._pairs = sizes, tuple(sizes.items())

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (dict(self._pairs)["heads"], -1))

    def __getstate__(self) -> dict[str, Any]:
        return {"sizes": self.sizes, "training": self.training}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state["sizes"])  # type: ignore[misc]  # a copy is made again
        self.training = state["training"]


class Heads(nn.Module):
    """Heads whose number is in a module of its own, and a way of their own for a single one."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.out, self.split = nn.Linear(6, 12), nn.Linear(12, 3), Split(heads=4)

    def forward(self, x: Tensor) -> Tensor:
        q = self.split(self.q(x)).unsqueeze(-2)
        if q.shape[1] == 1:
            return self.out.bias + x.sum()
        out: Tensor = self.out(((q @ q.mT).sigmoid() @ q).flatten(1))
        return out


class Around(nn.Module):
    """Heads, and a module of the same class that does not run, so that its number tells nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.unused = Heads(), Split(heads=4)

    def forward(self, x: Tensor) -> Tensor:
        return self.heads(x)  # type: ignore[no-any-return]


def test_named_sizes_follow_with_what_a_copy_is_made_from() -> None:
    torch.manual_seed(0)
    model = Around()
    checked = check_exact(model, X, count=False)
    small: Any = checked.small.heads  # type: ignore[union-attr]
    heads = small.q.out_features // 3
    assert heads < 4 and small.split._pairs == (("heads", heads),) and small.split.sizes == {"heads": heads}
    assert model.heads.split.sizes == {"heads": 4} and type(model.heads.split.sizes["heads"]) is int


def test_units_with_which_the_source_decides_otherwise_are_kept() -> None:
    torch.manual_seed(0)
    model = Heads().eval()
    [group] = couple(model, X).groups
    assert (group.size, group.min_units) == (4, 2)
    plan = pr.plan(model, X, pr.Recipe(pr.criteria.random, pr.Head()), counts={group.name: 2})
    assert pr.shrink(model, plan).q.out_features == 6
    with pytest.raises(pr.PruningError):
        pr.plan(model, X, pr.Recipe(pr.criteria.random, pr.Head()), counts={group.name: 3})


class Nested(nn.Module):
    """Sizes in containers of containers."""

    def __init__(self, sizes: Any) -> None:
        super().__init__()
        self.sizes = sizes
        self.first = nn.Linear(6, 9)
        self.second, self.third = nn.Linear(4, 3), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        sizes = self.sizes["parts"] if isinstance(self.sizes, dict) else [size for _, size in self.sizes]
        a, b = self.first(x).split(list(sizes), dim=-1)
        return self.second(a) + self.third(b)  # type: ignore[no-any-return]


@pytest.mark.parametrize("sizes", [{"parts": [4, 5]}, [("a", 4), ("b", 5)], (["a", 4], ["b", 5]), {"parts": (4, 5)}])
def test_sizes_inside_each_other_follow(sizes: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Nested(copy.deepcopy(sizes)).eval()
    plan = pr.plan(model, X, pr.Recipe(pr.criteria.random, pr.Channel(), pr.uniform), target=pr.Params(0.6))
    small = pr.shrink(model, plan)
    new = [small.second.in_features, small.third.in_features]
    assert sizes_in(small.sizes) == tuple(new) != (4, 5) and model.sizes == sizes
    assert [type(part) for part in small.sizes] == [type(part) for part in sizes]
    saved = pr.save(small, tmp_path / "small", plan=plan, dense=model, factory=Nested, kwargs={"sizes": sizes})
    assert sizes_in(pr.load(saved.path, factory=Nested).sizes) == tuple(new)  # the file makes lists of tuples


def test_a_list_of_names_and_sizes_keeps_its_names() -> None:
    assert sizes_in(["a", 4, "b", 5]) == (4, 5) == sizes_in({"a": 4, "b": [5]})
    assert sizes_in([4, 5.0]) == sizes_in([4, None]) == sizes_in(4) == ()
    assert changed({"a": 4, "b": ["c", 5]}, lambda k, size: size * 10 + k) == {"a": 40, "b": ["c", 51]}
    assert content({"a": 4}) == content((("a", 4),)) == ("a", 4)


class Kernels(nn.Module):
    """A list of numbers that are no sizes of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.window, self.a, self.b = [2, 3], nn.Conv2d(3, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(nn.functional.avg_pool2d(self.a(x), self.window))
        return out


def test_a_list_of_other_numbers_stays() -> None:
    torch.manual_seed(0)
    checked = check_exact(Kernels(), torch.randn(1, 3, 6, 6))
    small: Any = checked.small
    assert small.window == [2, 3] and [group.size for group in checked.graph.groups] == [6]
