"""What the user's code reads decides a result too: functions it calls, constants, classes; what it changes does not."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

from prunella.io.code import Reads, is_own
from prunella.io.identity import digest_of, model_parts

SOURCE = """
import os
import torch
from os import environ
from torch import nn

LIMIT, SCALES, TABLE, NAMES = 1.0, torch.ones(2), {"a": 1.0}, ("x",)
CALLS, SEEN, COUNT, CACHE = [], {}, 0, {}

def helper(x):
    return x * LIMIT

def metric(model):
    global COUNT
    COUNT += 1
    CALLS.append(model)
    SEEN["last"] = model
    return helper(model) * TABLE["a"] + sum(SCALES.tolist()) + len(NAMES)

def log():
    print(COUNT, CALLS, SEEN)
    return environ, os.sep, LIMIT

def loop(n):
    return other(n - 1) if n else 0

def other(n):
    return loop(n)

class Judge:
    best = 1.0

    def __init__(self, factor):
        self.factor, self.seen, self.count = factor, [], 0

    def quality(self, model):
        return self.more(model)

    def more(self, model):
        self.count += 1
        self.seen.append(model)
        return helper(model) * self.best

class Images:
    def __init__(self, images):
        self.images, self.cache, self.reads = images, {}, 0

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        self.reads += 1
        self.cache[index] = index
        return self.images[index] + 1

class Net(nn.Module):
    def forward(self, x):
        return self.act(x)

    def act(self, x):
        return helper(x)
"""


def module(old: str = "", new: str = "") -> Any:
    """The user's module, edited in one place."""
    assert old in SOURCE
    made = ModuleType("shop_of_code")
    exec(SOURCE.replace(old, new), vars(made))
    return made


def digests(user: Any) -> dict[str, str]:
    return {
        "metric": digest_of(user.metric),
        "method": digest_of(user.Judge(2.0).quality),
        "data": digest_of(DataLoader(user.Images([torch.ones(2)]), batch_size=1)),
        "structure": model_parts(user.Net())["structure"],
    }


CHANGED = {
    "a function that is called": ("return x * LIMIT", "return x * LIMIT + 1", {"metric", "method", "structure"}),
    "a constant that it reads": ("LIMIT, SCALES, TABLE, NAMES = 1.0", "LIMIT, SCALES, TABLE, NAMES = 2.0",
                                 {"metric", "method", "structure"}),
    "a tensor": ("torch.ones(2)", "torch.zeros(2)", {"metric"}),
    "a table": ('{"a": 1.0}', '{"a": 2.0}', {"metric"}),
    "names": ('("x",)', '("x", "y")', {"metric"}),
    "another method": ("return helper(model) * self.best", "return helper(model) + self.best", {"method"}),
    "a constant of a class": ("best = 1.0", "best = 2.0", {"method"}),
    "what an item is": ("self.images[index] + 1", "self.images[index] + 2", {"data"}),
    "a method of a model": ("return helper(x)", "return -helper(x)", {"structure"}),
    "what nobody reads": ("print(COUNT", "print(1, COUNT", set()),
    "a comment": ("def other", "# of loop\ndef other", set()),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGED)
def test_what_the_users_code_reads_is_a_part(case: str) -> None:
    old, new, wanted = CHANGED[case]
    before, after = digests(module()), digests(module(old, new))
    assert digests(module()) == before and {name for name in before if before[name] != after[name]} == wanted


def test_what_the_code_itself_changes_is_none() -> None:
    user = module()
    before, judge, images = digests(user), user.Judge(2.0), user.Images([torch.ones(2)])
    read, loader = digest_of(images), digest_of(DataLoader(images, batch_size=1))
    user.metric(3.0)
    assert list(DataLoader(images, batch_size=1)) and images.reads
    assert (
        digests(user) == before and digest_of(images) == read and digest_of(DataLoader(images, batch_size=1)) == loader
    )
    assert digest_of(user.Images([torch.zeros(2)])) != read and digest_of(judge) != digest_of(user.Judge(3.0))
    assert Reads().globals_of(user.log) == {"LIMIT": 1.0}  # neither what others change nor the state of the process


def test_functions_that_call_each_other_and_large_graphs_of_calls_end() -> None:
    assert digest_of(module().loop) == digest_of(module().loop) != digest_of(module().other)
    space: dict[str, Any] = {"__name__": "many"}
    calls = "\n".join(f"def f{k}(x):\n    return f{k + 1}(x) + f{k + 1}(x + 1) + f{k + 2}(x)" for k in range(60))
    exec(f"{calls}\ndef f60(x):\n    return x\ndef f61(x):\n    return x", space)
    assert digest_of(space["f0"]) == digest_of(space["f0"])


def test_modules_of_the_user_are_told_from_installed_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [is_own(name) for name in ("torch.nn", "prunella.plan", "json", "numpy", "pytest")] == [False] * 5
    assert is_own("tests.io.test_code") and is_own("made_up") and is_own(None)
    user, outer = module(), ModuleType("outer_of_code")
    monkeypatch.setitem(sys.modules, user.__name__, user)
    exec("import shop_of_code as shop\ndef metric(x):\n    return shop.helper(x) * shop.LIMIT", vars(outer))
    assert Reads().globals_of(outer.metric) == {"shop.LIMIT": 1.0, "shop.helper": user.helper}
    before = digest_of(outer.metric)
    user.LIMIT = 2.0
    assert digest_of(outer.metric) != before


def test_a_loader_counts_by_all_that_chooses_its_batches() -> None:
    data = TensorDataset(torch.arange(8.0))

    def loader(seed: int = 0, weights: tuple[float, ...] = (1.0, 1.0), collate: Any = None) -> str:
        generator = torch.Generator().manual_seed(seed)
        sampler = WeightedRandomSampler(weights, 4, generator=generator)
        whole = DataLoader(data, batch_size=2, sampler=sampler, generator=generator, collate_fn=collate)
        digest = digest_of(whole)
        assert list(whole) and digest_of(whole) == digest  # also after an epoch
        return digest

    assert loader() == loader()
    assert digest_of(DataLoader(data, batch_size=None)) != digest_of(DataLoader(data, batch_size=None, shuffle=True))
    assert len({loader(), loader(seed=1), loader(weights=(1.0, 2.0)), loader(collate=lambda rows: rows)}) == 4
