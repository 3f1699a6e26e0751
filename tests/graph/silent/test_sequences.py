"""Steps of a sequence that the source counts in Python, sizes in slots, and outputs that no list shows."""

from __future__ import annotations

import dataclasses
import functools
import queue
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.graph.silent.test_outputs import Net, groups, pruned
from tests.graph.silent.test_outputs import X as VECTORS
from torch import Tensor, nn

import prunella as pr
from prunella.graph.solve.groups import couple
from prunella.graph.verify import verify

X, LONG = torch.randn(2, 5, 6), torch.randn(2, 40, 6)


class Steps(nn.Module):
    def __init__(self, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.join = nn.Linear(6, 8), nn.Linear(8, 3), [join]

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.join[0](x, self.a(x)))  # type: ignore[no-any-return]


def _chunks(_: Tensor, h: Tensor) -> Tensor:
    return torch.cat([part if number < 3 else part.flip(-1) for number, part in enumerate(h.split(8, 1))], 1)


def _counted(_: Tensor, h: Tensor) -> Tensor:
    parts: list[Tensor] = []
    for part in h.unbind(1):
        parts.append(part if len(parts) < 13 else part.flip(-1))
    return torch.stack(parts, 1)


def _numbered(x: Tensor, h: Tensor) -> Tensor:
    return torch.stack([h[:, t] if t < 13 else h[:, t].flip(-1) for t in range(x.shape[1])], 1)


def _far(h: Tensor, number: int) -> Tensor:
    return h.flip(-1) if number > 30 else h


def _passed_on(x: Tensor, h: Tensor) -> Tensor:
    return _far(h, int(x.size(1)))


@pytest.mark.parametrize("join", [_chunks, _counted, _numbered, _passed_on])
def test_a_cut_is_right_on_a_longer_sequence(join: Callable[[Tensor, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model = Steps(join).eval()
    plan = pr.plan(model, X, pr.Recipe(pr.criteria.random, pr.Channel(), pr.uniform), target=pr.Params(0.9))
    assert verify(model, pr.shrink(model, plan), plan.changes, LONG).exact
    assert plan.others, "a longer sequence is an example"


@dataclasses.dataclass(slots=True)
class Slots:
    hidden: int = 8


class Configured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config, self.a, self.b = Slots(), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).view(-1, self.config.hidden))  # type: ignore[no-any-return]


def test_a_size_in_slots_follows() -> None:
    model = Configured().eval()
    plan = pr.plan(model, torch.randn(2, 6), target=pr.Params(0.8))
    small = pr.shrink(model, plan)
    assert small.config.hidden == int(plan.keep["a"].sum()) < 8 and model.config.hidden == 8


class Cached(nn.Module):
    """Two layers of one size, whose shapes meet in one cache."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    @staticmethod
    @functools.lru_cache
    def static(shape: tuple[int, ...]) -> tuple[int, ...]:
        return (-1, shape[-1])

    @classmethod
    @functools.cache
    def of_class(cls, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (-1, shape[-1])

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        h = self.b(h.view(self.static(h.shape)).relu())
        return self.c(h.view(self.of_class(h.shape)).relu())  # type: ignore[no-any-return]


def test_caches_of_static_and_class_methods_do_not_mix_up_sizes() -> None:
    model = Cached().eval()
    cache = Cached.static
    assert {group.name for group in couple(model, torch.randn(2, 6)).groups} == {"a", "b"}
    assert Cached.static is cache and Cached.static.cache_info().currsize == 0, "no tracked size is left in it"


def _queued(hidden: Tensor) -> queue.Queue[Tensor]:
    items = queue.Queue[Tensor]()
    items.put(hidden)
    return items


@pytest.mark.parametrize("hold", [_queued, ValueError, lambda h: h.sum])
def test_a_tensor_that_no_list_of_the_output_shows_is_an_output(hold: Callable[[Tensor], Any]) -> None:
    assert groups(Net(lambda _, y, hidden: (y, hold(hidden)))) == {"b"}


def test_sparse_outputs_are_compared() -> None:
    plan, _ = pruned(Net(lambda _, y, hidden: y.to_sparse()), VECTORS)
    assert set(plan.keep) == {"a", "b"}


def test_complex_layers_are_told_what_to_do() -> None:
    linear = nn.Sequential(nn.Linear(6, 8, dtype=torch.cfloat), nn.Linear(8, 3, dtype=torch.cfloat)).eval()
    with pytest.raises(pr.PruningError, match=r"0\.weight is complex: write the layer with real ones"):
        pr.plan(linear, torch.randn(2, 6, dtype=torch.cfloat), target=pr.Params(0.8))
    conv = nn.Sequential(nn.Conv2d(2, 8, 3, dtype=torch.cfloat), nn.Conv2d(8, 3, 3, dtype=torch.cfloat)).eval()
    with pytest.raises(pr.PruningError, match=r"write (a complex|the) layer (as|with) real ones"):
        pr.plan(conv, torch.randn(2, 2, 8, 8, dtype=torch.cfloat), target=pr.Params(0.8))
