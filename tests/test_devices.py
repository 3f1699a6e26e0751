"""Every tensor that the library makes says on which device: `docs/devices.md` has the rule.

Without `device=` a tensor lies where `torch.set_default_device` points, which is not where the library counts on it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import prunella

SOURCE = Path(prunella.__file__).parent
MAKERS = frozenset(
    "arange asarray as_tensor bartlett_window blackman_window empty empty_permuted empty_strided eye full "
    "hamming_window hann_window kaiser_window linspace logspace ones rand randint randn randperm range scalar_tensor "
    "sparse_bsc_tensor "
    "sparse_bsr_tensor sparse_compressed_tensor sparse_coo_tensor sparse_csc_tensor sparse_csr_tensor tensor "
    "tril_indices triu_indices zeros".split()
)
"""What torch makes on its default device."""
ON_THE_CPU = frozenset(("from_numpy", "frombuffer", "Generator"))
"""What torch makes on the CPU, whatever the default is: the memory of numpy, and generators without a device."""


def made(tree: ast.AST) -> Iterator[tuple[ast.Call, str]]:
    """The calls of `torch.name(...)`, with their names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            if isinstance(owner, ast.Name) and owner.id == "torch":
                yield node, node.func.attr


def without_device(text: str) -> list[tuple[int, str]]:
    """Line and text of each tensor that is made without `device=`, and of generators of another device."""
    tree = ast.parse(text)
    wrong = []
    for call, name in made(tree):
        given = {keyword.arg for keyword in call.keywords}
        if name in MAKERS and not given & {"device", None}:
            wrong.append((call.lineno, ast.unparse(call)))
        if name == "Generator" and (call.args or call.keywords):
            wrong.append((call.lineno, "a generator of a device: numbers are drawn on the CPU"))
    return wrong


def test_every_tensor_is_made_on_a_device_that_is_named() -> None:
    wrong = [
        f"{file.relative_to(SOURCE).as_posix()}:{line}: {call}: say device="
        for file in sorted(SOURCE.rglob("*.py"))
        for line, call in without_device(file.read_text(encoding="utf-8"))
    ]
    assert wrong == []


@pytest.mark.parametrize(
    "text",
    [
        "def f():\n    return torch.zeros(3)",
        "x = torch.tensor([1.0], dtype=torch.float64)",
        "field(default_factory=lambda: torch.ones(1, 1))\ndef f(): pass\nx = torch.arange(2)",
        "g = torch.Generator('cuda')",
    ],
)
def test_the_lint_finds_them(text: str) -> None:
    assert without_device(text)


@pytest.mark.parametrize(
    "text",
    [
        "x = torch.zeros(3, device=y.device)",
        "x = torch.zeros_like(y)",
        "g = torch.Generator()",
        "x = torch.ones(2, **like)",
    ],
)
def test_the_lint_leaves_the_others(text: str) -> None:
    assert not without_device(text)


def test_the_names_are_those_that_torch_makes_on_its_default_device() -> None:
    from torch.utils._device import _device_constructors

    names = {f.__name__ for f in _device_constructors() if getattr(torch, f.__name__, None) is f}
    assert names - MAKERS <= {"empty_quantized", "load"} | {n for n in names if not hasattr(torch, n)}
    assert not MAKERS & ON_THE_CPU
