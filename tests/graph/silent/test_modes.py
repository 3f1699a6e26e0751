"""Both modes of a model share one graph, and the smaller model is tried in training mode."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.graph.silent.test_outputs import X, pruned
from torch import Tensor, nn

import prunella as pr
from prunella.errors import NotSupported
from prunella.graph.solve.groups import couple
from prunella.graph.training_pass import training_fault

Branch = Callable[["Modes", Tensor, Any], Any]


class Modes(nn.Module):
    """8 -> 16 -> 16 -> 3 with an auxiliary head; in training `branch` makes something of the hidden layer."""

    def __init__(self, branch: Branch, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.a, self.b, self.aux, self.head = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3), nn.Linear(16, 3)
        self.branch, self.norm = branch, norm or nn.Identity()

    def forward(self, x: Tensor, target: Tensor | None = None) -> Any:
        hidden = self.norm(self.a(x)).relu()
        beside = self.branch(self, hidden, target) if self.training else None
        if isinstance(beside, Tensor) and beside.shape == hidden.shape:
            hidden, beside = beside, None
        y = self.head(self.b(hidden).relu())
        return y if beside is None else (y, beside)


def masked_by(mask: Callable[[Tensor], Tensor]) -> Branch:
    return lambda model, hidden, target: hidden * mask(hidden)


def factored(model: Modes, hidden: Tensor, target: Any) -> Tensor:
    return hidden.reshape(2, 4, 4).flatten(1) * 1.0


def checked_width(model: Modes, hidden: Tensor, target: Any) -> Tensor:
    assert hidden.shape[-1] == 16, "the source knows the width"
    return hidden * 1.0


BOTH, LAST = {"a", "b"}, {"b"}
BRANCHES: dict[str, tuple[Branch, set[str]]] = {
    "auxiliary head": (lambda model, hidden, target: model.aux(hidden), BOTH),
    "auxiliary dictionary": (lambda model, hidden, target: {"aux": [model.aux(hidden)]}, BOTH),
    "returned features": (lambda model, hidden, target: [hidden], LAST),
    "fixed mask": (masked_by(lambda hidden: torch.bernoulli(torch.full((1, 16), 0.5))), LAST),
    "mask of its size": (masked_by(lambda hidden: torch.bernoulli(torch.full_like(hidden, 0.5))), BOTH),
    "fixed factors": (factored, LAST),
    "fixed width": (checked_width, LAST),
}


@pytest.mark.parametrize("name", BRANCHES)
def test_both_modes_are_in_one_graph(name: str) -> None:
    branch, expected = BRANCHES[name]
    model = Modes(branch)
    assert {group.name for group in couple(model, X).groups} == expected
    _, small = pruned(model)
    dense_outputs, small_outputs = model.train()(X), small.train()(X)
    assert str(_shapes(dense_outputs)) == str(_shapes(small_outputs))


def _shapes(output: Any) -> Any:
    if isinstance(output, Tensor):
        return tuple(output.shape)
    return {k: _shapes(v) for k, v in output.items()} if isinstance(output, dict) else [_shapes(v) for v in output]


def test_a_batch_of_one_does_not_hide_a_branch() -> None:
    model = Modes(BRANCHES["auxiliary head"][0], nn.BatchNorm1d(16))
    graph = couple(model, X[:1])
    assert graph.untried == ""
    assert any(member.entity == "aux.weight" for group in graph.groups for member in group.members)


def needs_target(model: Modes, hidden: Tensor, target: Tensor | None) -> Tensor:
    if target is None:
        raise ValueError("targets should not be None")
    return nn.functional.cross_entropy(model.aux(hidden), target)


def needs_target_at_the_end(model: Modes, hidden: Tensor, target: Tensor | None) -> Tensor:
    return nn.functional.cross_entropy(model.aux(hidden), target)  # type: ignore[arg-type]


def test_a_model_that_needs_targets_is_pruned_with_a_remark() -> None:
    plan, _ = pruned(Modes(needs_target))
    assert {row.name for row in plan.rows} == BOTH
    assert plan.remarks[-1] == "not tried in training mode: ValueError: targets should not be None"


def test_what_was_seen_before_the_end_counts() -> None:
    model = Modes(needs_target_at_the_end)
    plan, small = pruned(model)
    assert {row.name for row in plan.rows} == BOTH, "the outputs of aux are frozen, its inputs follow"
    assert "not tried in training mode: TypeError" in plan.remarks[-1]
    small.train()(X, torch.tensor([0, 1]))


def test_a_flag_of_another_module_and_by_getattr() -> None:
    class Asking(Modes):
        def forward(self, x: Tensor, target: Any = None) -> Any:
            hidden = self.a(x).relu()
            return self.aux(hidden) if getattr(self.b, "training") else self.head(self.b(hidden).relu())  # noqa: B009

    model = Asking(checked_width)
    assert couple(model, X).unused == ()
    assert "training" in vars(model) and "training" in vars(model.b)


def test_plain_models_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[bool] = []
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(), nn.Linear(16, 3))
    model.register_forward_pre_hook(lambda *_: runs.append(True))
    couple(model, X)
    assert runs == [True]


class Merging(nn.Linear):
    """Merges an adapter into its weight in evaluation mode."""

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.delta, self.merged = nn.Parameter(torch.randn(8, 8)), False

    def train(self, mode: bool = True) -> Merging:
        super().train(mode)
        if mode == self.merged:
            self.weight.data += self.delta.data * (-1 if mode else 1)
            self.merged = not mode
        return self


@pytest.mark.parametrize("training", [True, False])
def test_weights_that_a_mode_merges_are_as_they_were(training: bool) -> None:
    model = nn.Sequential(Merging(), nn.Linear(8, 3)).train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    couple(model, X)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == [training] * 3 and model[0].merged == (not training)


def test_a_smaller_model_that_cannot_train_is_never_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Modes(BRANCHES["auxiliary head"][0])
    plan, small = pruned(model)
    assert training_fault(model, small, plan.changes, X) == ""
    small.aux = nn.Linear(16, 3)
    fault = training_fault(model, small, plan.changes, X)
    assert fault.startswith("the smaller model does not run in training mode: RuntimeError: mat1 and mat2")
    small.aux = nn.Linear(11, 4)
    fault = training_fault(model, small, plan.changes, X)
    assert fault == "in training mode the smaller model returns 2x3, 2x4 instead of 2x3, 2x3"
    monkeypatch.setattr(sys.modules["prunella.transform.shrink"], "training_fault", lambda *_: fault)
    with pytest.raises(NotSupported, match="cannot be trained"):
        pr.shrink(model, plan)


class Deep(nn.Module):
    """Residual blocks with deep supervision: in training a head reads the output of each block."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleList([nn.Linear(8, 12), nn.Linear(12, 8)]) for _ in range(3))
        self.heads = nn.ModuleList(nn.Linear(8, 2) for _ in range(3))

    def forward(self, x: Tensor) -> Any:
        outputs = []
        for (up, down), head in zip(self.blocks, self.heads, strict=True):  # type: ignore[misc]
            x = x + down(up(x).relu())
            if self.training:
                outputs.append(head(x))
        return outputs or self.heads[-1](x)


def test_deep_supervision_keeps_its_outputs() -> None:
    model = Deep()
    plan, small = pruned(model)
    assert len(plan.rows) == 3
    assert [tuple(y.shape) for y in small.train()(X)] == [(2, 2)] * 3
