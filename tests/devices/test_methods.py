"""Each method on the second device: it runs, and it decides and computes what it does on the CPU.

Operands on two devices raise there, so that a mask, a statistic or a random number on the wrong device is found without
an accelerator. The tests of other folders run there too, with `tests/devices/plugin.py`.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunella as pr
from prunella.model import device
from prunella.planning import recipes
from prunella.registry.method import Method
from tests.devices.second import far, move_, near, second_device, without_float64
from tests.graphs import blocks, convnet, square_loss
from tests.laws import test_methods as laws
from tests.laws.test_composition import IMAGE, tiny

DATA = laws.DATA


def both(run: Callable[[Callable[[Any], Any]], Any]) -> tuple[Any, Any]:
    """What `run` gives on the CPU and on the second device, both on the CPU in the end."""
    here = run(lambda value: value)
    with second_device():
        there = run(lambda value: move_(value) if isinstance(value, nn.Module) else far(value))
        return here, near(there)


def same(here: Any, there: Any) -> bool:
    """Whether two structures of tensors are equal up to rounding."""
    if isinstance(here, dict):
        return here.keys() == there.keys() and all(same(value, there[key]) for key, value in here.items())
    if isinstance(here, Tensor):
        return here.shape == there.shape and torch.allclose(here.double(), there.double(), rtol=1e-5, atol=1e-8)
    return here is there is None or here == there


@pytest.mark.parametrize("method", laws.CRITERIA, ids=laws.ids)
def test_scores_are_those_of_the_cpu(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    def scores(place: Callable[[Any], Any]) -> dict[str, Tensor | None]:
        model = place((blocks() if "influence" in method.needs else convnet()).eval())
        monkeypatch.setattr(laws, "DATA", place(DATA))
        by_group = laws.scorer(method, model)
        found = {f"units of {group.name}": laws.units(by_group, group) for group in by_group.subject.groups}
        if method in laws.PER_WEIGHT:
            by_layer = laws.scorer(method, place(convnet().eval()), masks=True)
            found |= {f"weights of {layer.name}": by_layer.weights(layer) for layer in by_layer.subject.layers}
        return found

    here, there = both(scores)
    assert same(here, there)


@pytest.mark.parametrize("method", laws.RECIPES, ids=laws.ids)
def test_recipes_plan_and_cut_as_on_the_cpu(method: Method) -> None:
    recipe = recipes.named(method.name)
    fixed = isinstance(recipe.granularities[0], pr.NM)

    def pruned(place: Callable[[Any], Any]) -> dict[str, Any]:
        model, data = place(convnet().eval()), place(DATA)
        skip = ["0", "7"] if fixed else []
        target = None if fixed else pr.Sparsity(0.5)
        plan = pr.plan(model, data[0], recipe, target=target, data=data, loss=square_loss, skip=skip)
        small = pr.shrink(model, plan) if plan.changes else pr.apply_(copy.deepcopy(model), plan)
        masks = {name: mask.cpu() for name, mask in plan.masks.items()}
        return {"masks": masks, "keep": dict(plan.keep), "state": dict(small.state_dict())}

    here, there = both(pruned)
    assert same(here, there)


RECOVERIES: dict[str, Callable[[nn.Module, nn.Module, pr.Plan, Any], object]] = {
    "finetune": lambda small, dense, plan, data: pr.finetune(small, data, square_loss, steps=2, lr=1e-3),
    "recalibrate_bn": lambda small, dense, plan, data: pr.recalibrate_bn(small, data),
    "reconstruct": lambda small, dense, plan, data: pr.reconstruct(small, dense, data, plan),
    "fold_means": lambda small, dense, plan, data: pr.recovery.fold_means(small, dense, data, plan),
    "correct_statistics": lambda small, dense, plan, data: pr.recovery.correct_statistics(
        small, dense, data, plan=plan
    ),
    "absorb_bn": lambda small, dense, plan, data: pr.recovery.absorb_bn(small, data),
    "distill": lambda small, dense, plan, data: pr.distill(
        small, dense, data, steps=2, lr=1e-3, imitate=pr.recovery.distill_logits
    ),
}


@pytest.mark.parametrize("name", RECOVERIES)
def test_recoveries_end_as_on_the_cpu(name: str) -> None:
    def recovered(place: Callable[[Any], Any]) -> dict[str, Tensor]:
        dense, data = place(tiny()), place(DATA)
        plan = pr.plan(dense, place(torch.zeros(IMAGE)), target=pr.Params(0.5), data=data)
        small = pr.shrink(copy.deepcopy(dense), plan)
        RECOVERIES[name](small, dense, plan, data)
        return dict(small.state_dict())

    here, there = both(recovered)
    assert same(here, there)


def test_the_default_call_ends_as_on_the_cpu() -> None:
    def pruned(place: Callable[[Any], Any]) -> dict[str, Any]:
        model, data = place(tiny()), place([*DATA] * 2)
        done = pr.prune(model, place(torch.zeros(IMAGE)), target=pr.MACs(0.6), data=data, recover={"steps": 2})
        return {"keep": dict(done.plan.keep), "state": dict(done.model.state_dict())}

    here, there = both(pruned)
    assert same(here, there)


def test_a_device_without_float64_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "NO_FLOAT64", frozenset({"lazy"}))
    with second_device(), pytest.raises(pr.PruningError, match="float64, which this device does not have"):
        pr.plan(move_(convnet().eval()), far(DATA[0]), target=pr.Params(0.5))


def test_every_recovery_of_a_small_model_is_here() -> None:
    unlike = {"adaptive_lr", "rewind_lr", "scaled_lr", "distill_lm"}  # learning rates, and language models
    parts = {"distill_attention", "distill_attention_probabilities", "distill_features", "distill_logits"}
    adapters = {"add_adapters", "mask_adapters", "merge_adapters", "with_biases"}
    names = {method.name for method in laws.methods() if method.kind == "recovery"}
    assert names == set(RECOVERIES) | unlike | parts | adapters
    assert all(len(inspect.signature(run).parameters) == 4 for run in RECOVERIES.values())


def test_what_sums_only_runs_without_float64_and_the_rest_is_refused() -> None:
    """MPS has no float64: sums are on the CPU there, and what computes in float64 says so."""
    dense, example = tiny(), torch.zeros(IMAGE)
    plan = pr.plan(dense, example, target=pr.Params(0.5), data=DATA)
    small = pr.shrink(copy.deepcopy(dense), plan)
    calibrated, solved, how = copy.deepcopy(small), copy.deepcopy(dense), pr.llm.OneShot(pr.Element())
    pr.recalibrate_bn(calibrated, DATA)
    pr.llm.solve_(solved, example, how, data=DATA)

    with without_float64():
        there, image, data = move_(copy.deepcopy(dense)), far(example), far(DATA)
        other, again = move_(copy.deepcopy(small)), move_(copy.deepcopy(dense))
        pr.recalibrate_bn(other, data)
        pr.llm.solve_(again, image, how, data=data)
        assert same(dict(calibrated.state_dict()), near(dict(other.state_dict())))
        assert same(dict(solved.state_dict()), near(dict(again.state_dict())))
        for name in ("reconstruct", "fold_means", "correct_statistics", "absorb_bn"):
            with pytest.raises(pr.PruningError, match="in float64, which this device does not have"):
                RECOVERIES[name](other, there, plan, data)
        with pytest.raises(pr.PruningError, match="in float64, which this device does not have"):
            pr.shrink(there, plan)


def test_labels_of_regions_are_on_the_cpu_and_their_masks_with_the_scores() -> None:
    granularity = pr.granularity.Regions(lambda shape: torch.arange(shape[0]).expand(shape[1], -1).T % 4)
    scores = torch.rand(8, 8, generator=torch.Generator().manual_seed(0))
    expected = granularity.on((8, 8)).mask(scores, 2)
    with second_device() as device:
        mask = granularity.on((8, 8)).mask(far(scores), 2)
        assert mask.device == device and near(mask).equal(expected)
