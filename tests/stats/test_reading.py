"""Activations where they are read, against the activations themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import relu

from prunella.graph.data import Graph
from prunella.graph.solve.groups import couple
from prunella.model.state import untouched
from prunella.stats import Source, Subject, collect
from tests.graphs import Attention, blocks, convnet, images, mlp


def found(model: nn.Module, name: str, data: list[Tensor], graph: Graph | None = None) -> dict[str, Tensor]:
    """One statistic by group."""
    graph = graph or couple(model, data[0])
    with untouched(model, 0):
        return dict(collect(Subject(model, graph, groups=graph.groups), [name], Source(data)).values[name])


class Functional(nn.Module):
    """4 -> 6 -> 3 with `F.relu`, or any other function."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def hidden(self, x: Tensor) -> Tensor:
        return relu(self.a(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.hidden(x))


def test_zeros_are_counted_after_a_functional_relu_and_a_dead_unit_is_always_zero() -> None:
    model, x = Functional(), torch.randn(50, 4)
    with torch.no_grad():
        model.a.bias[2] = -100
    zeros = found(model, "unit_zeros", [x])["a"]
    assert zeros.tolist() == pytest.approx((model.hidden(x) == 0).double().mean(0).tolist())
    assert zeros[2] == 1 and 0 < zeros[0] < 1


def test_zeros_of_channels_are_counted_over_samples_and_pixels_without_the_padding() -> None:
    model, data = convnet().eval(), images()
    zeros = found(model, "unit_zeros", data)["0"]
    maps = torch.cat([model[:3](x) for x in data])
    assert torch.allclose(zeros, (maps == 0).double().mean((0, 2, 3)))


def test_a_flattened_channel_pools_all_of_its_positions() -> None:
    model, data = convnet().eval(), images()
    maps = torch.cat([model[:6](x) for x in data])
    assert torch.allclose(found(model, "unit_zeros", data)["3"], (maps == 0).double().mean((0, 2, 3)))
    variance = maps.double().var(0, correction=0).mean((1, 2))
    assert torch.allclose(found(model, "unit_var", data)["3"], variance, rtol=1e-9)


def test_norm_and_variance_of_a_channel_are_over_samples_and_pixels() -> None:
    model, data = convnet().eval(), images()
    maps = torch.cat([model[:3](x) for x in data]).double()
    assert torch.allclose(found(model, "unit_norm", data)["0"], maps.square().mean((0, 2, 3)).sqrt())
    flat = maps.transpose(0, 1).flatten(1)
    assert torch.allclose(found(model, "unit_var", data)["0"], flat.var(1, correction=0), rtol=1e-9)


def test_the_activation_of_a_head_is_what_the_output_projection_reads() -> None:
    torch.manual_seed(0)
    model, x = Attention(), torch.randn(2, 5, 8)
    seen: list[Tensor] = []
    handle = model.out.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    model(x)
    handle.remove()
    (name,) = [group.name for group in couple(model, x).groups if group.kind == "head"]
    heads = seen[0].unflatten(-1, (4, 3)).double()
    assert torch.allclose(found(model, "unit_norm", [x])[name], heads.square().mean((0, 1, 3)).sqrt())


def test_rank_is_the_mean_over_maps_as_the_convolution_reads_them() -> None:
    model, data = convnet().eval(), images()
    ranks = found(model, "unit_rank", data)
    maps = torch.cat([model[:3](x) for x in data])
    plain = torch.tensor([[int(torch.linalg.matrix_rank(m)) for m in sample] for sample in maps])
    assert torch.allclose(ranks["0"], plain.double().mean(0)) and "3" not in ranks


def test_a_map_of_rank_one_and_an_empty_map() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Conv2d(2, 1, 1)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, -1.0]).view(2, 1, 1, 1))
        model[0].bias.zero_()
    x = torch.outer(torch.arange(1.0, 6), torch.arange(1.0, 5)).expand(3, 1, 5, 4)
    assert found(model, "unit_rank", [x])["0"].tolist() == [1, 0]


@pytest.mark.parametrize("name", ["unit_zeros", "unit_norm", "unit_var", "unit_rank", "input_var"])
def test_batches_one_after_the_other_give_what_one_large_batch_gives(name: str) -> None:
    model, data = convnet().eval(), images()
    few, one = found(model, name, data), found(model, name, [torch.cat(data)])
    assert few.keys() == one.keys() and few
    assert all(torch.allclose(few[key], one[key], rtol=1e-6, atol=1e-12) for key in few)


def test_input_variance_has_the_shape_of_the_weight() -> None:
    model, x = mlp(), torch.randn(40, 4)
    graph = couple(model, x)
    subject = Subject(model, graph, layers=graph.layers)
    with untouched(model, 0):
        variance = collect(subject, ["input_var"], Source([x[:10], x[10:]])).values["input_var"]
    assert torch.allclose(variance["0.weight"], x.var(0, correction=0).expand(6, 4), rtol=1e-5)
    assert torch.allclose(variance["2.weight"], model[:2](x).var(0, correction=0).expand(5, 6), rtol=1e-5)


def test_input_variance_of_a_grouped_convolution_follows_its_groups() -> None:
    model, x = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2, padding=1)), torch.randn(3, 4, 5, 5)
    x = x * torch.tensor([1.0, 2, 3, 4]).view(4, 1, 1)
    graph = couple(model, x)
    with untouched(model, 0):
        values = collect(Subject(model, graph, layers=graph.layers), ["input_var"], Source([x])).values["input_var"]
    per_channel = x.transpose(0, 1).flatten(1).var(1, correction=0)
    variance = values["0.weight"]
    assert variance.shape == (6, 2, 3, 3)
    assert torch.allclose(variance[0, :, 1, 1], per_channel[:2], rtol=1e-4)
    assert torch.allclose(variance[5, :, 0, 2], per_channel[2:], rtol=1e-4)


def test_influence_of_residual_blocks() -> None:
    model, data = blocks((1.0, 0.0, 0.3)).eval(), images()
    graph = couple(model, data[0])
    subject = Subject(model, graph, groups=graph.stacks)
    with untouched(model, 0):
        score = collect(subject, ["influence"], Source(data)).values["influence"]["0"]
    x = torch.cat(data)
    expected = []
    for block in model[0]:
        y = block(x)
        cosine = torch.nn.functional.cosine_similarity(x.double(), y.double(), dim=1)
        expected.append(1 - float(cosine.detach().mean()))
        x = y
    assert score.tolist() == pytest.approx(expected, abs=1e-9)
    assert score[1] == 0 and score.argmin() == 1
