"""Where an accelerator is out of memory: batches in halves, then hidden states on the CPU, then a typed error."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import prunella as pr
from prunella.errors import OutOfResources, out_of_resources
from prunella.llm.blocks import OnHost
from prunella.model.device import halved, short_of_memory
from tests.devices.second import DEVICE, far, move_, near, second_device
from tests.devices.test_several import DATA, dense
from tests.graphs import convnet
from tests.laws import test_methods as laws

EXAMPLE = 2
"""Samples of the example."""
FULL = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 79 GiB in all"


@contextmanager
def memory_for(model: nn.Module, samples: int, *, host: bool = False) -> Iterator[list[int]]:
    """In the body the model takes no batch of more samples, as if a GPU was full; the sizes that it was given.

    host: no third batch fits while hidden states are not on the CPU.
    """
    sizes: list[int] = []

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        sizes.append(len(args[0]))
        held[0] += len(args[0]) != EXAMPLE
        if len(args[0]) > samples or (host and not seen and held[0] > 2):
            held[0] = 0
            raise torch.OutOfMemoryError(FULL)

    seen: list[int] = []
    held = [0]
    kept = OnHost.__init__

    def noted(self: OnHost, tensors: Any) -> None:
        seen.append(1)
        kept(self, tensors)

    with pytest.MonkeyPatch.context() as patch, model.register_forward_pre_hook(before):
        patch.setattr(OnHost, "__init__", noted)
        yield sizes


def test_statistics_are_summed_over_halves_of_the_batches() -> None:
    model, data = convnet().eval(), [torch.randn(6, *laws.DATA[0].shape[1:]) for _ in range(2)]
    recipe = pr.Recipe(criterion=pr.wanda, granularity=pr.Element())
    expected = pr.plan(model, data[0], recipe, target=pr.Sparsity(0.5), data=data)
    full = copy.deepcopy(model)
    example = data[0][:2]
    with memory_for(full, 2) as sizes:
        plan = pr.plan(full, example, recipe, target=pr.Sparsity(0.5), data=data)
    assert max(sizes) == 6 and {1, 2} <= set(sizes)
    assert plan.masks.keys() == expected.masks.keys()
    assert all(mask.equal(expected.masks[name]) for name, mask in plan.masks.items())


def test_gradients_are_not_halved_and_one_sample_is_the_end() -> None:
    model, data = convnet().eval(), list(laws.DATA)
    recipe = pr.Recipe(criterion=pr.taylor)

    def full(model: nn.Module, batch: Any) -> Any:
        raise torch.OutOfMemoryError(FULL)

    for criterion, loss in ((pr.taylor, full), (pr.criteria.activation_norm, full)):
        recipe = pr.Recipe(criterion=criterion)
        with pytest.raises(OutOfResources, match="out of memory") as caught:
            pr.plan(model, data[0], recipe, target=pr.Params(0.5), data=data, loss=loss)
        assert caught.value.exit_code == 5 and "smaller batches" in caught.value.todo


def test_blocks_are_solved_with_halves_then_with_hidden_states_on_the_cpu_then_refused() -> None:
    model, how = dense(), pr.llm.OneShot(pr.NM(2, 4))
    expected = copy.deepcopy(model)
    pr.llm.solve_(expected, DATA[0], how, data=DATA)
    for samples, host in ((3, False), (6, True)):
        full = copy.deepcopy(model)
        with memory_for(full.blocks[0], samples, host=host) as sizes:
            pr.llm.solve_(full, DATA[0][:EXAMPLE], how, data=DATA)
        assert 3 in sizes and (1 in sizes) is host
        for name, value in full.state_dict().items():
            assert (value != 0).equal(expected.state_dict()[name] != 0)
            torch.testing.assert_close(value, expected.state_dict()[name], rtol=1e-4, atol=1e-5)
    full = copy.deepcopy(model)

    def fill(*_: Any) -> None:
        raise torch.OutOfMemoryError(FULL)

    with memory_for(full.blocks[2], 6), pytest.raises(OutOfResources, match="hidden states on the CPU") as caught:
        pr.llm.solve_(full, DATA[0][:EXAMPLE], how, data=DATA, on_layer=fill)
    assert caught.value.exit_code == 5
    assert all(value.equal(model.state_dict()[name]) for name, value in full.state_dict().items())


def test_a_model_that_does_not_fit_at_all_is_no_bad_input() -> None:
    with memory_for(model := dense(), 0), pytest.raises(OutOfResources, match="out of memory"):
        pr.plan(model, DATA[0], target=pr.Params(0.6))


def test_steps_of_a_refinement_keep_their_batches() -> None:
    model = dense()
    how = pr.llm.OneShot(pr.NM(2, 4), refine=pr.llm.Refine(epochs=1))
    with memory_for(model.blocks[0], 6, host=True) as sizes:
        pr.llm.solve_(model, DATA[0][:EXAMPLE], how, data=DATA)
    assert set(sizes) == {EXAMPLE, 6}


def test_hidden_states_on_the_host_are_the_same_and_come_back_to_their_device() -> None:
    here = dense()
    pr.llm.solve_(here, DATA[0], pr.llm.OneShot(pr.NM(2, 4)), data=DATA)
    with second_device():
        states = OnHost(far(x) for x in DATA)
        assert [x.device for x in states] == [DEVICE] * len(DATA) and all(
            x.device.type == "cpu" for x, _ in states._kept
        )
        assert len(states[1:]) == 3 and near(states[1]).equal(DATA[1])
        there = move_(dense())
        with memory_for(there.blocks[0], 6, host=True):
            pr.llm.solve_(there, far(DATA[0][:EXAMPLE]), pr.llm.OneShot(pr.NM(2, 4)), data=far(DATA))
        state = near(dict(there.state_dict()))
    for name, value in here.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("text", [FULL, "MPS backend out of memory (MPS allocated: 1 GB)", "XPU out of memory."])
def test_messages_of_accelerators_are_known(text: str) -> None:
    found = out_of_resources(RuntimeError(text))
    assert found is not None and found.exit_code == 5 and "--device" in found.todo
    assert short_of_memory(RuntimeError(text)) and short_of_memory(torch.OutOfMemoryError("?"))
    assert not short_of_memory(MemoryError()) and not short_of_memory(RuntimeError("something else"))


def test_batches_are_halved_down_to_one_sample_with_their_labels() -> None:
    batch = {"x": torch.arange(5), "y": (torch.arange(5), torch.tensor(1.0)), "name": "a"}
    halves = halved([batch])
    assert halves is not None and [h["x"].tolist() for h in halves] == [[0, 1], [2, 3, 4]]
    assert [h["y"][0].tolist() for h in halves] == [[0, 1], [2, 3, 4]] and halves[0]["name"] == "a"
    assert halved([torch.zeros(1, 4)]) is None and halved([(torch.zeros(2), torch.zeros(3))]) is None
