"""Objects of attrs and pydantic as outputs, inputs and configurations; generators inside of other objects."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import prunella as pr

X = torch.linspace(-1, 1, 24).reshape(4, 6).sin()
RECIPE = pr.Recipe(pr.criteria.magnitude, pr.Channel(), pr.uniform)


class Returns(nn.Module):
    """`form` makes the output of the result and of the units of `a`."""

    def __init__(self, form: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.form = [form]
        self.a, self.b, self.free, self.c = (nn.Linear(*sizes) for sizes in ((6, 8), (8, 3), (6, 8), (8, 3)))

    def forward(self, x: Tensor) -> Any:
        y = self.a(x).relu()
        return self.form[0](self.b(y) + self.c(self.free(x).relu()), y)


def _kept(form: Callable[[Tensor, Tensor], Any]) -> None:
    model = Returns(form).eval()
    plan = pr.plan(model, X, RECIPE, target=pr.Params(0.9))
    pr.shrink(model, plan)
    assert set(plan.keep) == {"free"}, "units in an output keep their size"


class Pair(NamedTuple):
    first: Any
    second: Any


class Box:
    def __init__(self, value: Any) -> None:
        self.value = value


FORMS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "a named tuple in an object": lambda r, y: Box(Pair(r, Box([y]))),
    "a generator": lambda r, y: (t for t in (r, y)),
    "a generator in a named tuple": lambda r, y: Pair(r, (t for t in (y,))),
    "a generator in an object": lambda r, y: Box({"all": (t for t in (r, y))}),
    "zip": lambda r, y: zip([r], [y], strict=True),
    "a chain of dictionaries": lambda r, y: ChainMap({"r": r}, {"y": y}),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_units_in_any_output_keep_their_size(form: Callable[[Tensor, Tensor], Any]) -> None:
    _kept(form)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("slots", [False, True])
def test_classes_of_attrs(frozen: bool, slots: bool) -> None:
    attrs = pytest.importorskip("attrs")
    made = attrs.make_class("Made", {"r": attrs.field(), "y": attrs.field(repr=False)}, frozen=frozen, slots=slots)
    _kept(lambda r, y: made(r, y))
    _kept(lambda r, y: [made(r, made(1, {"y": y}))])
    _configured(attrs.make_class("Config", {"size": attrs.field(default=8)}, frozen=frozen, slots=slots)(), X)
    _takes(made(X, None))


@pytest.mark.parametrize("frozen", [False, True])
def test_models_of_pydantic(frozen: bool) -> None:
    pydantic = pytest.importorskip("pydantic")
    options = pydantic.ConfigDict(arbitrary_types_allowed=True, frozen=frozen, extra="allow")
    made = pydantic.create_model("Made", __config__=options, r=(Any, ...), y=(Any, None))
    _kept(lambda r, y: made(r=r, y=y))
    _kept(lambda r, y: made(r=r, further=made(r=y)))
    _configured(pydantic.create_model("Config", __config__=options, size=(int, 8))(), X)
    _takes(made(r=X))


def _configured(config: Any, x: Tensor) -> None:
    """A size in a configuration follows the cut; the configuration of the dense model stays."""

    class Configured(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config, self.a, self.b = config, nn.Linear(6, config.size), nn.Linear(config.size, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).view(-1, self.config.size))  # type: ignore[no-any-return]

    model = Configured().eval()
    small = pr.shrink(model, pr.plan(model, x, RECIPE, target=pr.Params(0.7)))
    assert small.config.size == small.a.out_features < 8 and model.config.size == 8


def _takes(batch: Any) -> None:
    """The object is an input, of which the model reads `r`."""

    class Takes(Returns):
        def forward(self, given: Any) -> Any:
            return super().forward(given.r)

    model = Takes(lambda r, y: r).eval()
    small = pr.shrink(model, pr.plan(model, (batch,), RECIPE, target=pr.Params(0.8)))
    assert small.a.out_features < 8  # type: ignore[union-attr, operator]
