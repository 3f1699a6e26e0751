"""Solvers take products of float32, although a program has allowed shorter numbers for them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import prunella as pr
from prunella.model import device
from prunella.model.device import full_float32


@pytest.fixture
def shortened() -> Iterator[None]:
    """What `torch.set_float32_matmul_precision("medium")` allows: TF32 on CUDA, bfloat16 on some CPUs."""
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


def precisions() -> list[str]:
    return [backend.fp32_precision for backend in device._products()]


def test_inside_they_are_whole_and_then_as_the_program_has_set_them(shortened: None) -> None:
    before = precisions()
    assert {"tf32", "bf16"} <= set(before)
    with full_float32():
        assert not {"tf32", "bf16"} & set(precisions())
    assert precisions() == before and torch.get_float32_matmul_precision() == "medium"
    with pytest.raises(KeyError), full_float32():
        raise KeyError
    assert precisions() == before


def test_a_program_that_allows_nothing_is_left_alone() -> None:
    torch.backends.mkldnn.matmul.fp32_precision, before = "ieee", torch.backends.mkldnn.matmul.fp32_precision
    try:
        with full_float32():
            assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
        assert torch.backends.mkldnn.matmul.fp32_precision == "ieee"
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before


SOLVERS = ("admm", "alps", "sparsegpt", "refit", "prune_and_quantize")


@pytest.mark.parametrize("name", SOLVERS)
def test_each_solver_has_them(shortened: None, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    seen: list[set[str]] = []
    product = Tensor.__matmul__

    def matmul(one: Tensor, other: Tensor) -> Tensor:
        seen.append(set(precisions()))
        return product(one, other)

    torch.manual_seed(0)
    x, weight = torch.randn(64, 8), torch.randn(4, 8)
    gram = x.T @ x
    monkeypatch.setattr(Tensor, "__matmul__", matmul)
    solve = getattr(pr.solvers, name)
    solve(weight, gram, weight.abs() > weight.abs().median() if name == "refit" else pr.NM(2, 4))
    assert seen and not any({"tf32", "bf16"} & some for some in seen)
