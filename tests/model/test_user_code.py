"""Whose error it is: the user's own frames are shown, and what prunella itself does wrong stays a bug."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import prunella as pr
from prunella.errors import BadInput, PruningError, RequestError
from prunella.io.identity import digest_of
from prunella.model.user_code import as_user_function, call_user, number_of, raised_by_user, user_frames
from prunella.model.watch import Stop, Watch
from tests.graphs import mlp

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
MINE = """
import torch
from torch.nn.functional import cross_entropy

def helper(value):
    raise KeyError("label")

def loss(model, batch):
    return helper(model(batch))

def far(model, batch):
    return cross_entropy(model(batch), torch.full((2,), 99))

def batches():
    yield torch.randn(2, 4)
    helper(1)

class Data(torch.utils.data.Dataset):
    def __len__(self): return 4
    def __getitem__(self, index): return helper(index)
"""


@pytest.fixture
def mine(tmp_path: Path) -> ModuleType:
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    spec = importlib.util.spec_from_file_location("mine", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def raised(run: Any) -> BaseException:
    with pytest.raises(Exception) as caught:
        run()
    error = caught.value
    assert error.__traceback__ is not None
    error.__traceback__ = error.__traceback__.tb_next  # as prunella's command line catches it: not the test's own frame
    while error.__traceback__ and "prunella" not in error.__traceback__.tb_frame.f_code.co_filename:
        error.__traceback__ = error.__traceback__.tb_next
    return error


def taylor(loss: Any = None, data: Any = (X,), criterion: Any = pr.taylor) -> Any:
    return lambda: pr.plan(mlp(), X, pr.Recipe(criterion), target=pr.MACs(0.5), data=data, loss=loss)


def test_the_own_frames_of_a_loss_are_found_through_the_hooks_of_prunella(mine: ModuleType) -> None:
    error = raised(taylor(mine.loss))
    assert raised_by_user(error) and isinstance(error, KeyError)
    assert [frame.function for frame in user_frames(error)][:2] == ["helper", "loss"]
    assert 'raise KeyError("label")' in str(user_frames(error)[0])


def test_an_error_that_torch_raises_in_a_loss_is_the_users(mine: ModuleType) -> None:
    error = raised(taylor(mine.far))
    assert raised_by_user(error) and user_frames(error)[0].function == "far"


def test_an_iterator_and_a_dataset_in_another_process_are_the_users(mine: ModuleType) -> None:
    wanda = pr.criteria.activation_norm
    error = raised(taylor(data=mine.batches(), criterion=wanda))
    assert raised_by_user(error) and user_frames(error)[0].function == "helper"
    loader = torch.utils.data.DataLoader(mine.Data(), num_workers=1)
    error = raised(taylor(data=loader, criterion=wanda))
    assert raised_by_user(error) and "helper" in {frame.function for frame in user_frames(error)}


def test_what_prunella_raises_inside_a_call_of_the_user_is_a_bug() -> None:
    model = mlp()

    def broken(read: Any) -> None:
        raise ZeroDivisionError

    broken.__code__ = broken.__code__.replace(co_filename=pr.__file__)

    def run() -> None:
        with Watch([model[0].weight], broken) as watch:
            model(X)
            watch.finish()

    run.__code__ = run.__code__.replace(co_filename=pr.__file__)
    assert not raised_by_user(raised(run))


def test_a_boundary_tells_whose_error_it_is_and_lets_signals_pass() -> None:
    def fails(model: nn.Module) -> float:
        raise OSError("no such mood")

    def stops(model: nn.Module) -> float:
        raise Stop

    stops.__code__ = stops.__code__.replace(co_filename=pr.__file__)
    with pytest.raises(BadInput, match="the metric m:f failed") as caught:
        as_user_function(fails, "the metric m:f")(mlp())
    assert "no such mood" in caught.value.why and "in fails" in caught.value.why
    with pytest.raises(Stop):
        as_user_function(stops, "x")(mlp())
    with pytest.raises(BadInput, match="must be real number"):
        call_user(__import__("math").sqrt, "math:sqrt", mlp())
    assert digest_of(as_user_function(fails, "x")) == digest_of(fails)


NO_NUMBERS = [None, "good", "0.9", b"1", True, [1.0], {}, 1j, 10**400, torch.ones(2), torch.tensor(True)]
NO_NUMBERS += [torch.tensor(1j), np.bool_(True), np.array([1.0, 2.0]), torch.ones(0)]


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_a_metric_must_return_a_number(value: Any) -> None:
    with pytest.raises(RequestError, match="must return one number"):
        number_of(value, "metric=")
    space = pr.search.space(mlp(), X, pr.Recipe())
    with pytest.raises(RequestError, match="evaluate= must return one number"):
        pr.search.scan(space, lambda model: value, ratios=(0.5,))


def test_what_came_back_is_named() -> None:
    for value, named in ((None, "None"), (True, "True"), ("0.9", "the text '0.9'"), ([1.0], "a list")):
        with pytest.raises(RequestError, match=f"it returned {named}"):
            number_of(value, "metric=")
    with pytest.raises(RequestError, match=r"a Tensor of bool and shape \(\)"):
        number_of(torch.tensor(True), "metric=")


def _job(metric: Any) -> Any:
    from prunella.app.job import Job

    return Job(recipe=pr.Recipe(), target=pr.Params(0.5), metric=metric)


def test_a_metric_without_a_number_is_refused() -> None:
    with pytest.raises(RequestError, match="it returned an empty mapping"):
        _job(lambda model: {}).quality(mlp())
    with pytest.raises(RequestError, match="metric= for 'a' must return one number"):
        _job(lambda model: {"a": True}).quality(mlp())


def test_a_metric_names_the_same_numbers_for_every_model() -> None:
    from prunella.app.run import _check_names

    _check_names({"a": 1.0, "b": 2.0}, {"b": 1.0, "a": 2.0})
    with pytest.raises(RequestError, match="a, b of the dense model, a of the pruned one"):
        _check_names({"a": 1.0, "b": 2.0}, {"a": 1.0})


def test_numbers_of_any_type_are_taken() -> None:
    values = (
        1,
        torch.tensor(0.5),
        torch.tensor([2], dtype=torch.int8),
        torch.tensor(3.0, dtype=torch.bfloat16),
        np.float16(4),
    )
    assert [number_of(value, "metric=") for value in values] == [1.0, 0.5, 2.0, 3.0, 4.0]


def test_a_callback_that_raises_keeps_its_own_error() -> None:
    def stop(name: str, x: float, value: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pr.search.scan(pr.search.space(mlp(), X, pr.Recipe()), lambda model: 1.0, ratios=(0.5,), on_point=stop)


def test_a_typed_error_of_a_user_function_is_not_wrapped() -> None:
    def refuses(model: nn.Module) -> Tensor:
        raise PruningError("not today")

    with pytest.raises(PruningError, match="not today"):
        call_user(refuses, "m:f", mlp())
