"""A plan of what is zero already removes exactly that."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import prunella as pr
from prunella.errors import NotSupported, RequestError
from prunella.planning.zeros import _kept, _unchanged
from tests.graphs import Attention, hand_graph, mlp

X = torch.linspace(-1, 1, 8 * 4).view(8, 4)


def test_units_that_nothing_reads_go_and_others_stay() -> None:
    model = mlp()
    with torch.no_grad():
        model[2].weight[:, [1, 4]] = 0
        model[0].weight[2] = 0  # still a constant: its bias is read, and goes into the next one
    plan = pr.planning.plan_zeros(model, X)
    assert {row.name: row.kept for row in plan.rows} == {"0": 3, "2": 5} and set(plan.weights) == {"2.bias"}
    assert plan.got == pytest.approx(3 / 11) and plan.target is None
    small = pr.shrink(model, plan)
    assert torch.allclose(small(X), model(X), atol=1e-6) and small[0].out_features == 3
    assert "by hand" in str(plan)


def test_a_group_that_is_all_zero_keeps_one() -> None:
    model = mlp()
    with torch.no_grad():
        model[2].weight.zero_()
    plan = pr.planning.plan_zeros(model, X)
    assert plan.keep["0"].tolist() == [True] + [False] * 5
    assert torch.allclose(pr.shrink(model, plan)(X), model(X), atol=1e-6)


def test_where_no_weight_reads_a_unit_all_of_it_has_to_be_zero() -> None:
    model, graph = mlp(), hand_graph()
    group = replace(graph.groups[0], members=graph.groups[0].members[:2])
    with torch.no_grad():
        model[0].weight[[3, 4]] = 0
        model[0].bias[3] = 0
    assert _kept(model, graph, group).tolist() == [True, True, True, False, True, True]
    assert _kept(model, graph, replace(group, multiple=4)).tolist() == [True] * 6
    assert _kept(model, graph, replace(group, min_units=6)).tolist() == [True] * 6


class Grown(nn.Module):
    """Its output says how many channels there are."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x)) * self.a.weight.shape[0]


def test_a_cut_that_changes_the_output_is_not_made() -> None:
    model = Grown()
    with torch.no_grad():
        model.b.weight[:, 2] = 0
    with pytest.raises(NotSupported, match="no unit is exactly zero"):
        pr.planning.plan_zeros(model, X)


def test_a_cut_is_compared_with_the_model_as_it_is() -> None:
    model, keep = mlp(), {"0": torch.arange(6) != 2}
    assert not _unchanged(model, hand_graph(), keep, X)
    with torch.no_grad():
        model[2].weight[:, 2] = 0
    assert _unchanged(model, hand_graph(), keep, X)


def test_heads() -> None:
    torch.manual_seed(0)
    model, batch = Attention(), torch.randn(2, 5, 8)
    with torch.no_grad():
        model.out.weight[:, 3:6] = 0
    plan = pr.planning.plan_zeros(model, batch, granularity=pr.Head())
    assert plan.rows[0].kept == 3
    assert torch.allclose(pr.shrink(model, plan)(batch), model(batch), atol=1e-6)


def test_masks_of_single_weights() -> None:
    model = mlp()
    with torch.no_grad():
        model[0].weight[0, 1] = model[4].weight[2] = 0
    plan = pr.planning.plan_zeros(model, X, granularity=pr.Element())
    assert [int((~plan.masks[f"{n}.weight"]).sum()) for n in "024"] == [1, 0, 5]
    assert pr.planning.plan_zeros(model, X, granularity=pr.Element(), skip=["4"]).got == pytest.approx(1 / 54)
    pr.finalize(pr.apply_(model, plan))


def test_nothing_is_zero() -> None:
    for unit in (pr.Element(), pr.Channel()):
        with pytest.raises(NotSupported, match="is exactly zero"):
            pr.planning.plan_zeros(mlp(), X, granularity=unit)
    with pytest.raises(RequestError, match="Element"):
        pr.planning.plan_zeros(mlp(), X, granularity=pr.Width())  # type: ignore[arg-type]


IMAGE = torch.linspace(-1, 1, 2 * 3 * 6 * 6).view(2, 3, 6, 6)


def convolutions(activation: nn.Module, *, norm: bool = True) -> nn.Sequential:
    """Convolution, norm, activation, convolution with padding."""
    torch.manual_seed(0)
    norms = [nn.BatchNorm2d(8)] if norm else []
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *norms, activation, nn.Conv2d(8, 4, 3, padding=1))
    for part in model:
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.uniform_(part.bias, 0.1, 0.5)
            part.running_mean.uniform_(-0.2, 0.2)  # type: ignore[union-attr]
    return model.eval()


def zeroed(model: nn.Module, *names: str, units: slice = slice(3)) -> nn.Module:
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name in names:
            named[name][units] = 0
    return model


def small_of(model: nn.Module) -> nn.Module:
    return pr.shrink(model, pr.planning.plan_zeros(model, IMAGE))


@pytest.mark.parametrize(
    ("activation", "names"),
    [
        (nn.ReLU(), ("0.weight", "0.bias", "1.weight", "1.bias")),
        (nn.GELU(), ("0.weight", "0.bias", "1.weight", "1.bias")),
        (nn.Tanh(), ("1.weight", "1.bias")),  # whatever the filter is, as network slimming leaves it
        (nn.MaxPool2d(2), ("0.weight", "1.weight", "1.bias")),
    ],
)
def test_a_filter_that_is_zero_behind_its_norm_goes(activation: nn.Module, names: tuple[str, ...]) -> None:
    model = zeroed(convolutions(activation), *names)
    small = small_of(model)
    assert small[0].out_channels == 5  # type: ignore[index]
    for x in (IMAGE, torch.randn(3, 3, 8, 8) * 9):
        assert torch.allclose(small(x), model(x), atol=1e-5)


def test_a_filter_without_a_norm_goes_where_its_bias_is_zero_too() -> None:
    model = zeroed(convolutions(nn.ReLU(), norm=False), "0.weight", "0.bias")
    assert small_of(model)[0].out_channels == 5  # type: ignore[index]


def test_a_constant_below_zero_is_dead_behind_a_relu() -> None:
    model = zeroed(convolutions(nn.ReLU()), "0.weight", "0.bias")
    with torch.no_grad():
        model[1].bias[:3] = -9  # type: ignore[index]
    small = small_of(model)
    assert small[0].out_channels == 5 and torch.allclose(small(IMAGE), model(IMAGE), atol=1e-5)  # type: ignore[index]


@pytest.mark.parametrize(
    ("activation", "names"),
    [
        (nn.Sigmoid(), ("0.weight", "0.bias", "1.weight", "1.bias")),  # read as a half
        (nn.ReLU(), ("0.weight", "0.bias", "1.weight")),  # read as the shift of its norm
        (nn.ReLU(), ("0.weight",)),
    ],
)
def test_a_constant_that_is_not_zero_stays_and_is_named(activation: nn.Module, names: tuple[str, ...]) -> None:
    model = zeroed(convolutions(activation), *names)
    with pytest.raises(NotSupported, match="no unit is exactly zero") as caught:
        pr.planning.plan_zeros(model, IMAGE)
    assert "3 are constant" in caught.value.why and "fold_means" in caught.value.why


def test_a_unit_that_is_silent_on_the_example_alone_stays() -> None:
    model = convolutions(nn.ReLU())
    with torch.no_grad():
        model[1].bias[:3] = -50  # type: ignore[index]
    with pytest.raises(NotSupported, match="no unit is exactly zero"):
        pr.planning.plan_zeros(model, IMAGE)


class Stream(nn.Module):
    """Two convolutions into one stream, of which only one has a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(3, 8, 1)
        self.out = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.norm(self.a(x)) + self.b(x) - 90))


def test_a_norm_of_another_branch_makes_no_unit_constant() -> None:
    model = zeroed(Stream().eval(), "norm.weight", "norm.bias")
    with pytest.raises(NotSupported, match="no unit is exactly zero"):  # silent on the example, through b alone
        pr.planning.plan_zeros(model, IMAGE)
    assert model(IMAGE * 900).ne(model(IMAGE * 0)).any()


def test_zero_filters_of_a_checkpoint_make_a_smaller_model() -> None:
    pruned = zeroed(convolutions(nn.ReLU()), "0.weight", "0.bias", "1.weight", "1.bias")
    dense = convolutions(nn.ReLU())
    plan = pr.importers.import_plan(dense, IMAGE, pruned.state_dict(), units=True)
    small = pr.shrink(dense, plan)
    assert small[0].out_channels == 5 and torch.allclose(small(IMAGE), pruned(IMAGE), atol=1e-5)  # type: ignore[index]


def test_constant_units_that_stay_are_named() -> None:
    model = convolutions(nn.ReLU(), norm=False)
    with torch.no_grad():
        model[0].weight[:3] = 0
        model[0].bias[:3] = torch.tensor([0.5, -0.5, 1.0])
    plan = pr.train.plan_zeros(model, IMAGE)
    assert plan.keep["0"].tolist() == [True, False, *[True] * 6], "a constant that is read as 0 goes"
    remark = next(remark for remark in plan.remarks if "2 units of 0 have zero weights and are kept" in remark)
    assert "2.weight pads with zeros, so that fewer positions read the constant at the border" in remark


class Chain(nn.Module):
    """A convolution with a norm, read by `reader` and by a second layer."""

    def __init__(self, reader: nn.Module, second: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.reader = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), reader
        self.after, self.last = nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)
        self.second = second
        for norm in (self.norm, self.after):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, 0.1, 0.5)
            norm.running_mean.uniform_(-0.2, 0.2)  # type: ignore[union-attr]
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.a(x)).sigmoid()
        z = self.last(self.after(self.reader(y)).relu())
        return z if self.second is None else z.mean((2, 3)) + self.second(y.mean((2, 3)))  # type: ignore[no-any-return]


EXACT: dict[str, tuple[nn.Module, nn.Module | None, set[str]]] = {
    "a bias": (nn.Conv2d(8, 4, 3), None, {"reader.bias"}),
    "the mean of a norm": (nn.Conv2d(8, 4, 1, bias=False), None, {"after.running_mean"}),
    "a border of the image's own": (nn.Conv2d(8, 4, 3, padding=1, padding_mode="reflect"), None, {"reader.bias"}),
    "one position": (nn.Conv2d(8, 4, 1, padding="same"), None, {"reader.bias"}),
    "two readers": (nn.Conv2d(8, 4, 2), nn.Linear(8, 2), {"reader.bias", "second.bias"}),
}


@pytest.mark.parametrize("dead", [("a.weight", "a.bias"), ("norm.weight",)], ids=["filter", "scale"])
@pytest.mark.parametrize(("reader", "second", "places"), EXACT.values(), ids=EXACT)
def test_a_constant_goes_into_what_reads_it(
    reader: nn.Module, second: nn.Module | None, places: set[str], dead: tuple[str, ...]
) -> None:
    model = zeroed(Chain(reader, second), *dead)
    plan = pr.planning.plan_zeros(model, IMAGE)
    small = pr.shrink(model, plan)
    assert set(plan.weights) == places and small.a.out_channels == 5  # type: ignore[union-attr]
    for x in (IMAGE, torch.randn(3, 3, 9, 7) * 5):
        assert torch.allclose(small(x), model(x), atol=1e-5)
    masked = pr.apply_(copy.deepcopy(model), plan)
    assert torch.allclose(masked(IMAGE), model(IMAGE), atol=1e-5)


KEPT: dict[str, tuple[nn.Module, nn.Module | None, str]] = {
    "a padded border": (nn.Conv2d(8, 4, 3, padding=1), None, "pads with zeros"),
    "padding of one position": (nn.Conv2d(8, 4, 1, padding=1), None, "pads with zeros"),
    "no place": (nn.Conv2d(8, 4, 3), nn.Linear(8, 2, bias=False), "second has no bias, and no batch norm"),
    "transposed": (nn.ConvTranspose2d(8, 4, 3), None, "is read in a form"),
}


@pytest.mark.parametrize(("reader", "second", "reason"), KEPT.values(), ids=KEPT)
def test_a_constant_that_no_bias_makes_up_for_stays(reader: nn.Module, second: nn.Module | None, reason: str) -> None:
    model = zeroed(Chain(reader, second), "a.weight", "a.bias")
    with pytest.raises(NotSupported, match="no unit is exactly zero") as caught:
        pr.planning.plan_zeros(model, IMAGE)
    assert reason in caught.value.why


def test_a_group_of_constants_alone_keeps_one() -> None:
    model = zeroed(Chain(nn.Conv2d(8, 4, 3)), "norm.weight", units=slice(None))
    small = pr.shrink(model, pr.planning.plan_zeros(model, IMAGE))
    assert small.a.out_channels == 1 and torch.allclose(small(IMAGE), model(IMAGE), atol=1e-5)


def test_imported_constants_go_into_what_reads_them() -> None:
    pruned, dense = zeroed(Chain(nn.Conv2d(8, 4, 3)), "a.weight", "a.bias"), Chain(nn.Conv2d(8, 4, 3))
    plan = pr.importers.import_plan(dense, IMAGE, pruned.state_dict(), units=True)
    small = pr.shrink(dense, plan)
    assert small.a.out_channels == 5 and torch.allclose(small(IMAGE), pruned(IMAGE), atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_model_of_quantized_layers_has_no_units_to_remove() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    with pytest.raises(pr.PruningError, match="only their own library reads them"):
        pr.train.plan_zeros(quantized, torch.randn(2, 6))
