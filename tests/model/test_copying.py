"""A copy of a model, also where `copy.deepcopy` gives up."""

from __future__ import annotations

import multiprocessing
import queue
import sqlite3
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from io import IOBase
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import prunella as pr
from prunella.errors import NotSupported
from prunella.model.copying import copied, frozen_copy
from tests.graphs import mlp

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


class Recorder:
    """Holds what a hook saw, behind a lock."""

    def __init__(self) -> None:
        self.outputs: list[Tensor] = []
        self.lock = threading.Lock()

    def hook(self, module: nn.Module, args: Any, output: Tensor) -> None:
        with self.lock:
            self.outputs.append(output)


class Slotted:
    __slots__ = ("lock",)

    def __init__(self) -> None:
        self.lock = threading.RLock()


def cached(model: nn.Module, folder: Path) -> None:
    model.cache = model(X)


def nested(model: nn.Module, folder: Path) -> None:
    model.caches = {"deep": [(model(X), 1)]}


def on_a_layer(model: nn.Module, folder: Path) -> None:
    model.get_submodule("2").inner = model(X)


def locks(model: nn.Module, folder: Path) -> None:
    model.lock, model.again, model.event, model.slotted = (  # type: ignore[assignment]
        threading.Lock(), threading.RLock(), threading.Event(), Slotted(),
    )  # fmt: skip


def of_the_process(model: nn.Module, folder: Path) -> None:
    """Each exists once; also inside a container."""
    kept = [
        ThreadPoolExecutor(1), threading.local(), ContextVar("seen"), memoryview(b"abc"), multiprocessing.Lock(),
        sqlite3.connect(":memory:"), sys._getframe(), queue.SimpleQueue(),
    ]  # fmt: skip
    model.first, model.kept = kept[0], {"all": kept}  # type: ignore[assignment]


def an_open_file(model: nn.Module, folder: Path) -> None:
    model.log = (folder / "log").open("w")  # type: ignore[assignment]


def generators(model: nn.Module, folder: Path) -> None:
    model.dropout_rng, model.noise = torch.Generator(), (k for k in range(3))  # type: ignore[assignment]


def a_python_module(model: nn.Module, folder: Path) -> None:
    model.functional = torch.nn.functional  # type: ignore[assignment]


def a_hook_that_records(model: nn.Module, folder: Path) -> None:
    model.get_submodule("0").register_forward_hook(Recorder().hook)
    model(X)


def old_weight_norm(model: nn.Module, folder: Path) -> None:
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model.get_submodule("0"))
    model(X)


def new_weight_norm(model: nn.Module, folder: Path) -> None:
    parametrizations.weight_norm(model.get_submodule("0"))
    model(X)


CASES = (
    of_the_process,
    cached, nested, on_a_layer, locks, an_open_file, generators, a_python_module, a_hook_that_records, old_weight_norm,
    new_weight_norm,
)  # fmt: skip


@pytest.mark.parametrize("spoil", CASES)
def test_a_model_is_copied_whatever_it_holds(spoil: Callable[[nn.Module, Path], None], tmp_path: Path) -> None:
    model = mlp(8)
    spoil(model, tmp_path)
    replica = copied(model)
    assert torch.equal(replica(X), model(X)) and list(replica.state_dict()) == list(model.state_dict())
    assert not {p.data_ptr() for p in replica.parameters()} & {p.data_ptr() for p in model.parameters()}
    replica(X).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for p in replica.parameters())
    if "kept" in vars(model):
        assert all(a is b for a, b in zip(vars(replica)["kept"]["all"], vars(model)["kept"]["all"], strict=True))
    if isinstance(log := vars(model).get("log"), IOBase):
        assert vars(replica)["log"] is log
        log.close()


@pytest.mark.parametrize("spoil", [cached, locks, a_hook_that_records, of_the_process])
def test_verbs_take_such_a_model(spoil: Callable[[nn.Module, Path], None], tmp_path: Path) -> None:
    model, plain = mlp(8), mlp(8)
    spoil(model, tmp_path)
    plan = pr.plan(model, X, target=pr.Sparsity(0.5))
    assert torch.equal(pr.shrink(model, plan)(X), pr.shrink(plain, plan)(X))


def test_a_cached_tensor_is_a_value_of_its_own() -> None:
    model = mlp(8)
    model.cache = model(X)
    replica = copied(model)
    assert torch.equal(replica.cache, model.cache) and replica.cache is not model.cache  # type: ignore[arg-type]
    assert replica.cache.is_leaf and replica.cache.requires_grad and not model.cache.is_leaf


def test_a_lock_that_is_held_does_not_block_the_copy() -> None:
    model = mlp(8)
    model.lock = threading.Lock()  # type: ignore[assignment]
    with model.lock:  # type: ignore[union-attr]
        replica: Any = copied(model)
        assert replica.lock.acquire(blocking=False)


def test_what_is_held_twice_is_held_twice_in_the_copy() -> None:
    model = mlp(8)
    model.first = model.second = model(X)
    model[2].weight = model[4].weight
    replica = copied(model)
    assert replica.first is replica.second and replica.get_parameter("2.weight") is replica.get_parameter("4.weight")


def test_parametrizations_flags_and_ties_are_copied() -> None:
    model = mlp(8)
    parametrizations.weight_norm(model[0])
    model[2].weight.requires_grad_(False)
    model[1].eval()
    replica = copied(model)
    assert parametrize.is_parametrized(replica.get_submodule("0"))
    assert [p.requires_grad for p in replica.parameters()] == [p.requires_grad for p in model.parameters()]
    assert [m.training for m in replica.modules()] == [m.training for m in model.modules()]


def test_a_hook_of_the_copy_belongs_to_the_copy() -> None:
    model, recorder = mlp(8), Recorder()
    model[0].register_forward_hook(recorder.hook)
    model(X)
    copied(model)(X)
    assert len(recorder.outputs) == 1


def test_shared_tensors_are_used_as_they_are() -> None:
    model = mlp(8)
    replica = copied(model, shared=[model[0].weight])
    assert replica.get_parameter("0.weight") is model[0].weight
    assert replica.get_parameter("2.weight") is not model[2].weight


def test_in_inference_mode_the_copy_can_still_be_trained() -> None:
    model = mlp(8)
    with torch.inference_mode():
        replica = copied(model)
    replica(X).sum().backward()
    assert all(p.grad is not None for p in replica.parameters())


def test_a_frozen_copy_is_in_evaluation_mode_without_gradients() -> None:
    model = mlp(8)
    replica = frozen_copy(model)
    assert not replica.training and not any(p.requires_grad for p in replica.parameters())
    assert model.training and all(p.requires_grad for p in model.parameters())


class Stubborn:
    def __reduce_ex__(self, protocol: object) -> Any:
        raise TypeError("cannot be taken apart")


def test_what_cannot_be_copied_is_named() -> None:
    model = mlp(8)
    model[2].handle = {"deep": Stubborn()}
    with pytest.raises(NotSupported, match=r"attribute 2\.handle of the model cannot be copied") as caught:
        copied(model)
    assert "dict: cannot be taken apart" in caught.value.why and "__deepcopy__" in caught.value.todo
    model = mlp(8)
    model.handle = Stubborn()
    with pytest.raises(NotSupported, match="attribute handle of the model"):
        pr.shrink(model, pr.plan(mlp(8), X, target=pr.Sparsity(0.5)))
