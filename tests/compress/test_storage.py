"""Storage formats: bytes by formula, lossless, and broken parts refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import prunella as pr
from prunella.compress.storage import StorageFormat, best_format, decode, encode, stored_bytes
from prunella.errors import BadInput, RequestError


def sparse(rows: int, cols: int, density: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """A matrix with exactly so many values that are not zero."""
    generator = torch.Generator().manual_seed(0)
    flat = torch.zeros(rows * cols)
    flat[torch.randperm(rows * cols, generator=generator)[: round(density * rows * cols)]] = 1
    return (flat * (1 + torch.rand(rows * cols, generator=generator) * 5)).view(rows, cols).to(dtype)


def test_compressed_rows_break_even_at_half() -> None:
    dense = 64 * 256 * 4
    at_half = stored_bytes(sparse(64, 256, 0.5), StorageFormat.CSR)
    assert at_half == dense + 4 * 65  # the starts of the rows are all that is more
    assert (
        stored_bytes(sparse(64, 256, 0.49), StorageFormat.CSR)
        < dense
        < stored_bytes(sparse(64, 256, 0.51), StorageFormat.CSR)
    )
    assert stored_bytes(sparse(64, 256, 0.25), StorageFormat.COO) == 64 * 256 // 4 * 12


def test_a_bitmask_costs_one_in_thirty_two() -> None:
    for density in (0.0, 0.3, 1.0):
        weight = sparse(32, 64, density)
        assert stored_bytes(weight, StorageFormat.BITMASK) == int((weight != 0).sum()) * 4 + 32 * 64 * 4 // 32


@pytest.mark.parametrize(("dtype", "part"), [(torch.float32, 0.53125), (torch.float16, 0.5625), (torch.int8, 0.625)])
def test_two_of_four_take_these_parts_of_dense(dtype: torch.dtype, part: float) -> None:
    weight = (torch.arange(1, 513).view(8, 64) % 100 + 1).to(dtype)
    weight = weight * pr.NM(2, 4).mask(weight.float())
    stored = encode(weight, StorageFormat.TWO_OF_FOUR)
    assert stored.nbytes == part * 8 * 64 * weight.element_size()
    assert decode(stored).equal(weight)


@pytest.mark.parametrize("form", list(StorageFormat))
@pytest.mark.parametrize("shape", [(1, 4), (5, 8), (7, 12), (6, 4, 3, 3)])
@pytest.mark.parametrize("density", [0.0, 0.2, 1.0])
def test_every_format_gives_back_every_bit(form: StorageFormat, shape: tuple[int, ...], density: float) -> None:
    columns = torch.Size(shape[1:]).numel()
    weight = sparse(shape[0], columns, density).view(shape)
    if form is StorageFormat.TWO_OF_FOUR:
        weight = (weight.flatten(1) * pr.NM(2, 4).mask(weight.flatten(1).abs())).view(shape)
    assert decode(encode(weight, form)).equal(weight)
    assert best_format(weight) in StorageFormat


def test_ragged_blocks_and_vectors() -> None:
    weight = sparse(6, 9, 0.3)
    stored = encode(weight, StorageFormat.BSR)
    assert decode(stored).equal(weight) and stored.parts["values"].shape[1:] == (4, 4)
    assert decode(encode(weight[0], StorageFormat.CSR)).equal(weight[0])


def test_the_best_format_is_the_smallest() -> None:
    assert best_format(torch.ones(8, 8)) is StorageFormat.DENSE
    assert best_format(sparse(64, 256, 0.01)) in (StorageFormat.CSR, StorageFormat.COO)
    assert best_format(sparse(64, 256, 0.6)) is StorageFormat.BITMASK
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    pr.apply_(model, pr.plan(model, torch.ones(1, 64), pr.Recipe(pr.magnitude, pr.NM(2, 4))))
    weight = model.get_parameter("0.weight")
    assert best_format(weight) is StorageFormat.BITMASK
    assert stored_bytes(weight, StorageFormat.BITMASK) == 64 * 64 * 2 + 64 * 64 // 8


@pytest.mark.parametrize(
    ("form", "name", "value"),
    [
        (StorageFormat.CSR, "cols", torch.full((12,), 99, dtype=torch.int32)),
        (StorageFormat.CSR, "cols", torch.full((12,), -1, dtype=torch.int32)),
        (StorageFormat.CSR, "cols", torch.zeros(3, dtype=torch.int32)),
        (StorageFormat.CSR, "cols", torch.zeros(12, dtype=torch.int32)),
        (StorageFormat.CSR, "starts", torch.tensor([0, 9, 3, 4, 5, 12], dtype=torch.int32)),
        (StorageFormat.CSR, "starts", torch.tensor([0, 12], dtype=torch.int32)),
        (StorageFormat.COO, "rows", torch.arange(12, dtype=torch.int32).flip(0) % 5),
        (StorageFormat.COO, "cols", torch.zeros(12)),
        (StorageFormat.COO, "values", torch.zeros(12, 1)),
        (StorageFormat.CSR, "starts", torch.zeros(6, 1, dtype=torch.int32)),
        (StorageFormat.COO, "rows", torch.full((12,), 5, dtype=torch.int32)),
        (StorageFormat.BITMASK, "bits", torch.zeros(5, dtype=torch.uint8)),
        (StorageFormat.BITMASK, "bits", torch.zeros(2, dtype=torch.uint8)),
        (StorageFormat.BITMASK, "bits", torch.zeros(5, dtype=torch.int32)),
        (StorageFormat.BITMASK, "values", torch.zeros(12, dtype=torch.float16)),
        (StorageFormat.TWO_OF_FOUR, "bits", torch.zeros(5, dtype=torch.uint8)),
        (StorageFormat.BSR, "values", torch.zeros(4, 3, 3)),
        (StorageFormat.BSR, "cols", torch.full((4,), 7, dtype=torch.int32)),
        (StorageFormat.DENSE, "values", torch.zeros(7)),
    ],
)
def test_parts_that_contradict_each_other_are_refused(form: StorageFormat, name: str, value: Tensor) -> None:
    weight = sparse(5, 8, 0.3)
    if form is StorageFormat.TWO_OF_FOUR:
        weight = weight * pr.NM(2, 4).mask(weight)
    stored = encode(weight, form)
    with pytest.raises(BadInput):
        decode(replace(stored, parts={**stored.parts, name: value}))


def test_what_is_not_two_of_four_is_refused() -> None:
    with pytest.raises(RequestError, match="2:4"):
        encode(torch.ones(2, 4), StorageFormat.TWO_OF_FOUR)


def test_an_empty_weight_is_refused() -> None:
    with pytest.raises(RequestError, match="holds nothing"):
        encode(torch.ones(0, 4), StorageFormat.CSR)


@pytest.mark.parametrize("shape", [(), (0, 4), (-1, 4)])
def test_a_stored_shape_without_weights_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(BadInput, match="every size"):
        decode(replace(encode(torch.ones(1, 4), StorageFormat.CSR), shape=shape))


def test_nothing_beyond_the_last_weight_is_dropped_in_silence() -> None:
    weight = torch.ones(3, 3)
    bits, blocks = encode(weight, StorageFormat.BITMASK), encode(weight, StorageFormat.BSR)
    with pytest.raises(BadInput, match="go on after the last"):
        decode(replace(bits, parts={**bits.parts, "bits": torch.full((2,), 255, dtype=torch.uint8)}))
    with pytest.raises(BadInput, match="outside its shape"):
        decode(replace(blocks, parts={**blocks.parts, "values": torch.ones(1, 4, 4)}))
