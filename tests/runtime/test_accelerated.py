"""`sparse` on an accelerator, with stand-ins for kernels and clock: all but the kernels themselves runs here."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import prunella as pr
from prunella.errors import BadInput, CheckFailed, RequestError
from prunella.measure.clock import fake_clock
from prunella.runtime import accelerated
from prunella.runtime.accelerated import AcceleratedLinear
from prunella.runtime.kernels import accelerator
from prunella.runtime.kernels.accelerator import AcceleratorKernel, block_density, is_two_of_four, kernels_of
from prunella.runtime.record import Sparsified
from prunella.runtime.tuning.choice import Route, Table, describe, from_json
from tests.devices.second import DEVICE, far, move_, near, second_device

MICROSECONDS = {Route.TORCH: 100, Route.COMPILED: 110, Route.SEMI: 60, Route.BSR16: 30, Route.BSR32: 40}
FEW, SLOW = 16, 500
"""Up to so many tokens the kernels take this long: dense code wins."""


class Machine:
    """A clock that the kernels move, and the calls of each."""

    def __init__(self) -> None:
        self.time, self.calls = 0.0, dict.fromkeys(Route, 0)

    def work(self, route: Route, tokens: int) -> None:
        self.calls[route] += 1
        few = tokens <= FEW and not route.dense
        self.time += (SLOW if few else MICROSECONDS[route]) * 1e-6


PLAIN_LINEAR = functional.linear


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """The second device with kernels, each of which computes `F.linear` of its own operand."""
    machine = Machine()

    def dense(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        machine.work(Route.TORCH, x.numel() // x.shape[-1])
        return PLAIN_LINEAR(x, weight, bias)

    def kernel(route: Route, applies: Callable[[Tensor], bool]) -> AcceleratorKernel:
        def linear(x: Tensor, packed: Any, bias: Tensor | None) -> Tensor:
            machine.work(route, x.numel() // x.shape[-1])
            assert isinstance(packed, dict)
            return PLAIN_LINEAR(x, packed["weight"], bias)

        return AcceleratorKernel(applies, lambda weight: {"weight": weight.clone()}, linear)

    there = {
        Route.COMPILED: kernel(Route.COMPILED, lambda weight: True),
        Route.SEMI: kernel(Route.SEMI, is_two_of_four),
        Route.BSR16: kernel(Route.BSR16, lambda weight: block_density(weight, 16) <= accelerator.MOST_BLOCKS),
    }

    def kernels(device: torch.device) -> dict[Route, AcceleratorKernel]:
        return machine.kernels if device.type == DEVICE.type else {}

    machine.kernels = there  # type: ignore[attr-defined]
    monkeypatch.setattr(functional, "linear", dense)
    monkeypatch.setattr(accelerated, "kernels_of", kernels)
    with fake_clock(lambda: machine.time), second_device():
        yield machine


def two_of_four(weight: Tensor) -> Tensor:
    pattern = torch.tensor([1.0, 0.0, 1.0, 0.0]).repeat(weight.shape[0], weight.shape[1] // 4)
    return weight * pattern.to(weight)


def in_blocks(weight: Tensor, block: int = 16) -> Tensor:
    mask = torch.zeros(weight.shape[0] // block, weight.shape[1] // block)
    mask.fill_diagonal_(1.0)
    return weight * mask.repeat_interleave(block, 0).repeat_interleave(block, 1).to(weight)


def net() -> nn.Sequential:
    """A layer in 2:4, one in blocks, one with scattered zeros, and a dense one."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(4))).eval()
    with torch.no_grad():
        model[0].weight.copy_(two_of_four(model[0].weight))
        model[1].weight.copy_(in_blocks(model[1].weight))
        model[2].weight.mul_(torch.rand(64, 64) > 0.5)
    return model


X = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))


def converted(model: nn.Module, x: Tensor = X) -> tuple[nn.Module, Sparsified]:
    result = pr.sparse(move_(model), far(x), seconds=1e-3)
    return result, pr.runtime.sparsified(result)


def test_each_layer_takes_the_fastest_operation_for_each_number_of_tokens(machine: Machine) -> None:
    model, expected = net(), net()(X)
    quick, record = converted(model)
    assert record.replaced == ("0", "1")
    tables = {name: dict(quick.get_submodule(name).table.entries) for name in record.replaced}
    assert {size: choice for size, choice in tables["0"].items() if size > FEW} == {32: Route.SEMI, 64: Route.SEMI}
    assert {size: choice for size, choice in tables["1"].items() if size > FEW} == {32: Route.BSR16, 64: Route.BSR16}
    assert all(choice is Route.TORCH for t in tables.values() for size, choice in t.items() if size <= FEW)
    assert "2:4 1.67x" in str(record) and "blocks of 16x16 3.33x" in str(record)
    by_name = {layer.name: layer for layer in record.layers}
    assert "no pattern" in by_name["2"].why and "hardly any zeros" in by_name["3"].why
    assert record.outcome.full_model is not None and record.outcome.full_model.faster
    torch.testing.assert_close(near(quick(far(X))), expected)


def test_the_operation_of_a_call_is_that_of_its_number_of_tokens(machine: Machine) -> None:
    quick, _ = converted(net())
    before = dict(machine.calls)
    with torch.inference_mode():
        quick(far(X))
        quick(far(X[:1]))
    calls = {route: machine.calls[route] - before[route] for route in before}
    assert calls[Route.SEMI] == calls[Route.BSR16] == 1 and calls[Route.TORCH] == 6


def test_a_model_that_is_not_faster_stays_dense(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    for route in (Route.SEMI, Route.BSR16):
        monkeypatch.setitem(MICROSECONDS, route, 101)
    quick, record = converted(net())
    assert record.replaced == () and not any(isinstance(m, AcceleratedLinear) for m in quick.modules())
    assert "no kernel is faster" in record.layers[0].why


def test_compiled_dense_code_is_the_base_where_it_is_faster(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MICROSECONDS, Route.COMPILED, 50)
    _, record = converted(net())
    by_name = {layer.name: layer for layer in record.layers}
    assert by_name["0"].why and by_name["1"].why == ""  # 60 against 50, and 30 against 50
    assert by_name["1"].verdicts[-1].ratio is not None and by_name["1"].verdicts[-1].ratio.value == pytest.approx(5 / 3)


def test_a_kernel_that_computes_something_else_is_left_out(machine: Machine) -> None:
    kernels: Any = machine.kernels  # type: ignore[attr-defined]
    right = kernels[Route.SEMI]
    kernels[Route.SEMI] = replace(right, linear=lambda x, packed, bias: right.linear(x, packed, bias) * 1.1)
    _, record = converted(net())
    assert record.replaced == ("1",)


def test_a_kernel_that_fails_is_left_out_and_a_full_device_is_not(machine: Machine) -> None:
    kernels: Any = machine.kernels  # type: ignore[attr-defined]

    def failing(error: Exception) -> Callable[[Tensor], Any]:
        def pack(weight: Tensor) -> Any:
            raise error

        return pack

    kernels[Route.SEMI] = replace(kernels[Route.SEMI], pack=failing(RuntimeError("the shape is not supported")))
    assert converted(net())[1].replaced == ("1",)
    kernels[Route.SEMI] = replace(kernels[Route.SEMI], pack=failing(torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(torch.OutOfMemoryError):
        converted(net())


def test_a_full_model_with_other_outputs_is_refused(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerated, "LAYER_TOLERANCE", dict.fromkeys(accelerated.LAYER_TOLERANCE, 10.0))
    kernels: Any = machine.kernels  # type: ignore[attr-defined]
    right = kernels[Route.SEMI]
    kernels[Route.SEMI] = replace(right, linear=lambda x, packed, bias: right.linear(x, packed, bias) * 2)
    with pytest.raises(CheckFailed, match="differs"):
        converted(net())


def test_a_device_without_kernels_says_so(machine: Machine) -> None:
    machine.kernels = {}  # type: ignore[attr-defined]
    quick, record = converted(net())
    assert record.replaced == () and "there are no kernels for lazy" in record.layers[0].why
    assert "lazy" in str(record) and near(quick(far(X))).equal(near(move_(net())(far(X))))


def layer(machine: Machine, route: Route = Route.SEMI) -> AcceleratedLinear:
    weight = two_of_four(torch.randn(16, 16))
    return AcceleratedLinear(far(weight), far(torch.randn(16)), table=Table(((1, route),)))


def test_operands_follow_their_weight_and_copies_have_their_own(machine: Machine) -> None:
    made, x = layer(machine), far(X[:, :16])
    with torch.no_grad():
        first = near(made(x))
    twin = copy.deepcopy(made)
    with torch.no_grad():
        made.weight.mul_(2.0)
    with torch.no_grad():
        torch.testing.assert_close(near(made(x)) - near(made.bias), 2 * (first - near(made.bias)))
        assert near(twin(x)).equal(first)
    assert machine.calls[Route.SEMI] == 3 and twin._packed is not made._packed
    assert pickle.loads(pickle.dumps(AcceleratedLinear(torch.ones(2, 2), None, table=made.table)))._packed == {}


def test_gradients_and_other_dtypes_run_dense_code(machine: Machine) -> None:
    made, x = layer(machine), far(X[:, :16])
    made(x.requires_grad_()).sum().backward()
    assert x.grad is not None and machine.calls[Route.SEMI] == 0
    with pytest.raises(RuntimeError):
        made(far(X[:, :16].double()))
    assert machine.calls[Route.SEMI] == 0


def test_such_a_model_is_not_saved_and_no_file_names_its_operations(machine: Machine, tmp_path: Any) -> None:
    quick, _ = converted(net())
    with pytest.raises(RequestError, match="not saved"):
        pr.runtime.save_sparse(quick, tmp_path / "quick")
    for route in Route:
        if not route.portable:
            with pytest.raises(BadInput, match="names a kernel"):
                from_json(route.value)


def test_patterns_are_told_by_their_zeros() -> None:
    weight = torch.randn(32, 64)
    assert is_two_of_four(two_of_four(weight)) and not is_two_of_four(weight)
    assert not is_two_of_four(torch.zeros(4, 6))
    one_more = two_of_four(weight).index_put((torch.tensor(3), torch.arange(8, 12)), torch.tensor([1.0, 1.0, 1.0, 0.0]))
    assert not is_two_of_four(one_more)
    assert block_density(in_blocks(weight), 16) == 0.25 and block_density(weight, 16) == 1.0
    assert block_density(in_blocks(weight), 24) == 1.0  # no whole number of blocks
    assert kernels_of(torch.device("cpu")) == {}


def test_the_kernels_of_cuda_take_what_they_are_for() -> None:
    there, half = accelerator._CUDA, torch.randn(32, 64).half()
    applies = {route for route, kernel in there.items() if kernel.applies(two_of_four(half))}
    assert applies == {Route.COMPILED, Route.SEMI}
    assert Route.SEMI not in {r for r, k in there.items() if k.applies(two_of_four(half.float()))}
    blocks = {r for r, k in there.items() if k.applies(in_blocks(half))}
    assert blocks == {Route.COMPILED, Route.BSR16, Route.BSR32}  # a half of those of 32x32 is in use
    packed = there[Route.BSR16].pack(in_blocks(half.float()))
    assert packed.layout is torch.sparse_bsr and packed.to_dense().equal(in_blocks(half.float()))


def test_every_operation_has_a_name_in_the_record() -> None:
    names = [describe(route) for route in Route]
    assert len(set(names)) == len(names)
