"""What the numbers of a plan leave out is said first; a sparsity may be of all weights; no reason is false."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

import prunella as pr
from prunella.errors import BadInput, NotSupported, RequestError, TargetMissed
from prunella.graph.solve.groups import couple
from prunella.io import plan_file
from prunella.io.plan_file import load_plan, save_plan
from prunella.targets import Sparsity, parse_target, part_of
from tests.oracle import check_exact, check_reasons

ELEMENT = pr.Recipe(granularity=pr.Element())


class Summed(nn.Module):
    """A weight that is a running sum along its inputs, or along its filters."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.weight, self.head = nn.Linear(6, 16), nn.Parameter(torch.randn(20, 16)), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(F.linear(self.first(x).relu(), self.weight.cumsum(1)))
        return out


class SummedFilters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias, self.last = (
            nn.Parameter(torch.randn(16, 8, 3)),
            nn.Parameter(torch.randn(16)),
            nn.Conv1d(16, 4, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(F.conv1d(x, self.weight.cumsum(0), self.bias).relu())
        return out


class Splines(nn.Module):
    """KAN: sums over the inputs and over powers of them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Parameter(torch.randn(16, 8, 5)), nn.Parameter(torch.randn(4, 16, 5))

    def forward(self, x: Tensor) -> Tensor:
        for weight in (self.first, self.last):
            x = torch.einsum("bik,oik->bo", torch.stack([x.tanh() ** k for k in range(5)], -1), weight)
        return x


def looked_up() -> nn.Module:
    return nn.Sequential(nn.EmbeddingBag(100, 16), nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 1)).eval()


WAVE, BAGS, STEPS = torch.randn(1, 8, 20), torch.randint(0, 100, (4, 5)), torch.randn(5, 2, 6)
UNCOVERED: dict[str, tuple[Callable[[], nn.Module], Tensor, str]] = {
    "a running sum": (lambda: Summed().eval(), STEPS, "weight, 67.2% of all weights"),
    "a running sum of filters": (lambda: SummedFilters().eval(), WAVE, "weight, 66.7% of all weights"),
    "embedding": (looked_up, BAGS, "0.weight, 59.5% of all weights"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNCOVERED)
def test_weights_that_a_sparsity_leaves_out_are_named_first_with_their_share(name: str) -> None:
    build, x, words = UNCOVERED[name]
    plan = pr.plan(build(), x, ELEMENT, target=pr.Sparsity(0.5))
    assert str(plan).splitlines()[0].startswith(f"not covered by the sparsity: {words}")
    aside = {entry.entity: entry for entry in plan.frozen}
    for weight in words.split(", ")[0:1]:
        assert "masks do not cover weights that" in aside[weight].reason and aside[weight].where
    report = pr.report(build(), pr.apply_(build(), plan), x, plan=plan, rounds=5)
    assert str(report).splitlines()[1] == str(plan).splitlines()[0]


def test_a_model_that_is_covered_has_no_such_line() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    for recipe, target in ((ELEMENT, pr.Sparsity(0.5)), (pr.Recipe(), pr.Sparsity(0.5)), (pr.Recipe(), pr.MACs(0.5))):
        assert pr.plan(model, torch.randn(3, 6), recipe, target=target).caveats == ()


@pytest.mark.parametrize("name", UNCOVERED)
def test_a_sparsity_of_the_model_counts_every_weight(name: str) -> None:
    build, x, _ = UNCOVERED[name]
    model = build()
    count = pr.metrics.count(model)
    plan = pr.plan(model, x, ELEMENT, target=pr.Sparsity(0.02, of="model"))
    after = pr.metrics.count(pr.apply_(build(), plan))
    assert after.total - after.nonzero - (count.total - count.nonzero) == round(0.02 * count.total)
    assert plan.got == pytest.approx(0.02, abs=1 / count.total) and "got sparsity=0.0" in plan.outcome
    with pytest.raises(
        TargetMissed, match=r"sparsity=0.9,of=model cannot be met: removing all prunable units leaves sparsity="
    ):
        pr.plan(model, x, ELEMENT, target=pr.Sparsity(0.9, of="model"))


def test_a_sparsity_of_the_model_by_channels_counts_weights_too() -> None:
    model, x = looked_up(), BAGS
    plan = pr.plan(model, x, target=pr.Sparsity(0.2, of="model"), only=["1"])
    dense, small = pr.metrics.count(model), pr.metrics.count(pr.shrink(model, plan))
    assert 0.2 <= 1 - small.total / dense.total == plan.got < 0.2 + 17 / dense.total


def test_the_scope_is_written_and_read() -> None:
    target = Sparsity(1 / 3, of="model")
    assert parse_target(target.exact) == target != Sparsity(1 / 3)
    assert parse_target("sparsity=50% , of=model") == Sparsity(0.5, of="model")
    assert part_of(target, 0.5, lambda: 1.0) == Sparsity(1 / 6, of="model")
    assert str(target) == "sparsity=0.333333,of=model"
    for wrong in ("macs=0.5,of=model", "sparsity=0.5,of=units"):
        with pytest.raises(RequestError, match="cannot read the target"):
            parse_target(wrong)
    with pytest.raises(RequestError, match="known are 'prunable' and 'model'"):
        Sparsity(0.5, of="all")  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="cannot meet"):
        pr.plan(
            nn.Linear(8, 4), torch.randn(2, 8), pr.Recipe(granularity=pr.NM(2, 4)), target=Sparsity(0.5, of="model")
        )


def test_a_plan_file_keeps_what_is_left_out_and_the_format_before_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = pr.plan(looked_up(), BAGS, ELEMENT, target=pr.Sparsity(0.1, of="model"))
    back = load_plan(save_plan(plan, tmp_path / "now.plan"))
    assert back.caveats == plan.caveats != () and back.target == plan.target and str(back) == str(plan)
    with monkeypatch.context() as patch:
        patch.setattr(plan_file, "VERSION", 3)
        save_plan(plan, tmp_path / "before.plan")
    assert str(load_plan(tmp_path / "before.plan")) == str(plan)


# -- reasons -------------------------------------------------------------------------------------------------------

WORDS: dict[str, tuple[Callable[[], nn.Module], Tensor, str, str]] = {
    "a running sum of filters": (lambda: SummedFilters().eval(), WAVE, "weight", "cumsum runs along it"),
    "orthogonal": (
        lambda: nn.Sequential(orthogonal(nn.Linear(6, 6))).eval(),
        STEPS,
        "0.parametrizations.weight.original",
        "tril",
    ),
    "splines": (lambda: Splines().eval(), torch.randn(2, 8), "first", "is not cut in bmm"),
    "a running sum": (lambda: Summed().eval(), STEPS, "first.weight", "it is multiplied with a tensor that is not cut"),
}


@pytest.mark.parametrize("name", WORDS)
def test_what_stays_is_told_with_the_operation_and_the_line(name: str) -> None:
    build, x, entity, words = WORDS[name]
    graph = couple(build(), x)
    check_reasons(graph)
    entry = next(entry for entry in graph.frozen if entry.entity == entity)
    assert words in entry.reason and "prunella" not in entry.where and "forward.py" not in entry.where


@pytest.mark.parametrize("name", ["orthogonal", "splines"])
@pytest.mark.parametrize("recipe", [pr.Recipe(), ELEMENT], ids=["channels", "masks"])
def test_a_refusal_names_what_computes_the_weights(name: str, recipe: pr.Recipe) -> None:
    build, x, _, words = WORDS[name]
    model = build()
    with pytest.raises(NotSupported) as caught:
        pr.plan(model, x, recipe, target=pr.Sparsity(0.5))
    assert "no layer that multiplies" not in str(caught.value)
    assert words.split()[0] in str(caught.value) or "bmm" in str(caught.value)


def test_lazy_modules_are_told_to_run_once() -> None:
    model, x = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(2)), torch.randn(3, 6)
    for act in (lambda: pr.plan(model, x, target=pr.MACs(0.5)), lambda: couple(model, x)):
        with pytest.raises(BadInput, match=r"^0\.weight has no size yet, and 3 more\n[\s\S]*run the model once"):
            act()
    model(x)
    assert pr.plan(model, x, target=pr.MACs(0.5)).keep


@pytest.mark.parametrize("part", [0, 1])
def test_modules_of_torchscript_are_told_as_such(part: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        scripted: Any = torch.jit.script(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)))
    model = scripted if part == 0 else nn.Sequential(nn.Linear(6, 6), scripted)
    name = ("the model", "1")[part]
    with pytest.raises(NotSupported, match=rf"^{name} is a torch.jit.ScriptModule"):
        pr.plan(model, torch.randn(3, 6), target=pr.MACs(0.5))


def test_functions_of_torchscript_are_followed() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")

        @torch.jit.script
        def gate(a: Tensor, b: Tensor) -> Tensor:
            return torch.tanh(a) * torch.sigmoid(b)

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.last = nn.Linear(6, 32), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(gate(*self.wide(x).chunk(2, -1)))
            return out

    assert [group.size for group in couple(Gated().eval(), torch.randn(3, 6)).groups] == [16]


def test_a_model_that_runs_but_not_when_observed_is_not_blamed_on_its_inputs() -> None:
    class Shy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            if torch._C._len_torch_dispatch_stack():
                raise RuntimeError("somebody looks")
            out: Tensor = self.layer(x)
            return out

    with pytest.raises(NotSupported, match="not while its operations are observed\nRuntimeError: somebody looks"):
        couple(Shy(), torch.randn(2, 4))
    with pytest.raises(BadInput, match=r"does not run on the example inputs[\s\S]*raises the same without prunella"):
        couple(nn.Linear(4, 2), torch.randn(2, 5))


def test_unused_and_single_parameters_are_told_too() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.spare = nn.Parameter(torch.tensor(2.0)), nn.Parameter(torch.zeros(3, 3))
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(self.first(x).relu()) * self.scale
            return out

    graph = check_exact(Odd(), torch.randn(3, 6)).graph
    reasons = {entry.entity: entry.reason for entry in graph.frozen}
    assert reasons["spare"] == "no operation of this run reads it"
    assert reasons["scale"].startswith("mul reads it")
