"""Gate gradients against real gates, and gradient statistics against autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from prunella.graph.data import Group
from prunella.graph.solve.groups import couple
from prunella.model.state import untouched
from prunella.stats import Source, Subject, collect
from prunella.stats.gradient import gate_gradient
from tests.graphs import Attention, convnet, hand_graph, images, mlp, square_loss


def gates(model: nn.Module, subject: Subject, data: list[Tensor]) -> Tensor:
    """`gate_grad` of the only group of `subject`."""
    with untouched(model, 0):
        statistics = collect(subject, ["gate_grad"], Source(data, square_loss))
    found = statistics.get("gate_grad", subject.groups[0].name)
    assert found is not None
    return found


def explicit(run: Callable[[Tensor], Tensor], units: int) -> Tensor:
    """Gradient of a loss to a gate of ones that the function multiplies in."""
    gate = torch.ones(units, dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad(run(gate), gate)[0]


def test_gate_gradient_of_a_neuron_is_that_of_a_gate_on_its_activation() -> None:
    model = mlp().double()
    data = [torch.randn(7, 4, dtype=torch.float64) for _ in range(3)]
    graph = hand_graph()
    found = gates(model, Subject(model, graph, groups=graph.groups[:1]), data)
    for row, x in zip(found, data, strict=True):
        gated = explicit(lambda gate, x=x: (model[2:](torch.relu(model[0](x)) * gate) - 1).square().mean(), 6)
        assert torch.allclose(row, gated, rtol=1e-10, atol=1e-12)


def test_gate_gradient_through_batch_norm_is_that_of_a_gate_behind_it() -> None:
    model = convnet().double().eval()
    data = [x.double() for x in images()]
    graph = couple(model, data[0])
    found = gates(model, Subject(model, graph, groups=(graph.group("0"),)), data)
    for row, x in zip(found, data, strict=True):
        gated = explicit(lambda gate, x=x: (model[3:](model[:3](x) * gate.view(-1, 1, 1)) - 1).square().mean(), 8)
        assert torch.allclose(row, gated, rtol=1e-10, atol=1e-12)


def test_gate_gradient_of_a_head_is_that_of_a_head_mask() -> None:
    torch.manual_seed(0)
    model = Attention().double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    graph = couple(model, x)
    (heads,) = [group for group in graph.groups if group.kind == "head"]
    found = gates(model, Subject(model, graph, groups=(heads,)), [x])

    def masked(gate: Tensor) -> Tensor:
        model.gate = gate
        return square_loss(model, x)

    assert torch.allclose(found[0], explicit(masked, 4), rtol=1e-10, atol=1e-12)


def test_every_place_that_reads_a_unit_counts() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x: Tensor, gate: Tensor | float = 1.0) -> Tensor:
            hidden = torch.tanh(self.first(x)) * gate
            return self.a(hidden) + self.b(hidden).square() + self.a(hidden.flip(0))

    torch.manual_seed(0)
    model, x = Twice().double(), torch.randn(5, 4, dtype=torch.float64)
    graph = couple(model, x)
    found = gates(model, Subject(model, graph, groups=graph.groups), [x])
    gated = explicit(lambda gate: (model(x, gate) - 1).square().mean(), 6)
    assert torch.allclose(found[0], gated, rtol=1e-10, atol=1e-12)


def test_without_readers_the_gate_is_on_the_producer_with_its_bias() -> None:
    model = mlp().double()
    x = torch.randn(7, 4, dtype=torch.float64)
    group = hand_graph().groups[0]
    alone = Group(group.name, group.size, group.kind, tuple(m for m in group.members if m.role != "in"))
    weights = dict(model.named_parameters())
    grads = dict(zip(weights, torch.autograd.grad(square_loss(model, x), list(weights.values())), strict=True))
    gated = explicit(lambda gate: (model[1:](model[0](x) * gate) - 1).square().mean(), 6)
    assert torch.allclose(gate_gradient(alone, weights, grads), gated, rtol=1e-10, atol=1e-12)


def test_mean_and_mean_square_of_gradients() -> None:
    model, graph = mlp(), hand_graph()
    data = [torch.randn(7, 4) for _ in range(4)]
    with untouched(model, 0):
        found = collect(Subject(model, graph, layers=graph.layers), ["grad", "grad_sq"], Source(data, square_loss))
    grads = torch.stack([torch.autograd.grad(square_loss(model, x), model[2].weight)[0] for x in data])
    assert found.batches == 4
    assert torch.allclose(found.values["grad"]["2.weight"], grads.mean(0), atol=1e-7)
    assert torch.allclose(found.values["grad_sq"]["2.weight"], grads.square().mean(0), atol=1e-7)
    assert not torch.allclose(grads.mean(0).square(), grads.square().mean(0), rtol=0.1, atol=0)


def test_gate_gradient_of_single_weights_is_gradient_times_weight_per_batch() -> None:
    model, graph = mlp(), hand_graph()
    data = [torch.randn(7, 4) for _ in range(2)]
    with untouched(model, 0):
        found = collect(Subject(model, graph, layers=graph.layers), ["gate_grad"], Source(data, square_loss))
    weight = model[2].weight
    rows = torch.stack([torch.autograd.grad(square_loss(model, x), weight)[0] * weight for x in data])
    assert torch.allclose(found.values["gate_grad"]["2.weight"], rows, atol=1e-7)


def test_parameters_without_gradient_take_part_and_stay_without() -> None:
    model, graph = mlp(), hand_graph()
    model.requires_grad_(False)
    with untouched(model, 0):
        found = collect(Subject(model, graph, layers=graph.layers), ["grad"], Source([torch.randn(7, 4)], square_loss))
    assert found.values["grad"]["0.weight"].abs().sum() > 0
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda m, b: m(b), "one number with a gradient"),
        (lambda m, b: m(b).detach().sum(), "does not depend on the parameters"),
        (lambda m, b: m(b).sum() * float("nan"), "the loss is nan on batch 0"),
    ],
)
def test_a_loss_that_is_no_loss_is_named(loss: Callable[[nn.Module, Tensor], Tensor], message: str) -> None:
    model, graph = mlp(), hand_graph()
    with untouched(model, 0), pytest.raises(ValueError, match=message):
        collect(Subject(model, graph, layers=graph.layers), ["grad"], Source([torch.randn(7, 4)], loss))
