"""A model over two devices: each layer is pruned, solved and trained where it is, as on the CPU alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunella as pr
from tests.devices.second import DEVICE, OTHER, far, move_, near, second_device
from tests.devices.test_methods import same
from tests.graphs import square_loss

CPU = torch.device("cpu")
PLACES = {"two accelerators": (DEVICE, OTHER), "an accelerator and the CPU": (DEVICE, CPU)}


class Norm(nn.Module):
    """A norm in float32 between layers of another precision, as language models have it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        scaled = x.to(self.weight.dtype) * torch.rsqrt(x.to(self.weight.dtype).square().mean(-1, keepdim=True) + 1e-6)
        return (scaled * self.weight).to(x.dtype)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = Norm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Stack(nn.Module):
    """Residual blocks; hooks move the activations, as those of accelerate do."""

    def __init__(self, width: int = 8, blocks: int = 4) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(x))
        return out


def moved_to(place: torch.device, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.to(place) if isinstance(x, Tensor) and x.device != place else x for x in args)


def spread_(model: Stack, places: tuple[torch.device, torch.device]) -> Stack:
    """The first half of the blocks on one device, the others and the head on another."""
    middle = len(model.blocks) // 2
    for part, place in [*((b, places[k >= middle]) for k, b in enumerate(model.blocks)), (model.head, places[1])]:
        if place != CPU:
            move_(part, partial(far, device=place))
        part.register_forward_pre_hook(partial(moved_to, place))
    return model


def dense(seed: int = 0) -> Stack:
    torch.manual_seed(seed)
    return Stack().eval()


DATA = [torch.randn(6, 8, generator=torch.Generator().manual_seed(k)) for k in range(4)]


def both(places: tuple[torch.device, torch.device], run: Callable[[Callable[[Any], Any]], Any]) -> tuple[Any, Any]:
    here = run(lambda value: value)
    with second_device():
        there = run(lambda value: spread_(value, places) if isinstance(value, nn.Module) else far(value))
        return here, near(there)


def places_of(model: nn.Module) -> dict[str, torch.device]:
    return {name: parameter.device for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("criterion", [pr.magnitude, pr.taylor, pr.wanda], ids=lambda c: c.__name__)
def test_a_plan_and_its_cut_are_those_of_one_device(places: Any, criterion: Any) -> None:
    def cut(place: Callable[[Any], Any]) -> dict[str, Any]:
        model, data = place(dense()), place(DATA)
        recipe = pr.Recipe(criterion=criterion, allocation=pr.global_)
        plan = pr.plan(model, data[0], recipe, target=pr.Params(0.6), data=data, loss=square_loss)
        small = pr.shrink(model, plan)
        if place(DATA)[0].device != CPU:
            assert places_of(small) == places_of(model)
        return {"keep": dict(plan.keep), "state": dict(small.state_dict()), "out": small(data[0])}

    assert same(*both(places, cut))


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
def test_masks_training_and_recoveries_are_those_of_one_device(places: Any) -> None:
    def recovered(place: Callable[[Any], Any]) -> dict[str, Any]:
        model, data = place(dense()), place(DATA)
        plan = pr.plan(model, data[0], target=pr.Params(0.6), data=data)
        small = pr.shrink(model, plan)
        pr.reconstruct(small, model, data, plan)
        pr.finetune(small, data, square_loss, steps=2, lr=1e-3)
        masked = pr.plan(small, data[0], pr.Recipe(granularity=pr.Element()), target=pr.Sparsity(0.5))
        pr.apply_(small, masked)
        return {"masks": pr.masks_of(small), "state": dict(small.state_dict())}

    assert same(*both(places, recovered))


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_are_solved_where_they_are(places: Any, dtype: torch.dtype) -> None:
    def solved(place: Callable[[Any], Any]) -> dict[str, Any]:
        model = dense()
        for block in model.blocks:
            for layer in (block.up, block.down):
                layer.to(dtype)
        model = place(model.to(dtype) if dtype is not torch.float32 else model)
        if dtype is not torch.float32:  # norms stay in float32
            for module in model.modules():
                if isinstance(module, Norm):
                    module.weight.data = module.weight.data.float()
        data = [x.to(dtype) for x in place(DATA)]
        done = pr.llm.solve_(model, data[0], pr.llm.OneShot(pr.NM(2, 4)), data=data)
        assert len([fit for fit in done.fits if not fit.skipped]) == 8
        return dict(model.state_dict())

    assert same(*both(places, solved))


def test_the_default_call_works_over_two_devices() -> None:
    def pruned(place: Callable[[Any], Any]) -> dict[str, Any]:
        model, data = place(dense()), place([*DATA] * 3)
        done = pr.prune(model, data[0], target=pr.MACs(0.7), data=data, recover={"steps": 2})
        return {"keep": dict(done.plan.keep), "state": dict(done.model.state_dict())}

    assert same(*both(PLACES["two accelerators"], pruned))


def test_a_model_whose_forward_does_not_move_is_refused_by_its_own_error() -> None:
    with second_device():
        model = spread_(dense(), PLACES["two accelerators"])
        for module in model.modules():
            module._forward_pre_hooks.clear()
        with pytest.raises(pr.PruningError, match="same device"):
            pr.plan(copy.deepcopy(model), far(DATA[0]), target=pr.Params(0.6))
