"""plan(): budgets met within one step, nothing touched, every mistake named."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunella as pr
from prunella.errors import BadInput, NotSupported, PruningError, RequestError, TargetMissed
from prunella.graph.solve.groups import couple
from prunella.planning.planner import DEFAULT
from prunella.planning.recipes import named
from tests.graphs import IMAGE, Attention, convnet, hand_graph, images, mlp, square_loss

X = torch.zeros(IMAGE)


def masks(model: nn.Module, recipe: pr.Recipe, **more: Any) -> pr.Plan:
    return pr.plan(model, torch.zeros(2, 4), recipe, **more)


# -- structure -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [pr.Params(0.6), pr.MACs(0.4), pr.Bytes(0.5), pr.Sparsity(0.3), pr.MACs(15_000)])
@pytest.mark.parametrize("allocation", [pr.uniform, pr.global_, pr.allocation.lamp, pr.allocation.erk])
def test_targets_are_met_within_one_unit(target: Any, allocation: Any) -> None:
    model = convnet()
    plan = pr.plan(model, X, pr.Recipe(allocation=allocation), target=target)
    assert plan.got >= target.value if isinstance(target, pr.Sparsity) else plan.got <= target.value
    graph = couple(model, X)
    sizes = {g.name: g.size for g in graph.groups}
    nearer = []
    for name, kept in plan.keep.items():
        if int(kept.sum()) < sizes[name]:
            more = {**plan.keep, name: torch.arange(sizes[name]) < int(kept.sum()) + 1}
            nearer.append(amount(graph, target, more))
    dense = amount(graph, target, {})
    budget = target.absolute(dense)
    assert amount(graph, target, plan.keep) <= budget < max(nearer)


def amount(graph: Any, target: Any, keep: Any) -> float:
    if isinstance(target, pr.Sparsity):
        return float(sum(int(keep[g.name].sum()) if g.name in keep else g.size for g in graph.groups))
    return float(getattr(graph, target.name)(keep))


def test_the_plan_agrees_with_the_graph() -> None:
    model = convnet()
    plan = pr.plan(model, X, target=pr.MACs(0.5))
    graph = couple(model, X)
    assert plan.after.macs == graph.macs(plan.keep) and plan.before.params == sum(p.numel() for p in model.parameters())
    assert plan.after.params == graph.params(plan.keep) and plan.after.bytes == graph.bytes(plan.keep)
    assert {row.name: row.kept for row in plan.rows} == {name: int(kept.sum()) for name, kept in plan.keep.items()}
    kept = plan.keep["0"].nonzero().flatten()
    assert plan.cuts["0.weight"][0].equal(kept) and plan.cuts["3.weight"][1].equal(kept)
    assert sum(row.params_after for row in plan.rows) + 4 * plan.cuts["7.weight"][1].numel() + 4 == plan.after.params
    assert plan.masks == {} and plan.inputs is X


def test_the_lowest_scores_go() -> None:
    model = convnet()
    with torch.no_grad():
        model[0].weight[[2, 5]] *= 1e-3
    plan = pr.plan(model, X, target=pr.Sparsity(0.2), only=["0"])
    assert (~plan.keep["0"]).nonzero().flatten().tolist() == [2, 5]


def test_equal_scores_still_lose_the_asked_number() -> None:
    model = mlp(width=10)
    for parameter in model.parameters():
        nn.init.ones_(parameter)
    plan = pr.plan(model, torch.zeros(1, 4), target=pr.Sparsity(0.6))
    assert {name: int(kept.sum()) for name, kept in plan.keep.items()} == {"0": 4, "2": 2}
    assert plan.keep["0"].nonzero().flatten().tolist() == [0, 1, 2, 3]


def test_min_density_and_round_to_hold_and_are_reported() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 40), nn.ReLU(), nn.Linear(40, 22), nn.ReLU(), nn.Linear(22, 3))
    for sparsity in (0.1, 0.5, 0.6):
        recipe = pr.Recipe(pr.magnitude, min_density=0.25, round_to=8, allocation=pr.global_)
        plan = pr.plan(model, torch.zeros(1, 4), recipe, target=pr.Sparsity(sparsity))
        widths = [row.kept for row in plan.rows]
        assert all(row.kept == row.total or row.kept % 8 == 0 for row in plan.rows)
        assert widths[0] >= 16 and widths[1] >= 8 and sparsity <= plan.got <= sparsity + 8 / 62
        assert "multiples of 8" in str(plan)


def test_even_keeps_equal_groups_equal_and_passes_the_target_by_a_unit_of_each() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*[layer for _ in range(4) for layer in (nn.Linear(16, 16), nn.ReLU())], nn.Linear(16, 3))
    uneven = pr.plan(model, torch.zeros(1, 16), target=pr.MACs(0.5))
    even = pr.plan(model, torch.zeros(1, 16), pr.Recipe(equal_widths=True), target=pr.MACs(0.5))
    assert len({row.kept for row in uneven.rows}) == 2 and len({row.kept for row in even.rows}) == 1
    assert even.got <= uneven.got <= 0.5
    assert all(0 <= b.kept - a.kept <= 1 for a, b in zip(even.rows, uneven.rows, strict=True))


def test_heads_and_neurons_share_a_ranking() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Attention()
            self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.attention(x)
            out = x + self.down(torch.relu(self.up(x)))
            assert isinstance(out, Tensor)
            return out

    torch.manual_seed(0)
    model, x = Block(), torch.randn(2, 5, 8)
    recipe = pr.Recipe(pr.taylor, (pr.Channel(), pr.Head()), pr.global_, min_density=0.25)
    plan = pr.plan(model, x, recipe, target=pr.MACs(0.6), data=[x, -x], loss=square_loss)
    assert {row.kind for row in plan.rows} == {"channel", "head"} and 0.35 < plan.got <= 0.6
    heads = pr.plan(model, x, pr.Recipe(granularity=pr.Head()), target=pr.Sparsity(0.5))
    assert [(row.kind, row.kept, row.total) for row in heads.rows] == [("head", 2, 4)]
    assert heads.attributes == {("attention", "heads"): 2}


def test_groups_without_the_statistic_are_left_alone_with_a_reason() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 3, 3))
    plan = pr.plan(model, X, pr.Recipe(pr.criteria.bn_scale), target=pr.Sparsity(0.5))
    assert list(plan.keep) == ["0"]
    assert any("no normalization" in entry.reason and entry.entity == "2.weight" for entry in plan.frozen)


# -- masks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("allocation", [pr.uniform, pr.global_, pr.allocation.lamp, pr.allocation.erk])
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.777, 0.9])
@pytest.mark.parametrize("constant", [False, True])
def test_masks_have_exactly_the_asked_zeros(allocation: Any, sparsity: float, constant: bool) -> None:
    model = mlp()
    if constant:
        for parameter in model.parameters():
            nn.init.constant_(parameter, 0.5)
    plan = masks(model, pr.Recipe(granularity=pr.Element(), allocation=allocation), target=pr.Sparsity(sparsity))
    total = sum(mask.numel() for mask in plan.masks.values())
    assert sum(int((~mask).sum()) for mask in plan.masks.values()) == round(sparsity * total)
    assert plan.after.weights == total - round(sparsity * total) and plan.after.bytes == plan.before.bytes


def test_global_masks_are_those_of_torch_prune() -> None:
    from torch.nn.utils import prune

    plan = masks(mlp(), pr.Recipe(granularity=pr.Element(), allocation=pr.global_), target=pr.Sparsity(0.7))
    other = mlp()
    layers = [(other[i], "weight") for i in (0, 2, 4)]
    prune.global_unstructured(layers, pruning_method=prune.L1Unstructured, amount=0.7)
    for index in (0, 2, 4):
        assert plan.masks[f"{index}.weight"].equal(other[index].weight_mask.bool())


def test_masks_meet_budgets_of_the_whole_model() -> None:
    model = convnet()
    recipe = pr.Recipe(granularity=pr.Element(), allocation=pr.global_)
    plan = pr.plan(model, X, recipe, target=pr.Params(0.5))
    assert plan.after.params == int(0.5 * plan.before.params)
    plan = pr.plan(model, X, recipe, target=pr.MACs(0.5))
    dense = plan.before.macs
    assert 0.5 * dense - max(r.macs_before / r.total for r in plan.rows) < plan.after.macs <= 0.5 * dense
    with pytest.raises(RequestError, match="masks do not change bytes"):
        pr.plan(model, X, recipe, target=pr.Bytes(0.5))


def test_masks_have_the_shape_of_their_parameter_and_follow_its_axes() -> None:
    model = convnet()
    plan = pr.plan(model, X, pr.Recipe(granularity=pr.Element(), allocation=pr.global_), target=pr.Sparsity(0.5))
    weights = torch.cat([model.get_parameter(name).detach().abs()[kept] for name, kept in plan.masks.items()])
    pruned = torch.cat([model.get_parameter(name).detach().abs()[~kept] for name, kept in plan.masks.items()])
    assert weights.min() >= pruned.max()
    assert all(kept.shape == model.get_parameter(name).shape for name, kept in plan.masks.items())


def test_a_transposed_weight_is_masked_along_its_own_axes() -> None:
    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.arange(1.0, 25).view(4, 6))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(torch.zeros(6), x, self.weight)

    plan = masks(Transposed(), pr.Recipe(granularity=pr.NM(2, 4)))
    assert plan.masks["weight"].tolist() == [[False] * 6] * 2 + [[True] * 6] * 2


def test_rows_of_wanda_keep_the_same_number() -> None:
    model = mlp(width=8)
    recipe = pr.Recipe(pr.wanda, pr.Element(per_row=True))
    plan = masks(model, recipe, target=pr.Sparsity(0.5), data=[torch.randn(9, 4)], only=["0", "2"])
    assert plan.masks["0.weight"].sum(1).tolist() == [2] * 8 and plan.masks["2.weight"].sum(1).tolist() == [4] * 5


@pytest.mark.parametrize("granularity", [pr.Element(), pr.Channel(), pr.Element(per_row=True)])
@pytest.mark.parametrize("criterion", [pr.magnitude, pr.taylor, pr.wanda, pr.criteria.random])
def test_models_in_half_precision(granularity: Any, criterion: Any) -> None:
    model, x = mlp(width=12).bfloat16(), torch.randn(2, 4, dtype=torch.bfloat16)
    recipe = pr.Recipe(criterion, granularity, pr.allocation.lamp)
    plan = pr.plan(model, x, recipe, target=pr.Sparsity(0.5), data=[x], loss=square_loss)
    assert plan.got == pytest.approx(0.5, abs=0.15)


def test_tied_weights_are_masked_and_counted_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)))  # type: ignore[no-any-return]

    plan = masks(Tied(), pr.Recipe(granularity=pr.Element()), target=pr.Sparsity(0.5))
    assert len(plan.masks) == 1 and plan.before.weights == 16 and plan.after.weights == 8


def test_nm_has_its_own_sparsity() -> None:
    model = mlp(width=8)
    recipe = pr.Recipe(granularity=pr.NM(2, 4))
    plan = masks(model, recipe, only=["0", "2"])
    assert plan.target == pr.Sparsity(0.5) and plan.got == 0.5
    assert masks(model, recipe, target=pr.Sparsity(0.5), only=["0", "2"]).got == 0.5
    with pytest.raises(RequestError, match=r"NM\(2, 4\) cannot meet sparsity=0.7"):
        masks(model, recipe, target=pr.Sparsity(0.7))
    with pytest.raises(RequestError, match=r"NM\(2, 4\) does not fit 4"):
        masks(model, recipe)


# -- nothing is touched, everything is repeatable ------------------------------------------------------------------


def test_planning_leaves_no_trace_and_repeats() -> None:
    model = convnet().train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    rng = torch.get_rng_state()
    loader = torch.utils.data.DataLoader(torch.stack(images(4)).flatten(0, 1), batch_size=2, shuffle=True)
    plans = []
    for seed in (0, 0):
        torch.rand(1)
        plans.append(
            pr.plan(model, X, pr.Recipe(pr.taylor, seed=seed), target=pr.MACs(0.5), data=loader, loss=square_loss)
        )
    torch.set_rng_state(rng)
    for name in plans[0].keep:
        assert plans[0].keep[name].equal(plans[1].keep[name])
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_random_follows_the_seed() -> None:
    kept = [
        pr.plan(mlp(20), torch.zeros(1, 4), pr.Recipe(pr.criteria.random, seed=seed), target=pr.Sparsity(0.5)).keep["0"]
        for seed in (0, 0, 1)
    ]
    assert kept[0].equal(kept[1]) and not kept[0].equal(kept[2])


# -- names ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("skip", "only", "left"),
    [(["0"], [], ["3"]), ([], ["3"], ["3"]), (["1"], [], ["3"]), (["0.*"], [], ["3"]), (["7"], [], ["0", "3"])],
)
def test_skip_and_only(skip: list[str], only: list[str], left: list[str]) -> None:
    plan = pr.plan(convnet(), X, target=pr.Sparsity(0.3), skip=skip, only=only)
    assert list(plan.keep) == left


def test_a_module_stands_for_all_that_is_in_it() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"body": mlp(), "head": nn.Linear(3, 2)})
    whole = nn.Sequential(model["body"], nn.ReLU(), model["head"])
    plan = masks(whole, pr.Recipe(granularity=pr.Element()), target=pr.Sparsity(0.5), skip=["0"])
    assert list(plan.masks) == ["2.weight"]
    assert {entry.reason for entry in plan.frozen} == {"skip='0'"}


@pytest.mark.parametrize("option", ["skip", "only"])
def test_a_pattern_that_matches_nothing_is_an_error_with_near_names(option: str) -> None:
    with pytest.raises(RequestError, match=rf"{option}='3.wieght' matches nothing\nnear: 3.weight"):
        pr.plan(convnet(), X, target=pr.MACs(0.5), **{option: ["3.wieght"]})


def test_a_pattern_that_is_one_text_is_an_error() -> None:
    with pytest.raises(RequestError, match="is a single string"):
        pr.plan(convnet(), X, target=pr.MACs(0.5), skip="0")


# -- mistakes ------------------------------------------------------------------------------------------------------


def poison(name: str, value: float) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        model = convnet()
        model.state_dict()[name].view(-1)[0] = value
        return model

    return made


@pytest.mark.parametrize("name", ["3.weight", "1.bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_are_named(name: str, value: float) -> None:
    with pytest.raises(BadInput, match=f"{re.escape(name)} has 1 values that are not finite"):
        pr.plan(poison(name, value)(), X, target=pr.MACs(0.5))


def test_broken_buffers_are_named() -> None:
    with pytest.raises(BadInput, match=r"buffer 1\.running_var holds NaN"):
        pr.plan(poison("1.running_var", float("nan"))(), X, target=pr.MACs(0.5))


def test_an_empty_loader_is_bad_input() -> None:
    with pytest.raises(BadInput, match="no batches"):
        pr.plan(convnet(), X, pr.Recipe(pr.taylor), target=pr.MACs(0.5), data=[], loss=square_loss)


def test_data_and_loss_are_asked_for() -> None:
    with pytest.raises(RequestError, match="taylor needs `gate_grad`: pass data= and loss="):
        pr.plan(convnet(), X, pr.Recipe(pr.taylor), target=pr.MACs(0.5))
    with pytest.raises(RequestError, match="wanda needs `input_norm`: pass data="):
        pr.plan(convnet(), X, pr.Recipe(pr.wanda), target=pr.MACs(0.5))


def test_data_that_a_criterion_does_not_need_is_not_read() -> None:
    def explode() -> Iterator[Tensor]:
        raise AssertionError("the data was read")
        yield

    assert pr.plan(convnet(), X, target=pr.MACs(0.5), data=explode()).got <= 0.5


def test_a_target_that_cannot_be_met_says_how_far_it_got_and_what_stopped_it() -> None:
    with pytest.raises(TargetMissed) as caught:
        pr.plan(convnet(), X, pr.Recipe(min_density=0.5), target=pr.MACs(0.05), skip=["3"])
    message = str(caught.value)
    assert "macs=0.05 cannot be met" in message and "min_density=0.5" in message and "4 of 8 are kept" in message
    assert "skip='3'" in message and "it is an output of the model" in message
    assert message.index("3.weight") < message.index("7.weight"), "the most costly first"
    reached = float(message.split("leaves macs=")[1].split()[0])
    assert pr.plan(
        convnet(), X, pr.Recipe(min_density=0.5), target=pr.MACs(reached + 1e-4), skip=["3"]
    ).got == pytest.approx(reached, abs=1e-3)


def test_nothing_to_remove_is_an_error_unless_asked_for() -> None:
    with pytest.raises(TargetMissed, match="would remove nothing"):
        pr.plan(convnet(), X, target=pr.MACs(1.0))
    with pytest.raises(TargetMissed, match="would remove nothing"):
        masks(mlp(), pr.Recipe(granularity=pr.Element()), target=pr.Sparsity(0.001))
    assert all(kept.all() for kept in pr.plan(convnet(), X, target=pr.Sparsity(0)).keep.values())


def test_nothing_prunable_says_why() -> None:
    with pytest.raises(NotSupported, match=r"no units to prune for Head\n[\s\S]*this is channel"):
        pr.plan(convnet(), X, pr.Recipe(granularity=pr.Head()), target=pr.MACs(0.5))
    with pytest.raises(NotSupported, match=r"no units to prune for Channel\n[\s\S]*output of the model"):
        pr.plan(nn.Linear(4, 3), torch.zeros(1, 4), target=pr.MACs(0.5))
    with pytest.raises(NotSupported, match="no layer that multiplies"):
        masks(nn.ReLU(), pr.Recipe(granularity=pr.Element()), target=pr.Sparsity(0.5))


@pytest.mark.parametrize("target", [None, 0.5])
def test_a_target_without_unit_is_an_error(target: Any) -> None:
    with pytest.raises(RequestError, match=r"missing|has no unit"):
        pr.plan(convnet(), X, target=target)


@pytest.mark.parametrize(
    "fields",
    [
        {"criterion": "taylor"},
        {"criterion": pr.uniform},
        {"criterion": lambda: torch.zeros(1)},
        {"criterion": partial(pr.magnitude, q=2)},
        {"allocation": pr.magnitude},
        {"granularity": pr.Channel},
        {"granularity": ()},
        {"granularity": (pr.Channel(), pr.Element())},
        {"granularity": (pr.Channel(), pr.Channel())},
        {"min_density": 1.0},
        {"min_density": -0.1},
        {"round_to": 0},
        {"round_to": 8, "granularity": pr.Element()},
        {"seed": -1},
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        pr.Recipe(**fields)


# -- provenance and text -------------------------------------------------------------------------------------------

RECIPES = [
    DEFAULT,
    pr.Recipe(
        partial(pr.magnitude, p=2), (pr.Channel(pr.granularity.Reduce.MEAN), pr.Head()), pr.allocation.lamp, 0.1, 8, 3
    ),
    pr.Recipe(pr.wanda, pr.NM(2, 4)),
    pr.Recipe(pr.taylor, pr.Block(4, 2), partial(pr.global_, normalize=pr.allocation.Normalize.NORM)),
]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_can_be_written_and_read(recipe: pr.Recipe) -> None:
    written = json.loads(json.dumps(recipe.describe()))
    back = pr.Recipe.read(written)
    assert back.describe() == recipe.describe()
    assert back.granularity == recipe.granularity and back.min_density == recipe.min_density


def test_a_description_holds_every_knob() -> None:
    assert RECIPES[1].describe() == {
        "criterion": {"name": "magnitude", "knobs": {"p": 2}},
        "granularity": [{"name": "Channel", "knobs": {"reduce": "mean"}}, {"name": "Head", "knobs": {"reduce": "sum"}}],
        "allocation": {"name": "lamp", "knobs": {}},
        "min_density": 0.1,
        "round_to": 8,
        "seed": 3,
        "equal_widths": False,
        "min_units": 1,
    }


def test_a_recipe_that_0_1_wrote_is_read() -> None:
    numbers = {"floor": 0.25, "align": 4, "seed": 3, "even": True, "least": 1}
    parts = {name: DEFAULT.describe()[name] for name in ("criterion", "granularity", "allocation")}
    back = pr.Recipe.read({**parts, **numbers})
    assert back == pr.Recipe(min_density=0.25, round_to=4, seed=3, equal_widths=True)
    assert pr.Recipe.read({**parts, "floor": 0.25, "align": 4, "seed": 3}).equal_widths is False
    scaled = {"name": "global", "knobs": {"normalise": "mean", "per_cost": False}}
    read = pr.Recipe.read({**parts, **numbers, "allocation": scaled}).describe()
    assert read["allocation"]["knobs"] == {"normalize": "mean", "per_cost": False}


def mine(weight: Tensor, *, power: float = 1.0) -> Tensor:
    return weight.abs() ** power


def test_a_function_of_ones_own_works_and_is_recorded_but_not_loaded() -> None:
    recipe = pr.Recipe(partial(mine, power=1.0))
    plan, other = (pr.plan(convnet(), X, r, target=pr.MACs(0.5)) for r in (recipe, DEFAULT))
    assert all(plan.keep[name].equal(other.keep[name]) for name in plan.keep)
    assert plan.recipe["criterion"] == {"name": f"{__name__}:mine", "knobs": {"power": 1.0}}
    with pytest.raises(RequestError, match="not part of prunella"):
        pr.Recipe.read(plan.recipe)


def test_a_broken_description_is_bad_input() -> None:
    with pytest.raises(BadInput, match="does not describe a recipe"):
        pr.Recipe.read({"criterion": {}})
    with pytest.raises(PruningError, match="unknown criterion 'magnitud'"):
        pr.Recipe.read({**DEFAULT.describe(), "criterion": {"name": "magnitud", "knobs": {}}})


def test_the_table_is_aligned_and_complete() -> None:
    text = str(pr.plan(convnet(), X, target=pr.MACs(0.5), skip=["3"]))
    lines = text.splitlines()
    assert lines[0].split() == ["name", "kind", "kept", "params", "MACs"] and lines[1].startswith("0     channel")
    assert len({len(line) for line in lines[:2]}) == 1
    assert "asked macs=0.5, got macs=" in text and "magnitude, Channel, uniform" in text
    assert "1 x skip='3': 3.weight" in text and "bytes" in text


def test_named_recipes() -> None:
    assert named("fpgm").criterion is pr.criteria.geometric_median
    assert named("taylor") == pr.Recipe(pr.taylor)
    with pytest.raises(RequestError, match="did you mean"):
        named("taylr")
    with pytest.raises(RequestError, match="uniform is of kind allocation, not a recipe"):
        named("uniform")


def test_the_engine_agrees_with_the_graph_by_hand() -> None:
    made, hand = couple(mlp(), torch.zeros(2, 4)), hand_graph()
    assert made.macs() == hand.macs() and made.params() == hand.params()
    keep = {"0": torch.arange(6) < 2}
    assert made.macs(keep) == hand.macs(keep) and made.params(keep) == hand.params(keep)


@pytest.mark.filterwarnings("ignore")
def test_quantized_layers_are_left_alone_with_a_remark() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig(), filter_fn=lambda module, name: name == "2")
    plan = pr.plan(model, torch.randn(2, 8), pr.Recipe(granularity=pr.Element()), target=pr.Sparsity(0.5))
    assert plan.masks.keys() == {"0.weight", "4.weight"}
    kind = type(model[2].weight.data).__name__
    assert [remark for remark in plan.remarks if "2.weight" in remark] == [
        f"not pruned, since only their own library reads them: 2.weight ({kind})"
    ]
