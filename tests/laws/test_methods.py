"""What every registered method promises, whatever it computes. A new method is picked up by being registered."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import prunella as pr
from prunella.allocation.pool import Pool
from prunella.graph.data import Group
from prunella.graph.solve.groups import couple
from prunella.model.state import untouched
from prunella.planning import recipes
from prunella.planning.budget import allocate
from prunella.planning.scoring import Absent, Scorer
from prunella.registry.catalogue import methods
from prunella.registry.criterion import criterion
from prunella.registry.method import REGISTRY, Method
from prunella.selection import shortest_prefix
from prunella.stats import STATISTICS, Source, Subject, collect
from prunella.stats.table import of_level
from tests.graphs import blocks, convnet, images, square_loss

ROUTED = {m.name for m in REGISTRY.values() if any(need.startswith("expert_") for need in m.needs)}
"""Criteria of experts, which the nets here do not have: see tests/stats/test_routing.py; so `reap_experts` is out."""
CRITERIA = [m for m in REGISTRY.values() if m.kind == "criterion" and m.name not in ROUTED]
ALLOCATIONS = [m for m in REGISTRY.values() if m.kind == "allocation"]
RECIPES = [m for m in REGISTRY.values() if m.kind == "recipe" and m.name != "reap_experts"]
ONLY_UNITS = {m.name for m in CRITERIA if of_level(m.needs, "unit", "block")} | {"geometric_median"}
PER_WEIGHT = [m for m in CRITERIA if m.name not in ONLY_UNITS]
POSITIONAL = {"random", "obd", "obs_saliency", "obert"}
"""What depends on where a weight stands: by random numbers, or by the block of neighbors that it is in."""
DATA = images()


def ids(method: Method) -> str:
    return method.name


def scorer(method: Method, model: nn.Module, *, masks: bool = False) -> Scorer:
    graph = couple(model, DATA[0])
    groups = graph.stacks if "influence" in method.needs else graph.groups
    whole = {"layers": graph.layers} if masks else {"groups": groups}
    subject = Subject(model, graph, inputs=DATA[0], **whole)  # type: ignore[arg-type]
    with untouched(model, 0):
        statistics = collect(subject, method.needs, Source(DATA, square_loss))
    return Scorer(method.function, subject, statistics)


def units(score: Scorer, group: Group) -> Tensor | None:
    """Scores of a group, None where the criterion has none for it."""
    try:
        return score.units(group, pr.granularity.Reduce.SUM)
    except Absent:
        return None


def permuted(model: nn.Sequential, order: Tensor) -> nn.Sequential:
    """The same function with the channels of the first convolution in another order."""
    other = convnet()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name in ("0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var"):
            other.state_dict()[name].copy_(model.state_dict()[name][order])
        other.state_dict()["3.weight"].copy_(model.state_dict()["3.weight"][:, order])
    return other


@pytest.mark.parametrize("method", CRITERIA, ids=ids)
def test_a_criterion_scores_every_unit_the_same_each_time_and_leaves_its_inputs(method: Method) -> None:
    model = (blocks() if "influence" in method.needs else convnet()).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = [scorer(method, model) for _ in range(2)]
    statistics = {k: {n: v.clone() for n, v in by.items()} for k, by in found[0].statistics.values.items()}
    pairs = [(group, *(units(s, group) for s in found)) for group in found[0].subject.groups]
    assert any(first is not None for _, first, _ in pairs), "it scores no group of a convolutional network"
    for group, first, again in pairs:
        if first is None or again is None:
            assert first is again, f"{group.name} is scored once and not the second time"
            continue
        shape = f"{group.name} has {group.size} units, and the scores are {tuple(first.shape)} {first.dtype}"
        assert first.shape == (group.size,) and first.dtype == torch.float64, shape
        assert bool(torch.isfinite(first).all()), f"scores of {group.name} are not finite"
        assert first.equal(again), f"the scores of {group.name} differ between two calls: use no random numbers"
        assert len(first.unique()) > 1, f"all units of {group.name} have one score"
    changed = [name for name, value in model.state_dict().items() if not value.equal(before[name])]
    assert not changed, f"the criterion writes to the model: {changed}"
    for name, by in found[0].statistics.values.items():
        assert all(value.equal(statistics[name][key]) for key, value in by.items()), f"it writes to `{name}`: copy it"


@pytest.mark.parametrize("method", PER_WEIGHT, ids=ids)
def test_a_criterion_scores_every_weight(method: Method) -> None:
    score = scorer(method, convnet().eval(), masks=True)
    for layer in score.subject.layers:
        scores = score.weights(layer)
        count = score.subject.parameters[layer.entity].numel()
        assert scores.numel() == count, f"{scores.numel()} scores for the {count} weights of {layer.name}"
        assert bool(torch.isfinite(scores).all()), f"scores of {layer.name} are not finite"


@pytest.mark.parametrize("method", [m for m in CRITERIA if m.name not in POSITIONAL | {"block_influence"}], ids=ids)
def test_permuting_the_channels_permutes_their_scores(method: Method) -> None:
    model, order = convnet().eval(), torch.randperm(8, generator=torch.Generator().manual_seed(3))
    plain, moved = scorer(method, model), scorer(method, permuted(model, order).eval())
    first, second = (s.units(s.subject.graph.group("0"), pr.granularity.Reduce.SUM) for s in (plain, moved))
    order_counts = "channels in another order get other scores: do not use their positions, or list it in POSITIONAL"
    assert torch.allclose(first[order], second, rtol=1e-4, atol=1e-9), order_counts
    assert not torch.allclose(first, second, rtol=1e-2), "the scores do not follow the channels"
    other = [units(s, s.subject.graph.group("3")) for s in (plain, moved)]
    same = other[0] is other[1] is None or torch.allclose(*other, rtol=1e-4, atol=1e-9)  # type: ignore[arg-type]
    assert same, "the scores of the next layer change with the order of its inputs"


OF_THE_RUN = {"on_block", "on_layer", "overwrite", "device"}
"""Where it runs, what it reports and what it replaces: no knobs of a method, which decide what comes out."""


@pytest.mark.parametrize("method", [m for m in REGISTRY.values() if m.kind != "schedule"], ids=ids)
def test_a_method_says_where_it_comes_from_and_what_it_does(method: Method) -> None:
    assert method.source, "give source=, the paper and its arXiv number"
    assert method.summary.endswith((".", ")")), f"the first line of the docstring is one sentence: {method.summary!r}"
    unknown = set(method.needs) - set(STATISTICS)
    assert not unknown, f"no statistics of these names in stats/table.py: {sorted(unknown)}"
    knobs = [knob.name for knob in method.knobs if knob.name not in OF_THE_RUN]
    assert len(knobs) <= 5, f"{len(knobs)} knobs, and five are the most: {', '.join(knobs)}"


@pytest.mark.parametrize("method", methods(), ids=ids)
def test_a_method_says_when_to_use_it_and_when_not(method: Method) -> None:
    last = " ".join((inspect.getdoc(method.function) or "").split("\n\n")[-1].split())
    asked = "end the docstring with a paragraph `Use: ... Avoid: ...`"
    assert last.startswith("Use: ") and " Avoid: " in last and last.endswith("."), asked


@pytest.mark.parametrize("method", [m for m in REGISTRY.values() if m.kind == "criterion"], ids=ids)
def test_a_criterion_has_a_formula_its_data_and_defaults_for_its_knobs(method: Method) -> None:
    text = inspect.getdoc(method.function) or ""
    assert "`" in text, "write the formula into the docstring, in backticks"
    assert "Data: " in text, "say in the docstring what data it needs: `Data: forward passes only.`"
    required = [knob.name for knob in method.knobs if knob.default is inspect.Parameter.empty]
    assert not required, f"give these knobs a default: {required}"


def pools(scale: float = 1.0) -> Sequence[Pool]:
    torch.manual_seed(0)
    sizes = {"a": (60, (6, 10)), "b": (8, (2, 4)), "c": (128, (8, 16)), "d": (1, (1, 1))}
    scores = {name: torch.rand(n) * scale + (name == "b") for name, (n, _) in sizes.items()}
    scores["c"][:50] = 0.25
    return [Pool(name, scores[name].sort().values, shape) for name, (_, shape) in sizes.items()]


@pytest.mark.parametrize("method", ALLOCATIONS, ids=ids)
def test_an_allocation_meets_every_budget_exactly_and_only_grows(method: Method) -> None:
    keys = allocate(pools(), method.function)
    found = []
    for total in range(0, 197, 7):
        counts = shortest_prefix(keys, lambda taken, total=total: sum(taken) >= total)
        assert counts is not None and sum(counts) == total
        assert all(count <= pool.size for count, pool in zip(counts, pools(), strict=True))
        found.append(counts)
    assert all(a <= b for one, two in pairwise(found) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("method", ALLOCATIONS, ids=ids)
def test_an_allocation_leaves_its_scores_and_repeats(method: Method) -> None:
    given, other = pools(), pools()
    first, again = allocate(given, method.function), allocate(given, method.function)
    assert all(a.equal(b) for a, b in zip(first, again, strict=True))
    assert all(a.scores.equal(b.scores) for a, b in zip(given, other, strict=True))


@pytest.mark.parametrize("method", RECIPES, ids=ids)
def test_a_recipe_makes_a_plan(method: Method) -> None:
    recipe = recipes.named(method.name)
    fixed = isinstance(recipe.granularities[0], pr.NM)
    model = convnet()
    plan = pr.plan(model, DATA[0], recipe, target=None if fixed else pr.Sparsity(0.5), data=DATA, loss=square_loss,
                   skip=["0", "7"] if fixed else [])  # fmt: skip
    assert plan.got == pytest.approx(0.5, abs=0.1)
    assert pr.Recipe.read(plan.recipe).describe() == recipe.describe()
    assert bool(plan.masks) != bool(plan.keep)


def test_two_methods_cannot_have_one_name() -> None:
    def magnitude(weight: torch.Tensor) -> torch.Tensor:
        return weight

    with pytest.raises(TypeError, match=r"two methods are called 'magnitude': one in prunella\.criteria"):
        criterion(source="nobody")(magnitude)
    assert REGISTRY["magnitude"].function is pr.magnitude
