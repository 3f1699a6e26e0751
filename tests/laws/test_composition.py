"""Parts mix: random combinations of what is registered run on a tiny network, or are refused by a sentence.

New criteria, granularities, allocations and schedules are drawn as soon as they are registered.
"""

from __future__ import annotations

import copy
import inspect
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

import prunella as pr
from prunella.errors import RequestError
from prunella.granularity import Granularity, Masking, Structural
from prunella.planning.checks import checked_target
from prunella.registry import catalogue
from prunella.registry.method import Method, MethodKind
from tests.graphs import IMAGE, images, square_loss

DRAWS = 40
DATA = images(2)


class Tiny(nn.Module):
    """A convolution, two residual blocks and a readout: channels, a depth, patterns of 2 and 4."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.blocks = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        for block in self.blocks:
            x = x + block(x).relu()
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return Tiny().eval()


def kinds(kind: MethodKind) -> list[Method]:
    return [method for method in catalogue.methods() if method.kind == kind and method.status != "experiment"]


ARGUMENTS: dict[str, Any] = {"n": 2, "m": 4, "rows": 2, "cols": 2, "size": 2, "tokens": (0, 1), "steps": 2, "lr": 1e-3}
"""What a part takes where it has no default."""


def granularity_of(method: Method) -> Granularity:
    """An instance; what has no default is taken from `ARGUMENTS`."""
    needed = [p for p in inspect.signature(method.function).parameters.values() if p.default is p.empty]
    return method.function(**{p.name: ARGUMENTS.get(p.name, 2) for p in needed})  # type: ignore[no-any-return]


RECOVERIES: dict[str, Callable[[nn.Module, nn.Module, pr.Plan], object]] = {
    "nothing": lambda small, dense, plan: None,
    "finetune": lambda small, dense, plan: pr.finetune(small, DATA, square_loss, steps=2, lr=1e-3),
    "recalibrate_bn": lambda small, dense, plan: pr.recalibrate_bn(small, DATA),
    "reconstruct": lambda small, dense, plan: pr.reconstruct(small, dense, DATA, plan),
    "distill": lambda small, dense, plan: pr.distill(
        small, dense, DATA, steps=2, lr=1e-3, imitate=pr.recovery.distill_logits
    ),
}


@dataclass(frozen=True)
class Draw:
    """One combination."""

    number: int
    criterion: Method
    granularity: Method
    allocation: Method
    schedule: Method
    recovery: str
    recipe: pr.Recipe

    def __str__(self) -> str:
        parts = (self.criterion.name, self.granularity.name, self.allocation.name, self.schedule.name, self.recovery)
        return f"{self.number}: {' '.join(parts)}"


def bound(method: Method) -> bool:
    """Whether its knobs have defaults, so that it can be drawn without more."""
    return all(knob.default is not knob.empty for knob in method.knobs)


def draws(count: int = DRAWS, seed: int = 0) -> list[Draw]:
    """Each part of each kind comes before any comes twice."""
    order = random.Random(seed)

    def shuffled(options: list[Any]) -> list[Any]:
        found: list[Any] = []
        while len(found) < count:
            found += order.sample(options, len(options))
        return found

    granularities = kinds("granularity")
    parts = (
        shuffled([m for m in kinds("criterion") if bound(m)]), shuffled(granularities),
        shuffled([m for m in kinds("allocation") if bound(m)]), shuffled([m for m in kinds("schedule") if bound(m)]),
        shuffled(list(RECOVERIES)),
    )  # fmt: skip
    found = []
    for number, (c, g, a, s, r) in zip(range(count), zip(*parts, strict=False), strict=False):
        recipe = pr.Recipe(c.function, granularity_of(g), a.function, seed=number)
        found.append(Draw(number, c, g, a, s, r, recipe))
    return found


REASONS = (
    "scores units", "scores channels and heads", "there are no", "does not fit", "a mask needs one score",
    "per unit and per weight together", "cannot be met", "would remove nothing", "non-negative", "needs `",
    "which masks cannot do", "no tokens to remove", "says nothing",
)  # fmt: skip
"""Why a combination may make no sense; anything else that is raised fails the law."""


def decides(recipe: pr.Recipe) -> bool:
    """Whether the granularity itself says how much goes."""
    try:
        checked_target(recipe.granularities, None)
    except RequestError:
        return False
    return True


def run(draw: Draw) -> nn.Module:
    """Plan at the first step that the schedule asks for, and at the end; apply or cut; recover."""
    dense = tiny()
    model = copy.deepcopy(dense)
    fixed = decides(draw.recipe)
    # the stem has 27 columns, which no pattern of 4 divides
    skip = ["stem"] if isinstance(draw.recipe.granularities[0], get_args(Masking)) else []
    final = 0.5
    for progress in (0.5, 1.0):
        amount = final * draw.schedule.function(progress)
        if amount <= 0 and not fixed:
            continue
        target = None if fixed else pr.Sparsity(min(amount, final))
        plan = pr.plan(dense, torch.zeros(IMAGE), draw.recipe, target=target, data=DATA, loss=square_loss, skip=skip)
    again = pr.plan(dense, torch.zeros(IMAGE), draw.recipe, target=target, data=DATA, loss=square_loss, skip=skip)
    assert all(mask.equal(again.masks[name]) for name, mask in plan.masks.items())
    assert all(keep.equal(again.keep[name]) for name, keep in plan.keep.items())
    small = pr.shrink(model, plan) if plan.changes else pr.apply_(model, plan)
    masks = pr.masks_of(copy.deepcopy(small))
    RECOVERIES[draw.recovery](small, dense, plan)
    for name, mask in masks.items():
        assert not small.get_parameter(name)[~mask].any(), f"{name} was revived"
    assert plan.after.params < plan.before.params and small(torch.zeros(IMAGE)).isfinite().all()
    return small


@pytest.mark.parametrize("draw", draws(), ids=str)
def test_a_combination_runs_or_is_refused_by_a_sentence(draw: Draw) -> None:
    before = tiny().state_dict()
    try:
        run(draw)
    except pr.PruningError as error:
        assert error.what and (error.why or error.todo), error
        said = f"{error.what} {error.why}"
        assert any(reason in said for reason in REASONS), f"a reason that is not known: {said}"
    assert all(value.equal(before[name]) for name, value in tiny().state_dict().items())


def test_every_part_is_drawn_and_most_combinations_run() -> None:
    found = draws()
    for kind, drawn in (
        ("criterion", {d.criterion.name for d in found}),
        ("granularity", {d.granularity.name for d in found}),
        ("allocation", {d.allocation.name for d in found}),
        ("schedule", {d.schedule.name for d in found}),
    ):
        assert len(drawn) == min(DRAWS, len([m for m in kinds(kind) if kind == "granularity" or bound(m)]))  # type: ignore[arg-type]
    assert {d.recovery for d in found} == set(RECOVERIES)
    assert [str(d) for d in found] == [str(d) for d in draws()]
    sensible = [d for d in found if isinstance(d.recipe.granularities[0], get_args(Structural))]
    assert sensible and len(sensible) < len(found)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (lambda: pr.Recipe(pr.criteria.bn_scale, pr.Element()), "scores units, not single weights"),
        (lambda: pr.Recipe(pr.magnitude, (pr.Channel(), pr.Element())), ""),
        (lambda: pr.Recipe(pr.magnitude, pr.Head()), "there are no"),
        (lambda: pr.Recipe(pr.magnitude, pr.NM(2, 4)), ""),
    ],
)
def test_what_makes_no_sense_says_so(recipe: Callable[[], pr.Recipe], said: str) -> None:
    with pytest.raises(pr.PruningError) as caught:
        pr.plan(tiny(), torch.zeros(IMAGE), recipe(), target=pr.Sparsity(0.3))
    assert said in str(caught.value) and caught.value.why


def test_a_target_is_needed_where_the_granularity_does_not_fix_one() -> None:
    with pytest.raises(RequestError):
        pr.plan(tiny(), torch.zeros(IMAGE), pr.Recipe())
