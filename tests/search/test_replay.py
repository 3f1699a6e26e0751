"""A pass that is replayed gives what the full pass gives, and runs the later calls alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from prunella.search.replay import Recording


class InPlace(nn.Module):
    """Calls that change their inputs in place, views, and a shortcut over all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.norm, self.relu = nn.LayerNorm(4), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.norm(self.a(x)))
        h[:, 0].mul_(2)
        skip = h
        h = self.b(h)
        h += skip
        skip.add_(1)
        return self.c(self.relu(h)) + skip.sum()


def _twice(x: Tensor) -> Callable[[nn.Module], Tensor]:
    return lambda model: model(x) + model(-x)


@pytest.mark.parametrize("name", ["a", "b", "c"])
@pytest.mark.parametrize("run", [lambda model: model(torch.ones(2, 4)), _twice(torch.randn(3, 4))])
def test_the_output_is_that_of_a_full_pass(name: str, run: Callable[[nn.Module], Tensor]) -> None:
    torch.manual_seed(0)
    model = InPlace().eval()
    with torch.no_grad():
        recording = Recording.of(lambda: run(model))
        assert torch.equal(recording.output, run(model))
        weight = getattr(model, name).weight
        for _ in range(2):  # the first replay changes nothing that the second one needs
            weight.mul_(1.5)
            assert torch.equal(recording.again([weight]), run(model))
            assert torch.equal(recording.again([weight]), run(model))


@pytest.mark.parametrize("most", [0, 200, 10**9])
def test_calls_before_the_change_are_not_run(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    x, ran = torch.randn(9, 4), list[int]()
    with torch.no_grad():
        recording = Recording.of(lambda: model(x), most)
        first, linear = model[0].weight, nn.functional.linear

        def counted(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            ran.append(1)
            return linear(x, weight, bias)

        assert recording.size <= most
        model[4].weight.mul_(2)
        assert torch.equal(recording.again([model[4].weight]), model(x))
        assert (recording.calls[0].result is None) == (most == 0)
        first.mul_(2)  # a change that is not told is not seen: the first layer is not run
        assert torch.equal(recording.again([model[4].weight]), model(x)) == (most == 0)
