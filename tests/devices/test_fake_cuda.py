"""Criteria on tensors that torch takes for tensors of CUDA: `FakeTensorMode` checks their devices, without values.

A build of torch without CUDA takes such tensors through operations alone. It cannot copy to the device, it ends the
process when a gradient is asked for, and nothing may depend on a value: there are none. Criteria are the methods that
need none of that; all others run on the second device (`test_methods.py`), which has values.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode

from prunella.planning.scoring import Scorer
from prunella.registry.method import Method
from tests.graphs import blocks, convnet
from tests.laws import test_methods as laws

CUDA = torch.device("cuda", 0)
COPIES = {"obert"}
"""Criteria that write into a part of a tensor, for which torch wants a driver."""


def on_cuda(mode: FakeTensorMode, value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    with torch.no_grad():
        return FakeTensor(
            mode, torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta"), CUDA
        )


def calls_of(method: Method) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """The operands of every call of a criterion while it scores a network."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    model = (blocks() if "influence" in method.needs else convnet()).eval()
    plain = laws.scorer(method, model)

    @functools.wraps(method.function)
    def recorded(*args: Any, **knobs: Any) -> Any:
        calls.append((args, knobs))
        return method.function(*args, **knobs)

    score = Scorer(recorded, plain.subject, plain.statistics)
    for group in score.subject.groups:
        laws.units(score, group)
    assert calls
    return calls


@pytest.mark.parametrize("method", [m for m in laws.CRITERIA if m.name not in COPIES], ids=laws.ids)
def test_a_criterion_keeps_to_the_device_of_its_operands(method: Method) -> None:
    mode = FakeTensorMode()
    for args, knobs in calls_of(method):
        operands = [on_cuda(mode, value) for value in args]
        with mode, torch.no_grad():
            scores = method.function(*operands, **{name: on_cuda(mode, value) for name, value in knobs.items()})
        assert scores.device == CUDA


def test_operands_on_two_devices_are_refused_here() -> None:
    mode = FakeTensorMode()
    there = on_cuda(mode, torch.ones(2, 3))
    with mode, torch.no_grad():
        with pytest.raises(RuntimeError, match="same device"):
            there * torch.ones(3, device="cpu")
        with pytest.raises(DataDependentOutputException):
            bool(there.sum() > 0)


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has a driver to copy by")
@pytest.mark.parametrize("name", sorted(COPIES))
def test_the_criteria_that_are_left_out_cannot_run_here(name: str) -> None:
    method = next(m for m in laws.CRITERIA if m.name == name)
    with pytest.raises(RuntimeError, match="not linked with support for cuda"):
        test_a_criterion_keeps_to_the_device_of_its_operands(method)
