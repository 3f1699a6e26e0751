"""What a model refuses by a `raise` or an `assert` of its own is told in its words; advice on shapes would be false."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunella as pr
from prunella.errors import BadInput, PruningError
from prunella.model.user_code import advice_on, own_check, told

KINDS: list[type[Exception]] = [ValueError, KeyError, AssertionError, RuntimeError, TypeError, IndexError]
X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Refuses in one mode. kind: None for an operation that fails on this shape."""

    def __init__(self, kind: type[Exception] | None, *, training: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)
        self.kind, self.refuses_in = kind, training

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        if self.training == self.refuses_in:
            if self.kind is None:
                h = h.view(3, -1)
            else:
                raise self.kind("labels must be given")
        return self.b(h)  # type: ignore[no-any-return]


def square(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().sum()  # type: ignore[no-any-return]


USES: dict[str, tuple[bool, Callable[[nn.Module], Any]]] = {
    "plan": (False, lambda net: pr.plan(net.eval(), X, target=pr.MACs(0.5))),
    "finetune": (True, lambda net: pr.finetune(net, [X], square, steps=1, lr=0.1)),
    "distill": (True, lambda net: pr.distill(net, nn.Linear(8, 4), [X], steps=1, lr=0.1)),
    "sparse": (False, lambda net: pr.sparse(net.eval(), X)),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_words_and_the_line_of_the_model_are_told(use: str, kind: type[Exception]) -> None:
    training, run = USES[use]
    with pytest.raises(PruningError) as caught:
        run(Net(kind, training=training))
    error = caught.value
    assert kind.__name__ in error.why and "labels must be given" in error.why and "in forward" in error.why
    assert "the model's own code refuses" in error.todo and "shape" not in error.todo and error.exit_code in (2, 3)


@pytest.mark.parametrize("use", ["plan", "finetune"])
def test_an_operation_that_fails_gets_advice_on_shapes_and_its_line(use: str) -> None:
    training, run = USES[use]
    with pytest.raises(BadInput, match="is invalid for input of size") as caught:
        run(Net(None, training=training))
    assert "shape" in caught.value.todo and "h.view(3, -1)" in caught.value.why


def raised(run: Callable[[], Any]) -> Exception:
    with pytest.raises(Exception) as caught:
        run()
    assert isinstance(caught.value, Exception)
    return caught.value


def test_whose_check_it_is() -> None:
    net = nn.Linear(8, 4)

    def asserts() -> None:
        assert net.bias is None, "no bias"

    def again() -> None:
        try:
            raise KeyError("x")
        except KeyError as error:
            raise ValueError("twice") from error

    for mine, name in ((asserts, "asserts"), (again, "again")):
        error = raised(mine)
        place = own_check(error)
        assert place is not None and place.function == name and f"in {name}" in told(error)
    for other in (
        lambda: net(torch.randn(2, 7)),  # an operation
        lambda: nn.BatchNorm2d(3)(X),  # a raise inside torch
        lambda: {}["x"],
        lambda: pr.plan(net, X, target=pr.MACs(0.5), skip=["nothing"]),  # prunella's own
    ):
        error = raised(other)
        assert own_check(error) is None and advice_on(error, "look at the shapes") == "look at the shapes"
