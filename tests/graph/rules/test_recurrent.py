"""Hidden units of recurrent layers: cut exactly, counted, and the module comes back as itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from tests.graph.rules.recurrent_nets import BATCH, FEATURES, TIME, Recurrent, Spec, specs
from tests.oracle import Checked, check_exact, frozen_because, produced_by, settle
from torch import Tensor, nn

import prunella as pr
from prunella.graph.data import Graph
from prunella.graph.solve.groups import couple
from prunella.measure.count import measured_macs

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections")
X = torch.randn(BATCH, TIME, FEATURES, generator=torch.Generator().manual_seed(1))
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
FULL = Spec("LSTM", layers=2, both=True, projection=3)


def built(spec: Spec) -> Recurrent:
    torch.manual_seed(0)
    return Recurrent(spec)


def check(spec: Spec) -> Checked:
    """Exact, with as many multiply-adds as the plan says."""
    model = built(spec)
    checked = check_exact(model, X, count=False, modes=("all",))
    assert measured_macs(model, X) == checked.graph.macs() and not checked.graph.uncounted
    assert measured_macs(checked.small.float(), X) == checked.graph.macs(checked.keep)
    return checked


def test_generated_recurrent_networks_are_exact_and_nearly_all_hidden_units_can_go() -> None:
    seen: Counter[str] = Counter()

    @settings(max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(specs())
    def one(spec: Spec) -> None:
        checked = check(spec)
        seen["all"] += 1
        seen["hidden"] += produced_by(checked.graph, "layers.weight_ih_l0").size == spec.hidden
        seen["moved"] += checked.moved > 1e-9

    one()
    assert seen["hidden"] == seen["all"] >= 40 and seen["moved"] >= 0.9 * seen["all"], seen


# -- an oracle of its own: the weights of the smaller layer by hand -------------------------------------------------


def by_hand(layers: nn.Module, kept: Tensor, columns: Tensor | None = None, given: Tensor | None = None) -> nn.Module:
    """A new layer of the kept hidden units, entering features and projected outputs, with weights picked one by one."""
    options = {name: getattr(layers, name) for name in ("num_layers", "bias", "batch_first", "bidirectional")}
    given = kept if given is None else given
    small: nn.Module = type(layers)(
        layers.input_size if columns is None else len(columns),
        len(kept),
        **options,
        **({"proj_size": len(given)} if getattr(layers, "proj_size", 0) else {}),
    ).to(layers.weight_ih_l0.dtype)
    hidden, outputs = int(layers.hidden_size), int(layers.proj_size or layers.hidden_size)
    gates = layers.weight_hh_l0.shape[0] // hidden
    rows = torch.cat([kept + gate * hidden for gate in range(gates)])
    below = torch.cat([given + turn * outputs for turn in range(1 + layers.bidirectional)])
    for name, new in small.named_parameters():
        old = getattr(layers, name).detach()
        if "weight_hr" in name:
            values = old[given][:, kept]
        elif name.startswith("weight_hh"):
            values = old[rows][:, given]
        elif name.startswith("weight_ih"):
            entering = below if "_l0" not in name else columns
            values = old[rows] if entering is None else old[rows][:, entering]
        else:
            values = old[rows]
        new.data.copy_(values)
    return small


@pytest.mark.parametrize("kind", GATES)
@pytest.mark.parametrize("both", [False, True])
def test_the_smaller_layer_is_the_one_picked_by_hand(kind: str, both: bool) -> None:
    checked = check(Spec(kind, layers=2, both=both, back="every step"))
    kept = {name: mask.nonzero().flatten() for name, mask in checked.keep.items()}
    expected = by_hand(checked.dense.layers, kept["layers.weight_ih_l0"], kept["front"])
    found = checked.small.double().layers
    assert type(found) is type(expected) and repr(found) == repr(expected)
    assert found.state_dict().keys() == expected.state_dict().keys()
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    z = torch.randn(2, 4, len(kept["front"]), dtype=torch.float64)
    assert torch.equal(found(z)[0], expected(z)[0])


def test_projections_are_units_of_their_own() -> None:
    checked = check(FULL)
    hidden, given = checked.keep["layers.weight_ih_l0"], checked.keep["layers.weight_hr_l0"]
    assert (len(hidden), len(given)) == (8, 3)
    kept = [mask.nonzero().flatten() for mask in (hidden, checked.keep["front"], given)]
    expected = by_hand(checked.dense.layers, *kept)
    found = checked.small.double().layers
    assert found.proj_size == len(kept[2]) and found.hidden_size == len(kept[0])
    assert all(torch.equal(found.state_dict()[name], w) for name, w in expected.state_dict().items())


@pytest.mark.parametrize("kind", GATES)
def test_cells_keep_their_sizes_right(kind: str) -> None:
    small = check(Spec(kind, back="cells")).small
    cell = small.cell
    assert cell.weight_ih.shape == (GATES[kind] * cell.hidden_size, cell.input_size)
    assert cell.weight_hh.shape == (GATES[kind] * cell.hidden_size, cell.hidden_size) and cell.hidden_size < 9
    assert cell.input_size == small.layers.hidden_size


# -- states ---------------------------------------------------------------------------------------------------------


def test_an_encoder_and_its_decoder_share_their_hidden_units() -> None:
    graph = couple(built(Spec("LSTM", start="fed on")), X)
    assert produced_by(graph, "layers.weight_ih_l0") is produced_by(graph, "encoder.weight_ih_l0")


class Given(nn.Module):
    """A state from outside, and one of a size that is typed into the source."""

    def __init__(self, start: Callable[[Given, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.layers, self.head, self.start = nn.Linear(6, 7), nn.GRU(7, 8), nn.Linear(8, 2), start

    def forward(self, x: Tensor, state: Tensor) -> Any:
        return self.head(self.layers(self.first(x), self.start(self, state))[0])


STATES: dict[str, Callable[[Given, Tensor], Tensor]] = {
    "an input of the model": lambda model, state: state,
    "a typed size": lambda model, state: torch.zeros(1, 5, 8, dtype=state.dtype),
    "random numbers": lambda model, state: torch.rand(1, 5, model.layers.hidden_size, dtype=state.dtype),
}


@pytest.mark.parametrize("name", STATES)
def test_a_state_that_cannot_be_cut_keeps_the_hidden_units_and_nothing_else(name: str) -> None:
    model = settle(Given(STATES[name]))
    graph = couple(model, (torch.randn(3, 5, 6), torch.randn(1, 5, 8)))
    assert [group.name for group in graph.groups] == ["first"]
    for weight in ("layers.weight_ih_l0", "layers.weight_hh_l0"):
        assert frozen_because(graph, weight, 0, "a recurrent layer starts from a state that is not cut")


def test_a_single_hidden_unit_stays_with_its_reason() -> None:
    model = built(Spec("GRU", hidden=1, back="every step"))
    graph = couple(settle(model), X)
    assert frozen_because(graph, "layers.weight_hh_l0", 0, "a single unit")
    assert produced_by(graph, "front").size == 7


def test_time_is_not_cut_and_samples_may_be_channels() -> None:
    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.layers, self.head = nn.Conv1d(6, 7, 1), nn.GRU(1, 4, batch_first=True), nn.Linear(4, 1)
            self.last = nn.Conv1d(7, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x.transpose(1, 2))
            batch, channels, time = y.shape
            y = self.head(self.layers(y.reshape(batch * channels, time, 1))[0])
            return self.last(y.view(batch, channels, time))

    class Along(Apart):
        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x.transpose(1, 2))
            steps = y.permute(2, 1, 0)  # each channel is a step
            return self.last(self.head(self.layers(steps)[0]).permute(2, 1, 0))

    apart = check_exact(Apart(), X, count=False)
    assert {group.size for group in apart.graph.groups} == {7, 4}
    along = couple(settle(Along()), X[:1])
    assert frozen_because(along, "first.weight", 0, "a recurrent layer steps along it")


def test_arguments_that_the_rule_does_not_cover_freeze_all_and_are_not_counted() -> None:
    class Short(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.cell = nn.Linear(6, 7), nn.GRUCell(7, 8)

        def forward(self, x: Tensor) -> Tensor:
            state = torch.zeros(len(x), 8, dtype=x.dtype)
            cell = self.cell
            return torch.gru_cell(
                self.first(x[:, 0]), state, cell.weight_ih, cell.weight_hh, b_ih=cell.bias_ih, b_hh=cell.bias_hh
            )

    graph = couple(settle(Short()), X)
    assert not graph.groups and frozen_because(graph, "first.weight", 0, "no rule for these arguments")
    assert "gru_cell" in graph.uncounted


# -- laws -----------------------------------------------------------------------------------------------------------


def picture(graph: Graph) -> list[tuple[Any, ...]]:
    return sorted(
        (g.name, g.size, g.kind, *sorted((m.entity, m.axis, m.role, tuple(m.unit.tolist())) for m in g.members))
        for g in graph.groups
    )


@pytest.mark.parametrize("spec", [FULL, Spec("GRU", packed=True, back="states"), Spec("RNN", back="cells")])
def test_models_that_ran_before_or_train_or_are_wide_have_the_same_groups(spec: Spec) -> None:
    model = built(spec).eval()
    fresh = picture(couple(model, X))
    with torch.no_grad():
        model(X)
    assert picture(couple(model, X)) == fresh
    model.train()
    model(X).sum().backward()
    assert picture(couple(model, X)) == fresh
    assert picture(couple(model.double(), X.double())) == fresh
    with torch.inference_mode():
        assert picture(couple(model.float(), X)) == fresh


# -- from a plan to a file ------------------------------------------------------------------------------------------


def stacked() -> Recurrent:
    return built(Spec("LSTM", layers=2, both=True)).eval()


def test_a_plan_meets_its_target_trains_and_comes_back_from_a_file(tmp_path: Path) -> None:
    model = stacked()
    plan = pr.plan(model, X, target=pr.MACs(0.5))
    small = pr.shrink(model, plan)
    assert measured_macs(small, X) == plan.after.macs <= 0.5 * measured_macs(model, X)
    pr.save(small, tmp_path / "small", plan=plan, factory=stacked)
    back = pr.load(tmp_path / "small", factory=stacked)
    assert torch.equal(back(X), small(X))
    for layers in (small.layers, back.layers):
        weights = [getattr(layers, name) for name in layers._flat_weights_names]
        assert all(held is weight for held, weight in zip(layers._flat_weights, weights, strict=True))
    small.train()
    small(X).square().mean().backward()
    assert all(weight.grad is not None for weight in small.parameters())


def test_a_parametrized_layer_keeps_no_weight_of_the_dense_one() -> None:
    model = stacked()
    torch.nn.utils.parametrizations.weight_norm(model.layers, "weight_hh_l0")
    layers: Any = pr.shrink(model, pr.plan(model, X, target=pr.Params(0.6))).layers
    shapes = [tuple(getattr(layers, name).shape) for name in layers._flat_weights_names]
    assert [tuple(held.shape) for held in layers._flat_weights] == shapes


@pytest.mark.parametrize("side", ["makers", "readers"])
def test_zero_hidden_units_are_found(side: str) -> None:
    model, zero = stacked(), torch.tensor([2, 5])
    with torch.no_grad():
        for name, weight in model.layers.named_parameters():
            if side == "makers" and "weight_hr" not in name:
                weight.view(4, 8, -1)[:, zero] = 0
            elif side == "readers" and ("weight_hh" in name or "weight_ih_l1" in name):
                weight.view(32, -1, 8)[..., zero] = 0
        if side == "readers":
            model.head.weight.view(2, 2, 8)[..., zero] = 0
    plan = pr.train.plan_zeros(model, X)
    assert (~plan.keep["layers.weight_ih_l0"]).nonzero().flatten().tolist() == zero.tolist()
    assert torch.allclose(pr.shrink(model, plan)(X), model(X), atol=1e-6)


def test_masks_are_the_smaller_model() -> None:
    model = stacked()
    plan = pr.plan(model, X, target=pr.Params(0.6))
    small = pr.shrink(model, plan)
    assert torch.allclose(pr.apply_(model, plan)(X), small(X), atol=1e-5)


CRITERIA = ("magnitude", "wanda", "taylor", "activation_norm", "fluctuation", "fisher", "synflow")


@pytest.mark.parametrize("name", CRITERIA)
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_criteria_by_weights_activations_and_gradients_score_hidden_units(name: str, kind: str) -> None:
    model = built(Spec(kind, layers=2, both=True)).eval()
    recipe = pr.Recipe(criterion=getattr(pr.criteria, name))
    plan = pr.plan(model, X, recipe, target=pr.Params(0.7), data=[X], loss=lambda m, b: m(b).square().mean())
    assert {row.name for row in plan.rows} >= {"front", "layers.weight_ih_l0"}
    assert {entry.entity for entry in plan.frozen} <= {"head.weight", "head.bias"}


def test_the_fused_kernel_and_its_steps_give_the_same_statistics() -> None:
    model = stacked()
    recipe = pr.Recipe(criterion=pr.criteria.wanda, granularity=pr.Element())
    fused = pr.plan(model, X, recipe, target=pr.Sparsity(0.5), data=[X])
    steps = pr.plan(model.double(), X.double(), recipe, target=pr.Sparsity(0.5), data=[X.double()])
    same = sum(int((fused.masks[name] == steps.masks[name]).sum()) for name in fused.masks)
    assert "layers.weight_hh_l1_reverse" in fused.masks
    assert same >= 0.995 * sum(mask.numel() for mask in fused.masks.values())


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_a_program_of_a_recurrent_network_is_cut_too() -> None:
    program = pr.as_program(stacked(), X)
    plan = pr.plan(program, X, target=pr.Params(0.6))
    assert any(row.kept < row.total == 8 for row in plan.rows)
    assert pr.shrink(program, plan)(X).shape == stacked()(X).shape
