"""A pass that is replayed gives what the full pass gives, and runs the later calls alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunella.model.trees import tensors
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


class Odd(InPlace):
    """Results of several tensors, numbers read of tensors, early outputs, a buffer that is counted up."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        h = self.a(x)
        first, second = h.chunk(2, -1)
        top = h.max(-1)
        self.count += 1
        h = torch.cat([second, first], -1) * (2 if h.sum().item() > 0 else 3)
        h[top.values > 0, 0] += 1.0
        both = torch.broadcast_tensors(h, self.c.weight[0, :1])
        h = self.b(both[0].T.contiguous().T) + top.indices[:, None]
        return {"early": first, "last": [self.c(h.view(len(x), -1)), h.shape]}


class ByNumpy(InPlace):
    """What leaves torch is not replayed."""

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(torch.from_numpy(2 * self.a(x).numpy())))


class Keeping(InPlace):
    """What a module keeps of one pass is not what the next one computes."""

    kept: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.a(x)
        return self.c(self.b(self.kept).tanh())


def _twice(x: Tensor) -> Callable[[nn.Module], Tensor]:
    return lambda model: model(x) + model(-x)


RUNS: dict[str, tuple[type[InPlace], Callable[[nn.Module], Any]]] = {
    "once": (InPlace, lambda model: model(torch.ones(2, 4))),
    "twice": (InPlace, _twice(torch.randn(3, 4))),
    "odd": (Odd, lambda model: model(torch.linspace(-1, 1, 12).view(3, 4))),
    "numpy": (ByNumpy, lambda model: model(torch.ones(2, 4))),
    "keeping": (Keeping, lambda model: model(torch.ones(2, 4))),
}


def _equal(first: Any, second: Any) -> bool:
    pairs = list(zip(tensors(first), tensors(second), strict=True))
    return bool(pairs) and all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", ["a", "b", "c"])
@pytest.mark.parametrize("kind", RUNS)
def test_the_output_is_that_of_a_full_pass(name: str, kind: str) -> None:
    torch.manual_seed(0)
    build, run = RUNS[kind]
    model = build().eval()
    with torch.no_grad():
        recording = Recording.of(lambda: run(model))
        assert _equal(recording.output, run(model))
        weights = [model.a.weight, model.b.weight, model.c.weight]
        recording.keep(recording.first([weight]) for weight in weights)
        assert kind == "numpy" or len(recording.states) > 1, recording.whole
        weight = getattr(model, name).weight
        for _ in range(2):  # the first replay changes nothing that the second one needs
            weight.mul_(1.5)
            assert _equal(recording.again([weight]), run(model))
            assert _equal(recording.again([weight]), run(model))


def test_a_buffer_is_counted_up_in_a_replay_too() -> None:
    model = Odd().eval()
    with torch.no_grad():
        recording = Recording.of(lambda: model(torch.ones(3, 4)))
        recording.keep([recording.first([model.c.weight])])
        before = model.count.clone()
        recording.again([model.c.weight])
    assert not recording.whole and float(model.count - before) == 1


def _deep(depth: int = 6) -> nn.Sequential:
    return nn.Sequential(*[layer for _ in range(depth) for layer in (nn.Linear(4, 4), nn.Tanh())]).eval()


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each linear layer that runs."""
    calls, linear = list[int](), nn.functional.linear

    def counted(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        calls.append(1)
        return linear(x, weight, bias)

    monkeypatch.setattr(nn.functional, "linear", counted)
    return calls


@pytest.mark.parametrize("most", [0, 200, 10**9])
def test_calls_before_the_change_are_not_run(most: int) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    x = torch.randn(9, 4)
    with torch.no_grad():
        recording = Recording.of(lambda: model(x), most)
        first = model[0].weight
        recording.keep([recording.first([model[4].weight])])
        assert recording.size <= most
        model[4].weight.mul_(2)
        assert torch.equal(recording.again([model[4].weight]), model(x))
        assert (not recording.states) == (most == 0)
        first.mul_(2)  # a change that is not told is not seen: the first layer is not run
        assert torch.equal(recording.again([model[4].weight]), model(x)) == (most == 0)


@pytest.mark.parametrize("states", [1, 2, 100])
def test_with_room_for_few_states_a_search_still_runs_the_rest_alone(states: int) -> None:
    """Each time the memory is full, one pass from the last state goes on to the next ones."""
    model, x = _deep(), torch.randn(9, 4)
    weights = [layer.weight for layer in model if isinstance(layer, nn.Linear)]
    with torch.no_grad():
        recording = Recording.of(lambda: model(x), most=states * x.nbytes)
        places = [recording.first([weight]) for weight in weights]
        for number, weight in enumerate(weights):
            recording.keep(places[number:])
            assert recording.size <= recording.most
            assert max(k for k in recording.states if k <= places[number]) == places[number]
            before = weight.clone()
            weight.mul_(3)
            assert torch.equal(recording.again([weight]), model(x))
            weight.copy_(before)
            assert torch.equal(recording.again([weight]), recording.output)


def test_a_state_is_what_later_calls_read_and_no_more() -> None:
    model, x = _deep(), torch.randn(9, 4)
    with torch.no_grad():
        recording = Recording.of(lambda: model(x))
        recording.keep([recording.first([model[6].weight])])
    assert recording.size == x.nbytes


def test_what_reads_tensors_unseen_runs_whole() -> None:
    class Unseen(InPlace):
        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            with torch._C.DisableTorchFunction():
                h = self.b(h)
            return self.c(h)  # type: ignore[no-any-return]

    model, x = Unseen().eval(), torch.randn(3, 4)
    with torch.no_grad():
        recording = Recording.of(lambda: model(x))
        recording.keep([recording.first([model.c.weight])])
        model.c.weight.mul_(2)
        assert torch.equal(recording.again([model.c.weight]), model(x))
        model.b.weight.mul_(2)
        assert torch.equal(recording.again([model.b.weight]), model(x))


def test_another_way_through_the_source_runs_whole() -> None:
    model, way = _deep(2), [0]

    def run() -> Any:
        x = torch.ones(2, 4)
        return model(x.tanh() if way[0] else x)

    with torch.no_grad():
        recording = Recording.of(run)
        recording.keep([recording.first([model[2].weight])])
        way[0] = 1
        assert torch.equal(recording.again([model[2].weight]), run())
