"""Other arguments than those of the example: values, arguments left out, lists of other length, gradients on."""

from __future__ import annotations

import builtins
import dataclasses
import enum
import os
import random
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from random import random as drawn
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, is_grad_enabled, nn

import prunella as pr
from prunella.graph.arguments import variants
from prunella.graph.solve.groups import couple
from prunella.graph.trace.queries import as_in_training
from prunella.graph.verify import verify
from prunella.model.contained import contained
from prunella.model.executed import executed

RECIPE = pr.Recipe(pr.criteria.random, pr.Channel(), pr.uniform)


class Base(nn.Module):
    """Where an argument says so, the units of `a` are coupled with one another; `free` is beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.free, self.c = (nn.Linear(*sizes) for sizes in ((6, 8), (8, 3), (6, 8), (8, 3)))

    def end(self, x: Tensor, *, turned: object) -> Tensor:
        y = self.a(x).relu()
        y = y.flip(-1) + y if turned else y
        return self.b(y) + self.c(self.free(x).relu())  # type: ignore[no-any-return]


class Kind(enum.Enum):
    PLAIN, TURNED = 1, 2


@dataclasses.dataclass(frozen=True)
class Options:
    turned: bool = False
    scale: float = 1.0


class Text(Base):
    def forward(self, x: Tensor, mode: str = "plain") -> Tensor:
        return self.end(x, turned=mode == "turned")


class InTable(Base):
    TABLE: Mapping[str, bool] = {"no": False, "yes": True}

    def forward(self, x: Tensor, mode: str = "no") -> Tensor:
        return self.end(x, turned=self.TABLE[mode])


class Flag(Base):
    def forward(self, x: Tensor, turned: bool) -> Tensor:
        return self.end(x, turned=turned)


class Member(Base):
    def forward(self, x: Tensor, *, kind: Kind = Kind.PLAIN) -> Tensor:
        return self.end(x, turned=kind is Kind.TURNED)


class InObject(Base):
    def forward(self, x: Tensor, options: Options) -> Tensor:
        return self.end(x * options.scale, turned=options.turned)


class Nested(Base):
    def forward(self, x: Tensor, options: dict[str, Any]) -> Tensor:
        return self.end(x, turned=options["how"][1])


class Number(Base):
    def forward(self, x: Tensor, level: int = 0) -> Tensor:
        return self.end(x, turned=level > 40)


class LeftOut(Base):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.end(x if mask is None else x * mask, turned=mask is not None)


class NotGiven(Base):
    """The example, which leaves the scale out, runs more than the other side."""

    def forward(self, x: Tensor, scale: float | None = None) -> Tensor:
        y = self.a(x).relu()
        if scale is None:
            y = y * 2
        else:
            y = y.flip(-1) * scale + y
        return self.b(y) + self.c(self.free(x).relu())  # type: ignore[no-any-return]


class Gate(Base):
    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        y = self.a(x).relu()
        y = y if gate is None else y * gate
        return self.b(y) + self.c(self.free(x).relu())  # type: ignore[no-any-return]


class Keywords(Base):
    def forward(self, x: Tensor, **options: Any) -> Tensor:
        return self.end(x, turned=options.get("turned"))


class More(Base):
    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        return self.end(x, turned=len(more) > 0)


class Longer(Base):
    def forward(self, parts: list[Tensor]) -> Tensor:
        return self.end(parts[0], turned=len(parts) > 2)


class Key(Base):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.end(batch["x"], turned="other" in batch)


class Turns(Base):
    """One turn of the loop reverses the units, two add them up."""

    def forward(self, x: Tensor, turns: int = 0) -> Tensor:
        y = self.a(x).relu()
        for _ in range(turns):
            y = y.flip(-1) + y
        return self.b(y) + self.c(self.free(x).relu())  # type: ignore[no-any-return]


class Tasks(Base):
    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleDict({"p": nn.Linear(8, 3), "q": nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 3))})

    def forward(self, x: Tensor, task: str = "p") -> Tensor:
        return self.heads[task](self.a(x).relu()) + self.c(self.free(x).relu())  # type: ignore[no-any-return]


class OneOfTwo(Base):
    """Each of two arguments undoes the other."""

    def forward(self, x: Tensor, up: bool = False, down: bool = False) -> Tensor:
        y = self.a(x).relu()
        y = y.roll(1, -1) if up else y
        y = y.roll(-1, -1) if down else y
        return self.b(y) + self.c(self.free(x).relu())  # type: ignore[no-any-return]


class LeftOutTruth(Base):
    def forward(self, x: Tensor, *, turned: bool | None = None) -> Tensor:
        return self.end(x, turned=turned)


class Returns(Base):
    """It returns before the end, from turned units."""

    def forward(self, x: Tensor, early: bool = False) -> Tensor:
        y = self.a(x).relu()
        if early:
            return self.b(y.flip(-1))  # type: ignore[no-any-return]
        return self.b(y) + self.c(self.free(x).relu())  # type: ignore[no-any-return]


class Inside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Text()

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        return self.inner(x, **options)  # type: ignore[no-any-return]


class Rolled(Base):
    """The same instructions run whatever the number is."""

    def forward(self, x: Tensor, by: int = 0) -> Tensor:
        return self.b(self.a(x).relu().roll(by, -1)) + self.c(self.free(x).relu())  # type: ignore[no-any-return]


class Mixed(Base):
    def forward(self, x: Tensor, share: float = 0.0) -> Tensor:
        y = self.a(x).relu()
        return self.b(y + share * y.flip(-1)) + self.c(self.free(x).relu())  # type: ignore[no-any-return]


class Named(NamedTuple):
    x: Tensor
    turned: bool = False


class InNamed(Base):
    def forward(self, named: Named) -> Tensor:
        return self.end(named.x, turned=named.turned)


class Auxiliary(Base):
    """A second head, which reads turned units and runs on request alone."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(8, 3)

    def forward(self, x: Tensor, second: bool = False) -> Any:
        y = self.a(x).relu()
        result = self.b(y) + self.c(self.free(x).relu())
        return (result, self.second(y.flip(-1))) if second else result


class Batch(Base):
    """An argument with the name `batch`."""

    def forward(self, batch: Tensor, model: str = "plain") -> Tensor:
        return self.end(batch, turned=model == "turned")


X = torch.linspace(-1, 1, 18).reshape(3, 6).sin() * 3
CASES: dict[str, tuple[type[Base], Any, Any]] = {
    "a text": (Text, X, (X, "turned")),
    "a key of a table": (InTable, X, (X, "yes")),
    "a truth": (Flag, (X, False), (X, True)),
    "a truth by name": (Flag, {"x": X, "turned": False}, (X, True)),
    "a member of an enumeration": (Member, X, {"x": X, "kind": Kind.TURNED}),
    "in an object": (InObject, (X, Options()), (X, Options(turned=True))),
    "in a list in a dictionary": (Nested, (X, {"how": [1, False]}), (X, {"how": [1, True]})),
    "a number": (Number, X, (X, 99)),
    "a mask that is left out": (LeftOut, X, (X, torch.ones(3, 1))),
    "a scale that is left out": (NotGiven, X, (X, 2.0)),
    "a gate of the units": (Gate, X, (X, torch.rand(3, 8))),
    "a keyword": (Keywords, X, {"x": X, "turned": True}),
    "more arguments": (More, X, (X, X)),
    "a longer list": (Longer, ([X, X],), ([X, X, X],)),
    "a further key": (Key, ({"x": X},), ({"x": X, "other": X},)),
    "a turn of a loop": (Turns, X, (X, 1)),
    "another head": (Tasks, X, (X, "q")),
    "one of two": (OneOfTwo, X, (X, True)),
    "the other of two": (OneOfTwo, X, (X, False, True)),
    "a truth that is left out": (LeftOutTruth, X, {"x": X, "turned": True}),
    "an early return": (Returns, X, (X, True)),
    "a keyword of an inner module": (Inside, X, {"x": X, "mode": "turned"}),
    "in a named tuple": (InNamed, (Named(X),), (Named(X, turned=True),)),
    "a second head": (Auxiliary, X, (X, True)),
    "an argument named batch": (Batch, {"batch": X}, {"batch": X, "model": "turned"}),
}


@pytest.mark.parametrize(("kind", "example", "other"), CASES.values(), ids=CASES)
def test_a_cut_is_right_with_other_arguments(kind: type[Base], example: Any, other: Any) -> None:
    torch.manual_seed(0)
    model = kind().eval()
    plan = pr.plan(model, example, RECIPE, target=pr.Params(0.9))
    small = pr.shrink(model, plan)
    assert verify(model, small, plan.changes, other).exact
    assert any(name.endswith("free") for name in plan.keep), "what no argument couples is pruned"
    assert any("where a cut that is right on the example would be wrong" in line for line in plan.remarks)


@pytest.mark.parametrize(("kind", "other"), [(Rolled, 3), (Mixed, 0.3)])
def test_a_cut_is_right_with_other_numbers_in_the_same_instructions(kind: type[Base], other: float) -> None:
    model = kind().eval()
    plan = pr.plan(model, X, RECIPE, target=pr.Params(0.9))
    assert verify(model, pr.shrink(model, plan), plan.changes, (X, other)).exact and "free" in plan.keep


INNER = (
    "some outputs, or tensors that the model keeps, are inner units or states of blocks: "
    "the smaller model has those of the kept ones"
)


class Features(Base):
    def forward(self, x: Tensor, return_features: bool = False) -> Any:
        y = self.a(x).relu()
        result = self.b(y) + self.c(self.free(x).relu())
        return (result, {"features": y}) if return_features else result


def test_inner_units_that_an_argument_returns_are_those_that_are_kept_and_the_plan_says_so() -> None:
    model = Features().eval()
    plan = pr.plan(model, X, RECIPE, target=pr.Params(0.8))
    small = pr.shrink(model, plan)
    result, inner = small(X, return_features=True)
    kept = plan.keep["a"]
    assert torch.equal(inner["features"], model(X, True)[1]["features"][:, kept]) and result.shape == (3, 3)
    assert f"with return_features=True {INNER}" in plan.remarks
    assert not verify(model, small, plan.changes, (X, True)).exact
    assert verify(model, small, plan.changes, (X, True), further=True).as_cut
    first = {"a.weight": {0: torch.arange(int(kept.sum()))}}
    wrong = dataclasses.replace(plan.changes, cuts={**plan.changes.cuts, **first})
    assert not verify(model, small, wrong, (X, True), further=True).exact, "other positions than those of the output"


def test_inner_units_that_an_argument_keeps_on_the_model_are_named_too() -> None:
    class Logs(Base):
        def forward(self, x: Tensor, log: bool = False) -> Tensor:
            y = self.a(x).relu()
            if log:
                self.last = y
            return self.b(y)  # type: ignore[no-any-return]

    plan = pr.plan(Logs().eval(), X, RECIPE, target=pr.Params(0.8))
    assert f"with log=True {INNER}" in plan.remarks


def test_what_no_guess_fits_is_named() -> None:
    class Strange(Base):
        def forward(self, x: Tensor, state: Options | None = None) -> Tensor:
            return self.end(x, turned=state is not None and state.turned)

    plan = pr.plan(Strange().eval(), X, RECIPE, target=pr.Params(0.9))
    assert "no other value was tried, since the model took none of the guesses: state; give examples" in plan.remarks


def test_a_model_without_such_arguments_is_run_no_more() -> None:
    class Counted(Base):
        runs = 0

        def forward(self, x: Tensor) -> Tensor:
            Counted.runs += 1
            return self.end(x, turned=False)

    assert variants(Counted().eval(), X).batches == () and Counted.runs == 0
    assert variants(nn.Sequential(nn.Linear(6, 8)), X).batches == ()


def test_a_trial_run_writes_no_file_and_prints_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Saves(Base):
        def forward(self, x: Tensor, save: bool = False, log: str | None = None) -> Tensor:
            if save:
                print("saved")
                torch.save(x, tmp_path / "x.pt")
            if log:
                with open(tmp_path / "log", "a") as file:
                    file.write("log")
            return self.end(x, turned=False)

    pr.plan(Saves().eval(), X, RECIPE, target=pr.Params(0.9))
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""
    before, file = builtins.open, tmp_path / "file"
    file.write_text("here")
    with contained():
        assert file.read_text() == "here"
        with pytest.raises(PermissionError, match="changes no file"):
            file.unlink()
        for start in (lambda: os.system("true"), lambda: subprocess.run(["true"])):
            with pytest.raises(PermissionError, match="starts no program"):
                start()
    assert builtins.open is before and subprocess.run(["true"]).returncode == 0


def test_what_is_right_with_an_argument_is_not_kept_for_it() -> None:
    """The call returns the units of `free`, which stay prunable, and turns those of `a`."""

    class Both(Base):
        def forward(self, x: Tensor, both: bool = False) -> Any:
            y, free = self.a(x).relu(), self.free(x).relu()
            result = self.b(y.sort(-1).values if both else y) + self.c(free)
            return (result, free) if both else result

    torch.manual_seed(0)
    plan = pr.plan(Both().eval(), X, RECIPE, target=pr.Params(0.9))
    assert list(plan.keep) == ["free"]
    assert any("with both=True a cut of it is wrong" in entry.reason for entry in plan.frozen)


def test_guards_of_torch_are_told_the_truth() -> None:
    weight = nn.Parameter(torch.ones(1))
    with torch.no_grad(), as_in_training(Base()):
        assert torch.is_grad_enabled(), "this file is that of the model"
        with torch.no_grad():
            pass
        assert not (weight * 2).requires_grad, "the guard has not switched gradients on"


QUERIES: dict[str, Callable[[], Any]] = {
    "gradients": lambda: torch.is_grad_enabled(),
    "gradients by name": lambda: is_grad_enabled(),
    "inference": lambda: torch.is_inference_mode_enabled(),
    "autocast": lambda: torch.is_autocast_enabled("cpu"),
    "a rare draw": lambda: random.random() < 0.001,
    "a rare draw by name": lambda: drawn() < 0.001,
    "a draw of numpy": lambda: np.random.rand() > 0.999,
}


class Asks(Base):
    def __init__(self, query: Callable[[], Any]) -> None:
        super().__init__()
        self.query = [query]

    def forward(self, x: Tensor) -> Tensor:
        return self.end(x, turned=self.query[0]())


@pytest.mark.parametrize("query", QUERIES.values(), ids=QUERIES)
def test_what_the_source_asks_beside_its_tensors_is_tried_on_its_other_side(query: Callable[[], Any]) -> None:
    graph = couple(Asks(query).eval(), X)
    sizes = sorted((group.name, group.size) for group in graph.groups)
    assert sizes == [("a", 4), ("free", 8)], "the units of a are pairs on the other side"
    assert [branch.fault for branch in graph.branches] == [""]
    assert torch.is_grad_enabled is is_grad_enabled and random.random is drawn


def test_the_training_mode_is_one_with_gradients() -> None:
    class Head(Base):
        def forward(self, x: Tensor) -> Tensor:
            return self.end(x, turned=self.training and torch.is_grad_enabled())

    assert next(group.size for group in couple(Head().eval(), X).groups if group.name == "a") == 4


def test_steps_tell_what_is_passed_over_and_what_runs_again() -> None:
    class Steps(nn.Module):
        def forward(self, x: Tensor, turns: int, *, more: bool) -> Tensor:
            if more:
                x = x + 1
            for _ in range(turns):
                x = x * 2
            return x

    model, ways = Steps(), []
    for turns, more in ((1, True), (1, False), (2, True), (3, True)):
        with executed(model) as steps:
            model(X, turns, more=more)
        ways.append(steps)
    once, less, twice, often = ways
    assert not less <= once and once <= twice and not twice <= once
    assert twice <= often and often <= twice
