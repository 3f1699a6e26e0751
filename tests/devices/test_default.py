"""A model on the CPU is pruned as ever while another device is the default (`torch.set_default_device`)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

import prunella as pr
from prunella.planning import recipes
from prunella.registry.method import Method
from tests.devices.second import second_device
from tests.devices.test_methods import RECOVERIES, same
from tests.graphs import convnet, square_loss
from tests.laws import test_methods as laws
from tests.laws.test_composition import IMAGE, tiny

DATA = laws.DATA


def with_and_without(run: Callable[[], Any]) -> tuple[Any, Any]:
    plain = run()
    with second_device() as device, device:
        assert torch.zeros(1).device == device
        return plain, run()


@pytest.mark.parametrize("method", laws.RECIPES, ids=laws.ids)
def test_recipes_do_not_look_at_the_default_device(method: Method) -> None:
    recipe, model, example = recipes.named(method.name), convnet().eval(), DATA[0]
    fixed = isinstance(recipe.granularities[0], pr.NM)

    def pruned() -> dict[str, Any]:
        skip, target = (["0", "7"], None) if fixed else ([], pr.Sparsity(0.5))
        plan = pr.plan(model, example, recipe, target=target, data=DATA, loss=square_loss, skip=skip)
        small = pr.shrink(model, plan) if plan.changes else pr.apply_(copy.deepcopy(model), plan)
        return {"masks": dict(plan.masks), "keep": dict(plan.keep), "state": dict(small.state_dict())}

    assert same(*with_and_without(pruned))


@pytest.mark.parametrize("name", RECOVERIES)
def test_recoveries_do_not_look_at_it(name: str) -> None:
    dense, example = tiny(), torch.zeros(IMAGE)

    def recovered() -> dict[str, Any]:
        plan = pr.plan(dense, example, target=pr.Params(0.5), data=DATA)
        small = pr.shrink(copy.deepcopy(dense), plan)
        RECOVERIES[name](small, dense, plan, DATA)
        return dict(small.state_dict())

    assert same(*with_and_without(recovered))


def test_blocks_files_and_the_default_call_do_not_look_at_it(tmp_path: Any) -> None:
    dense, example, number = tiny(), torch.zeros(IMAGE), iter(range(2))

    def pruned() -> dict[str, Any]:
        done = pr.prune(copy.deepcopy(dense), example, target=pr.MACs(0.6), data=[*DATA] * 2, recover={"steps": 2})
        file = tmp_path / f"{next(number)}.plan"
        pr.io.save_plan(done.plan, file)
        solved = copy.deepcopy(dense)
        pr.llm.solve_(solved, example, pr.llm.OneShot(pr.Element()), data=DATA)
        return {"keep": dict(pr.io.load_plan(file).keep), "state": dict(done.model.state_dict()), **solved.state_dict()}

    assert same(*with_and_without(pruned))
