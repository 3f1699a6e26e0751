"""What decides a result: each change is seen and named, and every process finds the same digests."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial, wraps
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import prunella as pr
from prunella.errors import NotSupported
from prunella.io import contents, identity
from prunella.io.identity import Identity, digest_of, identify, model_parts


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(2, 3, 4, 4, generator=generator), torch.tensor([k, 1])) for k in range(3)]


def images() -> list[Tensor]:
    return [x for x, _ in batches()]


def accuracy(model: nn.Module) -> float:
    return float(model(batches()[0][0]).argmax(1).float().mean())


def twice(model: nn.Module) -> float:
    return float(model(batches()[0][0]).argmax(1).float().sum())


def asked(model: nn.Module | None = None, **changed: object) -> Identity:
    """An identity with all parts."""
    parts = {"data": batches(), "recipe": pr.Recipe(pr.magnitude, pr.Element()), "metric": accuracy, "seed": 0}
    return identify({**model_parts(model or net()), **parts, **changed})


def edited(edit: Callable[[Any], object]) -> nn.Module:
    """A network that was changed in one place."""
    model = net()
    with torch.no_grad():
        edit(model)
    return model


def masked() -> nn.Module:
    return pr.apply_(
        net(), pr.plan(net(), batches()[0][0], pr.Recipe(pr.magnitude, pr.Element()), target=pr.Sparsity(0.5))
    )


CHANGED: dict[str, tuple[Callable[[], Identity], tuple[str, ...]]] = {
    "the last weight": (lambda: asked(edited(lambda m: m[4].weight[-1, -1].add_(1e-6))), ("weights",)),
    "the sign of a zero": (lambda: asked(edited(lambda m: m[0].bias.mul_(-1))), ("weights",)),
    "frozen": (lambda: asked(edited(lambda m: m[4].bias.requires_grad_(False))), ("weights",)),
    "a buffer": (lambda: asked(edited(lambda m: m[1].running_mean.add_(1))), ("buffers",)),
    "a stride": (lambda: asked(edited(lambda m: setattr(m[0], "stride", (2, 2)))), ("structure",)),
    "a class": (lambda: asked(edited(lambda m: m.__setitem__(2, nn.GELU()))), ("structure",)),
    "a mode": (lambda: asked(edited(lambda m: m[1].eval())), ("mode",)),
    "masks": (lambda: asked(masked()), ("weights", "masks")),
    "data": (lambda: asked(data=[*batches()[:2], (batches()[2][0] + 1e-6, batches()[2][1])]), ("data",)),
    "the order of the data": (lambda: asked(data=batches()[::-1]), ("data",)),
    "a recipe": (lambda: asked(recipe=pr.Recipe(pr.magnitude, pr.Element(), min_density=0.1)), ("recipe",)),
    "a knob": (lambda: asked(recipe=pr.Recipe(partial(pr.criteria.group_norm, p=1))), ("recipe",)),
    "a metric": (lambda: asked(metric=twice), ("metric",)),
    "a seed": (lambda: asked(seed=1), ("seed",)),
    "a further part": (lambda: asked(loss=accuracy), ("loss",)),
}


@pytest.mark.parametrize("case", CHANGED)
def test_a_change_is_seen_and_named(case: str) -> None:
    make, names = CHANGED[case]
    base, other = asked(), make()
    assert asked() == base and asked().digest == base.digest != other.digest
    assert base.changed(other) == names


def test_versions_are_parts_and_a_clause_says_what_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    base = asked(seed=0, steps=5)
    monkeypatch.setattr(identity, "__version__", "9.9")
    monkeypatch.setattr(torch, "__version__", "9.8")
    other = asked(seed=3, steps=5, metric=twice)
    clause = base.difference(other)
    assert clause.startswith("its prunella version, torch version, metric and seed changed (prunella version: ")
    assert "torch version: " in clause and clause.endswith("now 9.8; seed: 0, now 3)") and "sha256" not in clause
    assert base.difference(base.plus({"metric": twice})) == "its metric changed"
    assert Identity({"a": "1", "b": "2"}).digest == Identity({"b": "2", "a": "1"}).digest


def test_wrappers_and_copies_are_the_same_model() -> None:
    model = net()
    assert model_parts(nn.DataParallel(model)) == model_parts(model) == model_parts(copy.deepcopy(model))
    tied, apart = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    apart.load_state_dict(tied.state_dict())
    assert model_parts(tied)["weights"] != model_parts(apart)["weights"]


PROCESS = "from tests.io.test_identity import everything; print(everything())"


def everything() -> str:
    """A digest over all kinds of values."""
    values = [
        {"b": 1, "a": [1.5, None, True, 2j, b"x", float("nan"), float("inf")]}, {"x", "y", "z", "long"},
        frozenset({1, 2}),
        np.arange(6.0).reshape(2, 3).T, np.float32(3), torch.float16, pr.criteria.wanda, pr.Recipe(), Path("a") / "b",
        partial(accuracy, model=None), DataLoader(TensorDataset(torch.arange(4)), batch_size=2),
        lambda x: x in {"p", "q"},
        torch.Generator().manual_seed(3), pr.search.agreement(net(), images()), range(3), "text", "t" * 500,
    ]  # fmt: skip
    return digest_of([values, asked().digest])


def test_another_process_finds_the_same_digest() -> None:
    root = Path(__file__).parents[2]
    for seed in ("1", "2"):  # of the hashes of texts, by which sets are ordered
        env = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", PROCESS], cwd=root, env=env, capture_output=True, text=True)
        assert done.stdout.strip() == everything(), done.stderr


# -- functions -----------------------------------------------------------------------------------------------------


def scaled(factor: float) -> Callable[[Tensor], Tensor]:
    def scale(x: Tensor) -> Tensor:
        return factor * x

    return scale


@dataclass(frozen=True)
class Judge:
    """A metric with data of its own."""

    factor: float
    data: Tensor

    def __call__(self, model: nn.Module) -> float:
        return self.factor

    def quality(self, model: nn.Module) -> float:
        return self.factor


class Counter:
    """Not a dataclass."""

    def __init__(self, start: int) -> None:
        self.start = start

    def quality(self, model: nn.Module) -> float:
        return self.start


def recursive(depth: int) -> Callable[[int], int]:
    def again(k: int) -> int:
        return again(k - 1) if k else depth

    return again


def commented(x: Tensor) -> Tensor:
    # as `plain`, but for this line
    return x + 1


def test_functions_are_told_apart_by_code_arguments_closures_and_what_they_are_bound_to() -> None:
    data = torch.ones(2)
    pairs: list[tuple[object, object]] = [
        (scaled(1.0), scaled(2.0)),
        (recursive(1), recursive(2)),
        (partial(accuracy, 1), partial(accuracy, 2)),  # type: ignore[arg-type]
        (Judge(1.0, data), Judge(2.0, data)),
        (Judge(1.0, data), Judge(1.0, data + 1)),
        (Judge(1.0, data).quality, Judge(2.0, data).quality),
        (Counter(1).quality, Counter(2).quality),
        (pr.search.agreement(net(), images()), pr.search.agreement(net(1), images())),
        (pr.search.agreement(net(), images()), pr.search.agreement(net(), images()[:1])),
        (lambda x: x + 1, lambda x: x + 2),
        (lambda x, k=1: x, lambda x, k=2: x),
        (lambda x: x.sum(), lambda x: x.mean()),
        (nn.Linear, nn.Conv2d), (torch.relu, torch.tanh), (np.exp, np.log), (len, sum),
        (wraps(accuracy)(lambda m: 0.0), twice),
    ]  # fmt: skip
    for one, other in pairs:
        assert digest_of(one) == digest_of(one) != digest_of(other), (one, other)
    assert digest_of(scaled(1.0)) == digest_of(scaled(1.0))
    assert digest_of(wraps(accuracy)(lambda m: twice(m))) == digest_of(accuracy)


def test_comments_and_places_do_not_count() -> None:
    space: dict[str, Any] = {"__name__": commented.__module__}
    exec("\n\n\ndef commented(x):\n    return x + 1\n", space)
    assert digest_of(space["commented"]) == digest_of(commented)


# -- data ----------------------------------------------------------------------------------------------------------


def test_loaders_are_known_by_their_dataset_and_other_objects_by_class_and_length() -> None:
    def loader(data: Any, **how: Any) -> str:
        return digest_of(DataLoader(data, **how))

    whole = TensorDataset(torch.arange(8.0))
    assert loader(whole, batch_size=2) == loader(TensorDataset(torch.arange(8.0)), batch_size=2)
    assert loader(whole, batch_size=2) != loader(TensorDataset(torch.arange(8.0) + 1), batch_size=2)
    others = [loader(whole, batch_size=4), loader(whole, batch_size=2, shuffle=True), loader(Subset(whole, [0, 1]))]
    assert len({loader(whole, batch_size=2), *others}) == 4
    assert loader(Subset(whole, [0, 1])) != loader(Subset(whole, [0, 2]))

    class Own:
        def __init__(self, size: int) -> None:
            self.size = size

        def __len__(self) -> int:
            return self.size

        def __getitem__(self, index: int) -> Tensor:
            return torch.zeros(1)

    assert loader(Own(3)) == loader(Own(3)) != loader(Own(4))
    assert digest_of(iter([1])) == digest_of(iter([2]))  # a handle: what it will give is not known


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_tensors_of_every_kind_and_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(0))
    kinds = [
        x, x.double(), x.bfloat16(), x.to(torch.float8_e4m3fn), x.to(torch.complex64), x > 0, x.long(), x[:, :, 0],
        x.mT, torch.zeros(()), torch.zeros(0, 3), torch.zeros(3, 0), x[0].to_sparse(),
        torch.empty(3, device="meta"), nn.Parameter(x[0]), x.to(torch.complex64).conj() + 1j,
    ]  # fmt: skip
    before = [digest_of(one) for one in kinds]
    assert len(set(before)) == len(kinds) and digest_of(x.mT.contiguous()) == digest_of(x.mT)
    monkeypatch.setattr(contents, "_CHUNK", 16)
    assert [digest_of(one) for one in kinds] == before
    sparse = x[0].to_sparse()
    sparse.values()[0] += 1
    assert digest_of(sparse) != digest_of(x[0].to_sparse())
    with pytest.raises(NotSupported, match="layout"):
        digest_of(x[0].to_sparse_csr())


def test_values_that_look_alike_are_told_apart() -> None:
    values: list[object] = [
        1, 1.0, True, "1", b"1", None, "None", [1], (1,), [[1]], {"a": 1}, [("a", 1)], {1}, ["ab", "c"], ["a", "bc"],
        "", [], (), {}, set(), np.array([1]), np.array([1], np.int8), torch.tensor([1]), torch.tensor(1), Path("1"),
        {"a": None}, Judge(1.0, torch.ones(1)), replace(Judge(1.0, torch.ones(1)), factor=2.0), pr.Channel(),
        pr.Element(),
    ]  # fmt: skip
    assert len({digest_of(value) for value in values}) == len(values)
    assert digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1})
