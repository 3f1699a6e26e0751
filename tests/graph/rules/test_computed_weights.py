"""Weights that the model computes from parameters: the parameters are cut, and the parametrization stays."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.oracle import check_exact, check_sizes, cut, distance, frozen_because, produced_by, random_keep, run, settle
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import prunella as pr
from prunella.graph.solve.groups import couple
from prunella.model.copying import copied

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
X = torch.randn(3, 6, 5, generator=torch.Generator().manual_seed(1))
Make = Callable[[nn.Module], nn.Module]


class Adapted(nn.Module):
    """`w + b @ a`."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(2, inputs)), nn.Parameter(torch.randn(outputs, 2))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + 0.5 * (self.b @ self.a).reshape(weight.shape)


class Unit(nn.Module):
    """Rows of length one, by a formula of one's own."""

    def forward(self, weight: Tensor) -> Tensor:
        return F.normalize(weight, dim=1)


class Bounded(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return torch.tanh(weight)


def by(parametrization: Callable[[nn.Module], nn.Module]) -> Make:
    def make(layer: nn.Module) -> nn.Module:
        parametrize.register_parametrization(layer, "weight", parametrization(layer))
        return layer

    return make


def rounded(layer: nn.Module) -> nn.Module:
    """Fake quantization of single rows, with ranges that are known."""
    fake = torch.ao.quantization.FakeQuantize(
        observer=torch.ao.quantization.MovingAveragePerChannelMinMaxObserver,
        quant_min=-128,
        quant_max=127,
        dtype=torch.qint8,
        qscheme=torch.per_channel_symmetric,
    )
    fake(layer.weight)
    fake.apply(torch.ao.quantization.disable_observer)
    parametrize.register_parametrization(layer, "weight", fake)
    return layer


MAKES: dict[str, Make] = {
    "plain": lambda layer: layer,
    "weight norm": parametrizations.weight_norm,
    "weight norm by hook": nn.utils.weight_norm,
    "weight norm of everything": lambda layer: parametrizations.weight_norm(layer, dim=None),
    "weight norm of columns": lambda layer: parametrizations.weight_norm(layer, dim=1),
    "spectral norm": parametrizations.spectral_norm,
    "spectral norm by hook": nn.utils.spectral_norm,
    "adapted": by(lambda layer: Adapted(*layer.weight.shape[:2])),
    "rows of length one": by(lambda layer: Unit()),
    "bounded": by(lambda layer: Bounded()),
}
"""Layers of kernel size 1 in another form."""


class Net(nn.Module):
    """Convolutions of kernel size 1, a residual sum, a batch norm and a recurrent layer between computed weights."""

    def __init__(self, names: tuple[str, ...], back: str = "mean") -> None:
        super().__init__()
        sizes = ((6, 8), (8, 8), (8, 7))
        self.first, self.inner, self.last = (
            MAKES[name](nn.Conv1d(*size, 1)) for name, size in zip(names, sizes, strict=True)
        )
        self.norm, self.back, self.head = nn.BatchNorm1d(8), back, nn.Linear(7, 2)
        if back == "recurrent":
            self.layers = nn.GRU(7, 7, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).relu()
        y = self.norm(y + self.inner(y)).relu()
        z = self.last(y).transpose(1, 2)
        z = self.layers(z)[0][:, -1] if self.back == "recurrent" else z.mean(1)
        return self.head(z)


def built(names: tuple[str, ...], back: str = "mean") -> nn.Module:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the hooks are deprecated
        return settle(Net(names, back))


def with_zeros(model: nn.Module, graph: Any, keep: dict[str, Tensor]) -> nn.Module:
    """The masked model by hand: removed units are zero in every parameter, but `v` of a weight norm along its norms.

    There a zero in `g` gives the zeros, since a norm of zeros cannot divide.
    """
    masked = copied(model)
    parameters = dict(masked.named_parameters())
    with torch.no_grad():
        for group in graph.groups:
            removed = (~keep[group.name]).numpy()
            for member in group.members:
                sibling = {"original1": "original0", "weight_v": "weight_g"}
                path, _, leaf = member.entity.rpartition(".")
                scale = parameters.get(f"{path}.{sibling.get(leaf, '')}")
                if scale is not None and scale.dim() > 1 and scale.shape[member.axis] > 1:
                    continue
                if member.entity in parameters:
                    index = torch.from_numpy(member.index[removed[member.unit]].copy())
                    parameters[member.entity].index_fill_(member.axis, index, 0)
    return masked


def check(names: tuple[str, ...], back: str = "mean") -> tuple[Any, float]:
    model = built(names, back)
    graph = couple(model, X)
    keep = random_keep(graph)
    dense = copied(model).double()
    small = cut_of(dense, graph, keep)
    masked, usual = run(with_zeros(dense, graph, keep), X.double()), run(dense, X.double())
    found = run(small, X.double())
    assert distance(found, masked) < 1e-9
    check_sizes(model, cut_of(model, graph, keep), graph, keep)
    return graph, distance(found, usual)


def cut_of(model: nn.Module, graph: Any, keep: dict[str, Tensor]) -> nn.Module:
    with torch.no_grad():  # a hook leaves a weight with a history, which deepcopy refuses
        run(model, X.to(next(model.parameters()).dtype))
        return cut(model, graph, keep)


def test_generated_networks_of_computed_weights_are_exact_and_all_their_units_can_go() -> None:
    seen: Counter[str] = Counter()

    @settings(max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(st.tuples(*[st.sampled_from(sorted(MAKES))] * 3), st.sampled_from(["mean", "recurrent"]))
    def one(names: tuple[str, ...], back: str) -> None:
        graph, moved = check(names, back)
        seen["all"] += 1
        seen["units"] += sum(group.size for group in graph.groups) == 8 + 7 + (7 if back == "recurrent" else 0)
        seen["moved"] += moved > 1e-9

    one()
    assert seen["units"] == seen["all"] >= 40 and seen["moved"] == seen["all"], seen


@pytest.mark.parametrize("name", sorted(MAKES))
def test_a_plan_is_shrunk_masked_trained_and_loaded_and_the_parametrization_stays(name: str, tmp_path: Path) -> None:
    model = built((name,) * 3)
    plan = pr.plan(model, X, target=pr.Params(0.6))
    small = pr.shrink(model, plan)
    if parametrize.is_parametrized(model.first):
        assert parametrize.is_parametrized(small.first) and parametrize.is_parametrized(small.last)
    assert small.first.out_channels == small.norm.num_features == small.last.in_channels < 8
    pr.save(small, tmp_path / "small", plan=plan, factory=lambda: built((name,) * 3))
    back = pr.load(tmp_path / "small", factory=lambda: built((name,) * 3))
    with torch.no_grad():
        assert torch.equal(back(X), small(X))
        expected = small(X)
        assert torch.allclose(pr.apply_(copied(model), plan)(X), expected, atol=1e-5)
    small.train()
    small(X).square().mean().backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in small.parameters())


def test_masks_of_a_weight_norm_stay_finite_in_training() -> None:
    model = built(("weight norm",) * 3)
    plan = pr.plan(model, X, target=pr.Params(0.6))
    pr.apply_(model, plan)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = pr.Pruner(model, optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        model.train()(X).square().mean().backward()
        optimizer.step()
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    model.eval()
    with torch.no_grad():
        assert torch.allclose(pr.shrink(model, plan)(X), model(X), atol=1e-5)
    del pruner


def test_a_mean_of_a_weight_keeps_what_it_is_taken_over() -> None:
    class Centered(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight - weight.mean(1, keepdim=True)

    model = settle(nn.Sequential(nn.Conv1d(6, 8, 1), nn.ReLU(), by(lambda layer: Centered())(nn.Conv1d(8, 4, 1))))
    graph = couple(model, X)
    assert {group.kind for group in graph.groups} == {"width"}  # on request, where the mean sees only what is kept
    assert frozen_because(graph, "0.weight", 0, "a mean is taken over it")


SHIFTED: dict[str, Callable[[Tensor], Tensor]] = {
    "a shift": lambda w: w + 1,
    "a shift by a tensor": lambda w: w + torch.ones((), dtype=w.dtype),
    "an exponential": lambda w: w.exp(),
    "ones of its shape": lambda w: w * 0 + torch.ones_like(w),
    "an inverse power": lambda w: (w.abs() + 1).pow(-1.0),
    "a constant by it": lambda w: 1 / (w + 2),
}


@pytest.mark.parametrize("name", SHIFTED)
def test_a_norm_of_numbers_that_are_not_zero_for_a_zero_weight_keeps_its_positions(name: str) -> None:
    class Shifted(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight / (1 + SHIFTED[name](weight).norm(dim=1, keepdim=True))

    model = settle(nn.Sequential(nn.Conv1d(6, 8, 1), nn.ReLU(), by(lambda layer: Shifted())(nn.Conv1d(8, 4, 1))))
    graph = couple(model, X)
    assert [(group.kind, "norm is taken over it" in group.why) for group in graph.groups] == [("width", True)]
    assert frozen_because(graph, "0.weight", 0, "norm")


# -- quantization ---------------------------------------------------------------------------------------------------


def aware(backend: str, *, observe: bool, ran: bool = True) -> nn.Module:
    """Prepared for quantization-aware training."""
    import torch.ao.quantization as quantization

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        model = nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1)
        )
        model.train().qconfig = quantization.get_default_qat_qconfig(backend)  # type: ignore[assignment]
        quantization.prepare_qat(model, inplace=True)
        if ran:
            model(IMAGE)
    if not observe:
        model.apply(quantization.disable_observer)
    return model.eval()


IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("backend", ["fbgemm", "qnnpack"])
@pytest.mark.parametrize("observe", [False, True])
def test_fake_quantization_follows_the_cut_by_row_and_by_tensor(backend: str, observe: bool) -> None:
    model = aware(backend, observe=observe)
    plan = pr.plan(model, IMAGE, target=pr.Params(0.6))
    small = pr.shrink(model, plan)
    kept = small[0].weight.shape[0]
    assert kept < 16 and small[3].weight.shape[1] == kept
    scale = small[0].weight_fake_quant.scale
    assert scale.shape == ((kept,) if backend == "fbgemm" else (1,))
    assert small[0].weight_fake_quant.activation_post_process.max_val.numel() == scale.numel()
    before = copy.deepcopy(small.state_dict())
    small.train()(IMAGE).square().mean().backward()
    assert all(p.grad is not None for p in small.parameters()) and before.keys() == small.state_dict().keys()


def test_ranges_without_a_size_are_named_and_the_model_is_left_as_it_was() -> None:
    model = aware("fbgemm", observe=True, ran=False)
    graph = couple(model, IMAGE)
    assert frozen_because(graph, "0.weight", 0, "not buffers of its size before the first run")
    assert model[0].weight_fake_quant.activation_post_process.min_val.numel() == 0


@pytest.mark.parametrize("make", [rounded])
def test_ranges_of_single_rows_are_cut_with_them(make: Make) -> None:
    model = settle(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)))
    make(model[0])
    graph = couple(model, torch.randn(3, 6))
    entities = {member.entity for member in produced_by(graph, "0.parametrizations.weight.original").members}
    assert {f"0.parametrizations.weight.0.{name}" for name in ("scale", "zero_point")} <= entities
    plan = pr.plan(model, torch.randn(3, 6), target=pr.Params(0.6))
    assert pr.shrink(model, plan)[0].out_features < 8


def test_a_recurrent_layer_under_weight_norm_is_cut(tmp_path: Path) -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.Linear(5, 6), nn.Linear(8, 2)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.layers = nn.utils.weight_norm(nn.LSTM(6, 8, batch_first=True), "weight_hh_l0")

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.layers(self.first(x))[0])
            return out

    model = Steps().eval()
    plan = pr.plan(model, X, target=pr.Params(0.6))
    small = pr.shrink(model, plan)
    assert small.layers.weight_hh_l0_v.shape == (4 * small.layers.hidden_size, small.layers.hidden_size)
    assert small.layers.hidden_size < 8
    with torch.no_grad():
        assert torch.allclose(small(X), pr.apply_(model, plan)(X), atol=1e-5)


def test_the_oracle_of_all_models_agrees() -> None:
    """Without a weight norm, whose zeros are not those of every parameter, the main oracle holds too."""
    for name in ("spectral norm", "adapted", "bounded"):
        check_exact(built((name,) * 3), X, count=False, modes=("all",))
