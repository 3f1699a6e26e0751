"""The second device refuses what a real one refuses, and computes what the CPU computes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.devices.second import DEVICE, far, move_, near, second_device


def test_operands_on_two_devices_are_refused_and_those_that_torch_allows_are_not() -> None:
    with second_device() as device:
        x, w = far(torch.randn(3, 4)), torch.randn(4)
        for mixed in (lambda: x * w, lambda: torch.where(x > 0, x, w), lambda: x.index_select(0, torch.tensor([1]))):
            with pytest.raises(RuntimeError, match="same device"):
                mixed()
        assert (x * torch.tensor(2.0)).device == DEVICE  # a number
        assert x[torch.tensor([0, 2])].device == x[x > 0].device == x[[0, 2]].device == DEVICE
        assert torch.zeros(3, 4).copy_(x).device.type == "cpu" and x.cpu().device.type == "cpu"
        assert torch.zeros(2, device=device).device == torch.tensor([1.0], device=device).device == DEVICE
        with pytest.raises(RuntimeError, match="generator"):
            torch.rand(3, device=device, generator=torch.Generator())


def test_a_model_there_trains_to_the_bits_of_the_cpu() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    x = torch.randn(2, 3, 6, 6)
    ends = []
    for there in (False, True):
        with second_device():
            trained, batch = copy.deepcopy(model), far(x) if there else x
            trained = move_(trained) if there else trained
            optimizer = torch.optim.SGD(trained.parameters(), lr=0.1, momentum=0.9)
            for _ in range(3):
                optimizer.zero_grad()
                trained(batch).square().mean().backward()
                optimizer.step()
            assert {p.device.type for p in trained.parameters()} == {DEVICE.type if there else "cpu"}
            ends.append({name: near(value) for name, value in trained.state_dict().items()})
    assert all(value.equal(ends[1][name]) for name, value in ends[0].items())
