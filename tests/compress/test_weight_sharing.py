from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

import prunella as pr
from prunella.compress.huffman import (
    LENGTH_BITS,
    canonical_codes,
    code_lengths,
    decode,
    huffman,
    positions,
    relative_index,
)
from prunella.compress.weight_sharing import CentroidInit, deep_compression_, share_weight
from prunella.errors import BadInput, RequestError


def _sparse(shape: tuple[int, ...], zeros: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) >= zeros)


# -- sharing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", CentroidInit)
@pytest.mark.parametrize("bits", [1, 2, 5])
@pytest.mark.parametrize("zeros", [0.0, 0.7])
def test_at_most_two_to_the_bits_values_beside_zero(start: CentroidInit, bits: int, zeros: float) -> None:
    weight = _sparse((20, 30), zeros)
    found = share_weight(weight, bits=bits, start=start, seed=3)
    shared = found.weight()
    assert torch.equal(shared == 0, weight == 0)
    assert len(shared[shared != 0].unique()) <= 2**bits and len(found.book) <= 2**bits
    assert torch.equal(share_weight(weight, bits=bits, start=start, seed=3).codes, found.codes)


@pytest.mark.parametrize("start", CentroidInit)
def test_every_weight_has_the_nearest_value_and_values_are_the_means(start: CentroidInit) -> None:
    weight = _sparse((15, 15), 0.5).double()
    found = share_weight(weight, bits=3, start=start)
    alive = weight[weight != 0]
    nearest = (alive[:, None] - found.book).abs().min(1).values
    torch.testing.assert_close((alive - found.weight()[weight != 0]).abs(), nearest, rtol=1e-12, atol=1e-12)
    for number, value in enumerate(found.book, start=1):
        assert weight[found.codes == number].mean().item() == pytest.approx(value.item(), rel=1e-9)


def test_k_means_by_hand_and_by_brute_force() -> None:
    found = share_weight(torch.tensor([1.0, 0.0, 2.0, 10.0, 12.0, -5.0]), bits=1)
    assert found.book.tolist() == pytest.approx([-2 / 3, 11.0])
    values = torch.tensor([0.3, 0.5, 1.1, 2.0, 2.2, 5.0, 5.5], dtype=torch.float64)
    best = min(
        sum(float((part - part.mean()).square().sum()) for part in (values[:a], values[a:b], values[b:c], values[c:]))
        for a, b, c in itertools.combinations(range(1, 7), 3)
    )
    density = share_weight(values, bits=2, start=CentroidInit.DENSITY)
    assert float((density.weight() - values).square().sum()) == pytest.approx(best, rel=1e-9)


def test_few_values_are_kept_as_they_are() -> None:
    weight = torch.tensor([[0.5, 0.0, -1.5], [0.5, 2.0, -1.5]])
    for start in CentroidInit:
        assert torch.equal(share_weight(weight, bits=5, start=start).weight(), weight)
    assert torch.count_nonzero(share_weight(torch.zeros(3, 3)).weight()) == 0
    assert torch.equal(share_weight(torch.tensor([-1.0, 1.0]), bits=1).weight(), torch.tensor([-1.0, 1.0]))


# -- codes -----------------------------------------------------------------------------------------------------------


def test_huffman_by_hand() -> None:
    """Counts 5, 2, 1, 1: codes 0, 10, 110, 111; 5 + 4 + 3 + 3 = 15 bits."""
    symbols = torch.tensor([0, 1, 0, 2, 0, 0, 3, 1, 0])
    found = huffman(symbols, symbol_bits=2)
    assert dict(found.lengths) == {0: 1, 1: 2, 2: 3, 3: 3} and canonical_codes(found.lengths) == {
        0: 0,
        1: 2,
        2: 6,
        3: 7,
    }
    assert found.payload_bits == 15 and found.bits == 15 + 4 * (2 + LENGTH_BITS)
    assert found.payload == bytes([0b01001100, 0b01111000])
    assert torch.equal(decode(found), symbols)


@pytest.mark.parametrize("seed", range(5))
def test_decoding_gives_back_every_symbol_and_the_length_is_near_the_entropy(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    symbols = (torch.randn(3000, generator=generator) * 2 ** (seed + 1)).abs().long().clamp_max(255)
    found = huffman(symbols)
    assert torch.equal(decode(found), symbols)
    p = torch.unique(symbols, return_counts=True)[1].double() / len(symbols)
    entropy = -float((p * p.log2()).sum())
    assert entropy - 1e-9 <= found.payload_bits / len(symbols) < entropy + 1
    assert sum(2.0**-length for length in found.lengths.values()) == 1.0


def test_no_prefix_code_is_shorter() -> None:
    """All lengths up to 5 for 5 symbols that a prefix code can have (Kraft): Huffman's total is the least."""
    for counts in ([9, 4, 2, 1, 1], [3, 3, 3, 2, 1], [1, 1, 1, 1, 1]):
        lengths = code_lengths(dict(enumerate(counts)))
        best = min(
            sum(c * n for c, n in zip(counts, some, strict=True))
            for some in itertools.product(range(1, 6), repeat=5)
            if sum(2.0**-n for n in some) <= 1
        )
        assert sum(counts[s] * n for s, n in lengths.items()) == best


def test_edges_of_huffman() -> None:
    for symbols in (torch.zeros(0, dtype=torch.int64), torch.full((9,), 7), torch.tensor([[1, 0], [0, 1]])):
        assert torch.equal(decode(huffman(symbols)), symbols.flatten())
    skewed = torch.cat([torch.full((2**i,), i) for i in range(14)])
    found = huffman(skewed)
    assert max(found.lengths.values()) == 13 and torch.equal(decode(found), skewed)
    with pytest.raises(RequestError, match="do not fit"):
        huffman(torch.tensor([4]), symbol_bits=2)
    with pytest.raises(RequestError, match="do not fit"):
        huffman(torch.tensor([-1]))
    cut = huffman(torch.arange(50))
    from dataclasses import replace

    with pytest.raises(BadInput, match="cut short"):
        decode(replace(cut, payload=cut.payload[:-4]))
    with pytest.raises(BadInput, match="not a Huffman code"):
        decode(replace(huffman(torch.full((9,), 7)), payload=b"\xff\xff"))


def test_gaps_by_hand() -> None:
    """Positions 1, 4 and 15 with two bits: 2, 3 and 11 = 4 + 4 + 3 places."""
    mask = torch.zeros(16, dtype=torch.bool)
    mask[[1, 4, 15]] = True
    found = relative_index(mask, bits=2)
    assert found.steps.tolist() == [1, 2, 3, 3, 2] and found.filler.tolist() == [False, False, True, True, False]
    assert torch.equal(positions(found), mask)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("kept", [0.0, 0.02, 0.5, 1.0])
def test_gaps_give_the_mask_back(bits: int, kept: float) -> None:
    mask = torch.rand(13, 17, generator=torch.Generator().manual_seed(0)) < kept
    found = relative_index(mask, bits=bits)
    assert (torch.equal(positions(found), mask) and not len(found.steps)) or int(found.steps.max()) < 2**bits
    assert torch.equal(positions(found), mask)


# -- all of it -------------------------------------------------------------------------------------------------------


def test_deep_compression_stores_exactly_what_the_model_holds() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 40), nn.ReLU(), nn.Linear(40, 5))
    x = torch.randn(2, 3, 6, 6)
    pr.apply_(net, pr.plan(net, x, pr.Recipe(granularity=pr.Element()), target=pr.Sparsity(0.9)))
    masks = pr.masks_of(net)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    found = deep_compression_(net, bits=4, gap_bits=3)
    assert [layer.name for layer in found.layers] == ["0.weight", "3.weight", "5.weight"]
    for layer in found.layers:
        weight = net.get_parameter(layer.name)
        assert torch.equal(layer.weight(), weight)
        assert torch.equal(weight != 0, masks[layer.name]) and len(weight[weight != 0].unique()) <= 16
        error = (weight - before[layer.name]).norm() / before[layer.name].norm()
        assert layer.error == pytest.approx(float(error.detach()), rel=1e-4) and 0 < layer.error < 0.2
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters() if "bias" in n)
    bits = sum(layer.values.payload_bits + layer.gaps.payload_bits for layer in found.layers)
    bits += sum(32 * len(layer.book) for layer in found.layers)
    bits += sum(
        len(e.lengths) * (e.symbol_bits + LENGTH_BITS) for layer in found.layers for e in (layer.values, layer.gaps)
    )
    bits += 32 * (8 + 40 + 5)
    assert found.bytes == math.ceil(bits / 8)
    assert found.ratio == pytest.approx(sum(p.numel() for p in net.parameters()) * 4 / found.bytes)
    assert found.ratio > 15 and "times smaller" in str(found)


def test_the_codes_of_a_sparse_layer_are_worth_their_book() -> None:
    """At 90 % zeros a weight takes less than the 5 + 4 bits of its code and gap, and far less than 32."""
    net = nn.Linear(200, 200, bias=False)
    with torch.no_grad():
        net.weight.copy_(_sparse((200, 200), 0.9))
    found = deep_compression_(net, bits=5, gap_bits=4)
    assert found.layers[0].bits < 9 * int(torch.count_nonzero(net.weight)) * 1.2 + 32 * 32
    assert found.ratio > 30


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(RequestError, match="bits=9"):
        share_weight(torch.ones(2), bits=9)
    with pytest.raises(RequestError, match="bits=0"):
        relative_index(torch.ones(2, dtype=torch.bool), bits=0)
    with pytest.raises(RequestError, match="names no weight"):
        deep_compression_(nn.Linear(2, 2), only=["bias"])
