"""The walker of outputs and inputs: what it sees, and that a copy keeps the shape of the tree."""

from __future__ import annotations

import collections
import functools
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from prunella.errors import NotSupported
from prunella.model.forward import forward, returned, states
from prunella.model.trees import each, own, tensors


@dataclass(frozen=True, slots=True)
class Frozen:
    y: Tensor


class Plain:
    def __init__(self, y: Any) -> None:
        self.y = y


class Slots:
    __slots__ = ("y",)

    def __init__(self, y: Any) -> None:
        self.y = y


class Pair(NamedTuple):
    y: Any
    number: int = 0


class Lookup(Mapping[str, Any]):
    def __init__(self, y: Any) -> None:
        self.kept = {"y": y}

    def __getitem__(self, key: str) -> Any:
        return self.kept[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.kept)

    def __len__(self) -> int:
        return len(self.kept)


class Items(Sequence[Any]):
    def __init__(self, y: Any) -> None:
        self.kept = [y]

    def __getitem__(self, index: Any) -> Any:
        return self.kept[index]

    def __len__(self) -> int:
        return 1


class WithAttributes(dict[str, Any]):
    pass


def attributed(y: Tensor) -> dict[str, Any]:
    tree = WithAttributes()
    tree.y = y  # type: ignore[attr-defined]
    return tree


def on_a_tensor(y: Tensor) -> Tensor:
    tree = y.sum(-1)
    tree.extra = y  # type: ignore[attr-defined]
    return tree


def cyclic(y: Tensor) -> list[Any]:
    tree: list[Any] = [y]
    tree.append(tree)
    return tree


REBUILT: dict[str, Callable[[Tensor], Any]] = {
    "frozen dataclass with slots": Frozen,
    "object": Plain,
    "slots": Slots,
    "named tuple": Pair,
    "mapping": Lookup,
    "sequence": Items,
    "dictionary with attributes": attributed,
    "user dictionary": lambda y: collections.UserDict(y=y),
    "ordered dictionary": lambda y: collections.OrderedDict(y=y),
    "deque": lambda y: collections.deque([y]),
    "namespace": lambda y: types.SimpleNamespace(y=y),
    "nested": lambda y: Plain([{"k": Slots(Pair(y))}, "text", 3]),
}
SEEN: dict[str, Callable[[Tensor], Any]] = {
    **REBUILT,
    "set": lambda y: {y},
    "view": lambda y: {"y": y}.values(),
    "closure": lambda y: lambda: y,
    "partial": lambda y: functools.partial(print, y),
    "cycle": cyclic,
    "distribution": lambda y: torch.distributions.Categorical(logits=y),
    "attribute of a tensor": on_a_tensor,
}
LAZY: dict[str, Callable[[Tensor], Any]] = {
    "generator": lambda y: (item for item in [y]),
    "iterator": lambda y: iter([y]),
    "map": lambda y: map(torch.relu, [y]),
    "nested": lambda y: {"k": ((item for item in [inner]) for inner in [y])},
}


@pytest.mark.parametrize("name", SEEN)
def test_tensors_are_seen_in_any_object(name: str) -> None:
    y = torch.ones(2, 3)
    assert any(tensor.shape == y.shape for tensor in tensors(SEEN[name](y)))


@pytest.mark.parametrize("name", LAZY)
def test_iterators_are_taken_only_where_asked(name: str) -> None:
    y = torch.ones(2, 3)
    tree = LAZY[name](y)
    assert tensors(tree) == []
    assert [tensor.shape for tensor in tensors(tree, consume=True)] == [y.shape]


def test_an_iterator_without_an_end_is_refused() -> None:
    with pytest.raises(NotSupported, match="may never end"):
        tensors(iter(int, 1), consume=True)


def test_a_container_counts_a_tensor_twice_an_object_once() -> None:
    y = torch.ones(2)
    assert len(tensors([y, {"again": y}])) == 2
    assert len(tensors(Plain([y]))) == len(tensors(Lookup(y))) == 1


def test_modules_are_not_looked_into() -> None:
    assert tensors({"layer": nn.Linear(2, 2), "kind": nn.Linear}) == []


@pytest.mark.parametrize("name", REBUILT)
def test_a_changed_tree_has_the_same_form(name: str) -> None:
    y = torch.ones(2, 3)
    tree = REBUILT[name](y)
    changed = each(tree, lambda tensor: tensor + 1)
    assert type(changed) in (type(tree), dict)
    assert [float(tensor.max()) for tensor in tensors(changed)] == [2.0]
    assert float(tensors(tree)[0].max()) == 1.0


def test_both_walks_take_tensors_in_one_order() -> None:
    trees = [REBUILT[name](torch.full((1,), float(k))) for k, name in enumerate(REBUILT)]
    tree = [trees, {"again": trees[0]}, Plain(trees[1])]
    visited: list[float] = []
    each(tree, lambda tensor: (visited.append(float(tensor)), tensor)[1])
    assert visited == [float(tensor) for tensor in tensors(tree)]


def test_one_tensor_twice_is_one_in_the_copy() -> None:
    y = torch.ones(2)
    first, second = own([y, y])
    assert first is second and first is not y


class Image(Tensor):
    pass


def test_a_copy_is_a_plain_tensor() -> None:
    assert type(own(torch.ones(2).as_subclass(Image))) is Tensor


class Greedy(nn.Module):
    def forward(self, xs: list[Tensor]) -> Tensor:
        return xs.pop().mul_(255)


def test_a_model_runs_on_a_copy_of_its_batch() -> None:
    batch = ([torch.ones(2)],)
    assert float(forward(Greedy(), batch).max()) == 255
    assert len(batch[0]) == 1 and float(batch[0][0].max()) == 1


class Cache:
    def __init__(self, keys: Tensor) -> None:
        self.keys = keys


class Decoder(nn.Module):
    def forward(self, x: Tensor, cache: Cache | None = None) -> dict[str, Any]:
        return {"logits": x, "cache": Cache(x * 2), "features": Plain(x * 3), "records": Frozen(x * 4)}


def test_a_state_that_goes_back_into_the_model_is_no_output() -> None:
    model = Decoder()
    output = model(torch.ones(2))
    assert states(model, output) == [output["cache"]]
    assert len(returned(model, output)) == 3
