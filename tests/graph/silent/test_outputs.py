"""Whatever a model returns or keeps is an output: it is fixed, and it is compared."""

from __future__ import annotations

import gc
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tests.model.test_trees import LAZY, SEEN
from torch import Tensor, nn

import prunella as pr
from prunella.errors import CheckFailed, NotSupported
from prunella.graph.solve.groups import couple
from prunella.graph.verify import check, verify

X = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """8 -> 16 -> 16 -> 3; `finish` makes the output of the last layer and of the first hidden one."""

    def __init__(self, finish: Callable[[Net, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.finish = finish

    def forward(self, x: Tensor) -> Any:
        hidden = self.a(x).relu()
        return self.finish(self, self.c(self.b(hidden).relu()), hidden)


def pruned(model: nn.Module, x: Any = X) -> tuple[pr.Plan, nn.Module]:
    torch.manual_seed(0)
    recipe = pr.Recipe(pr.criteria.random, pr.Channel(), pr.uniform)
    plan = pr.plan(model, x, recipe, target=pr.Sparsity(0.3))
    return plan, pr.shrink(model, plan)


def groups(model: nn.Module, x: Any = X) -> set[str]:
    return {group.name for group in couple(model, x).groups}


@pytest.mark.parametrize("form", {**SEEN, **LAZY})
def test_outputs_in_any_object_keep_their_size(form: str) -> None:
    build = {**SEEN, **LAZY}[form]
    assert groups(Net(lambda _, y, hidden: build(y))) == {"a", "b"}
    assert groups(Net(lambda _, y, hidden: (y, build(hidden)))) == {"b"}


@dataclass
class Out:
    logits: Tensor


def test_a_wrong_value_in_an_object_is_found() -> None:
    model = Net(lambda _, y, hidden: Out(y))
    plan, small = pruned(model)
    assert verify(model, small, plan.changes, X).exact
    with torch.no_grad():
        small.c.bias += 1  # type: ignore[operator, union-attr]
    assert not verify(model, small, plan.changes, X).exact


def keep(net: Net, y: Tensor, hidden: Tensor) -> Tensor:
    net.features = hidden
    return y


def keep_in_a_list(net: Net, y: Tensor, hidden: Tensor) -> Tensor:
    net.features = [hidden]  # type: ignore[assignment]
    return y


def keep_in_an_object(net: Net, y: Tensor, hidden: Tensor) -> Tensor:
    vars(net.store)["hidden"] = hidden
    return y


STORE: dict[str, Tensor] = {}


def keep_elsewhere(net: Net, y: Tensor, hidden: Tensor) -> Tensor:
    STORE["hidden"] = hidden
    return y


KEPT = {
    keep: "the model keeps it after a run, as features",
    keep_in_a_list: "the model keeps it after a run, as features",
    keep_in_an_object: "the model keeps it after a run, as store",
    keep_elsewhere: "it is kept after a run, outside the model",
}


@pytest.mark.parametrize("finish", KEPT, ids=lambda finish: finish.__name__)
def test_what_outlives_a_run_is_an_output(finish: Callable[[Net, Tensor, Tensor], Any]) -> None:
    model = Net(finish)
    model.store = types.SimpleNamespace()  # type: ignore[assignment]
    model(X).sum().backward()
    graph = couple(model, X)
    assert {group.name for group in graph.groups} == {"b"}
    assert next(f.reason for f in graph.frozen if f.entity == "a.weight") == KEPT[finish]
    pruned(model)


def test_what_a_frozen_object_keeps_is_an_output() -> None:
    STORE["a list"] = []  # type: ignore[assignment]  # the collector knows a dictionary of what it knows
    gc.freeze()  # as a server does before it forks
    frozen = gc.get_freeze_count()
    try:
        graph, free = couple(Net(keep_elsewhere), X), couple(Net(lambda net, y, hidden: y), X)
        assert gc.get_freeze_count() >= frozen * 0.9, "they are frozen still"
    finally:
        gc.unfreeze()
        STORE.clear()
    assert {group.name for group in graph.groups} == {"b"}
    assert {group.name for group in free.groups} == {"a", "b"}, "what nobody keeps is not an output"


def test_what_the_model_keeps_is_compared() -> None:
    model = Net(keep)
    plan, small = pruned(model)
    with torch.no_grad():
        small.a.bias += 1  # type: ignore[operator, union-attr]
        small.b.weight.zero_()  # type: ignore[operator, union-attr]
        model.b.weight.zero_()
    assert not verify(model, small, plan.changes, X).exact, "the outputs are equal, the features are not"


def test_a_dictionary_that_is_filled_is_an_output() -> None:
    class Filling(Net):
        def forward(self, x: Tensor, out: dict[str, Tensor]) -> Tensor:  # type: ignore[override]
            out["hidden"] = self.a(x)
            return self.c(self.b(out["hidden"].relu()).relu())

    out: dict[str, Tensor] = {}
    assert groups(Filling(keep), (X, out)) == {"b"}
    assert out == {}


def test_hooks() -> None:
    plain = Net(lambda _, y, hidden: y)
    plain.a.register_forward_hook(lambda module, args, output: output.view(-1, module.out_features) * 1.5)
    plain.b.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    assert groups(plain) == {"a", "b"}
    pruned(plain)
    width = Net(lambda _, y, hidden: y)
    size = width.a.out_features
    width.a.register_forward_hook(lambda module, args, output: output.view(-1, size))
    assert groups(width) == {"b"}
    storing = Net(lambda _, y, hidden: y)
    store: dict[str, Tensor] = {}
    storing.b.register_forward_hook(lambda module, args, output: store.__setitem__("b", output))
    assert groups(storing) == {"a"}


@pytest.mark.parametrize(
    ("finish", "why"),
    [
        (lambda _, y, hidden: None, "returns no tensor"),
        (lambda _, y, hidden: y.argmax(-1), "returns tensors of int64 alone"),
    ],
)
def test_a_model_without_numbers_is_refused(finish: Any, why: str) -> None:
    with pytest.raises(NotSupported, match=why):
        pruned(Net(finish))


def test_empty_outputs_are_compared_by_inner_layers() -> None:
    model = Net(lambda _, y, hidden: {"boxes": y[y[:, 0] > 1e9]})
    plan, small = pruned(model)
    assert verify(model, small, plan.changes, X).exact
    with torch.no_grad():
        small.c.bias += 1  # type: ignore[operator, union-attr]
    assert not verify(model, small, plan.changes, X).exact
    with pytest.raises(CheckFailed):
        check(model, small, plan.changes, X)


def test_nothing_to_compare_is_no_pass() -> None:
    class Hollow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 8))

        def forward(self, x: Tensor) -> Tensor:
            y = x @ self.weight.t()
            return y[y[:, 0] > 1e9]

    model = Hollow()
    plan = pr.Plan.of_structure(couple(model, X), {})
    with pytest.raises(NotSupported, match="no number"):
        verify(model, model, plan.changes, X)
