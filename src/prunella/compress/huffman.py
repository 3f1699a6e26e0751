"""Lossless codes: canonical Huffman codes for symbols, and short gaps for the positions of sparse weights."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from prunella.errors import BadInput, RequestError
from prunella.registry.method import compression
from prunella.types import Mask

LENGTH_BITS = 6
"""Bits for one code length in the code book."""


@dataclass(frozen=True)
class Encoded:
    """A sequence of small whole numbers in canonical Huffman code. `lengths`: symbol -> bits of its code.

    payload: the codes in sequence, first bit highest, the last byte padded. payload_bits: without the padding. count:
    number of symbols. symbol_bits: bits of a symbol in the code book.
    """

    payload: bytes
    payload_bits: int
    lengths: Mapping[int, int]
    count: int
    symbol_bits: int

    @property
    def book_bits(self) -> int:
        """Bits of the canonical code book: symbols and the lengths of their codes."""
        return len(self.lengths) * (self.symbol_bits + LENGTH_BITS)

    @property
    def bits(self) -> int:
        """Bits of the payload and the code book."""
        return self.payload_bits + self.book_bits


def code_lengths(counts: Mapping[int, int]) -> dict[int, int]:
    """Symbol -> bits of its Huffman code, for counts above 0; a single symbol has 1 bit. Equal counts, equal codes."""
    if len(counts) == 1:
        return dict.fromkeys(counts, 1)
    heap: list[tuple[int, int, tuple[int, ...]]] = [(count, symbol, (symbol,)) for symbol, count in counts.items()]
    heapq.heapify(heap)
    lengths = dict.fromkeys(counts, 0)
    while len(heap) > 1:
        (one, first, left), (other, second, right) = heapq.heappop(heap), heapq.heappop(heap)
        for symbol in (*left, *right):
            lengths[symbol] += 1
        heapq.heappush(heap, (one + other, min(first, second), (*left, *right)))
    return lengths


def canonical_codes(lengths: Mapping[int, int]) -> dict[int, int]:
    """Symbol -> code: by (length, symbol), each code is the previous one plus one, shifted to its length."""
    codes: dict[int, int] = {}
    code, before = 0, 0
    for symbol, length in sorted(lengths.items(), key=lambda item: (item[1], item[0])):
        code <<= length - before
        codes[symbol], before = code, length
        code += 1
    return codes


@compression(source="Huffman 1952, doi:10.1109/JRPROC.1952.273898; Han et al. 2016, arXiv:1510.00149")
def huffman(symbols: Tensor, *, symbol_bits: int = 8) -> Encoded:
    """Encode whole numbers with fewer bits for frequent ones; `decode` restores them exactly.

    The mean length L of a code lies in `H <= L < H + 1` with the entropy `H = -sum p log2 p`; no code with a whole
    number of bits for each symbol is shorter. The code book is canonical: only symbols and lengths are stored.

    symbols: whole numbers from 0 to `2^symbol_bits - 1`, any shape. symbol_bits: 1 to 16.

    Data: none.
    Errors: RequestError for symbols that do not fit.

    Example:

        >>> import torch, prunella as pr
        >>> encoded = pr.compress.huffman(torch.tensor([0, 0, 0, 1, 0, 2]))
        >>> pr.compress.decode(encoded).tolist()
        [0, 0, 0, 1, 0, 2]

    Use: storing or sending shared or quantized weights, whose values are far from uniform. Avoid: running the model
    from the codes: they cannot be read out of order.
    """
    flat = symbols.detach().cpu().flatten().long()
    if not 1 <= symbol_bits <= 16 or (len(flat) and not 0 <= int(flat.min()) <= int(flat.max()) < 2**symbol_bits):
        raise RequestError(
            f"symbols do not fit in {symbol_bits} bits", "whole numbers from 0 on are coded", "symbol_bits from 1 to 16"
        )
    if not len(flat):
        return Encoded(b"", 0, {}, 0, symbol_bits)
    values, counts = torch.unique(flat, return_counts=True)
    lengths = code_lengths(dict(zip(values.tolist(), counts.tolist(), strict=True)))
    codes = canonical_codes(lengths)
    table = np.zeros(2**symbol_bits, dtype=np.int64)
    sizes = np.zeros(2**symbol_bits, dtype=np.int64)
    for symbol, length in lengths.items():
        table[symbol], sizes[symbol] = codes[symbol], length
    symbol_array = flat.numpy()
    size = sizes[symbol_array]
    total = int(size.sum())
    ends = np.cumsum(size)
    where = np.repeat(np.arange(len(symbol_array)), size)
    depth = np.repeat(ends, size) - 1 - np.arange(total)  # bits of the code that follow this one
    bits = (table[symbol_array[where]] >> depth) & 1
    return Encoded(np.packbits(bits.astype(np.uint8)).tobytes(), total, lengths, len(symbol_array), symbol_bits)


def decode(encoded: Encoded) -> Tensor:
    """The symbols `(count,)`, decoded bit by bit. `BadInput` if the bytes end early or are not codes of the book.

    Example:

        >>> import torch, prunella as pr
        >>> encoded = pr.compress.huffman(torch.tensor([0, 0, 0, 1, 0, 2]))
        >>> pr.compress.decode(encoded).tolist()
        [0, 0, 0, 1, 0, 2]
    """
    by_code = {(encoded.lengths[s], code): s for s, code in canonical_codes(encoded.lengths).items()}
    longest = max(encoded.lengths.values(), default=0)
    symbols: list[int] = []
    code = length = 0
    for bit in np.unpackbits(np.frombuffer(encoded.payload, dtype=np.uint8)).tolist():
        if len(symbols) == encoded.count:
            break
        code, length = code << 1 | bit, length + 1
        symbol = by_code.get((length, code))
        if symbol is not None:
            symbols.append(symbol)
            code = length = 0
        elif length >= longest:
            raise BadInput("the bytes are not a Huffman code of this book", "a code has no symbol", "encode them again")
    if len(symbols) != encoded.count:
        raise BadInput(
            "the Huffman code is cut short", f"it has {len(symbols)} of {encoded.count} symbols", "copy it again"
        )
    return torch.tensor(symbols, dtype=torch.int64, device="cpu")


@dataclass(frozen=True)
class Gaps:
    """Positions as steps: entry `i` is `steps[i] + 1` after the previous entry. `filler` is True at filler entries."""

    steps: Tensor
    filler: Tensor
    shape: tuple[int, ...]
    bits: int


@compression(source="Han et al. 2016, arXiv:1510.00149 (relative indices with filler zeros)")
def relative_index(mask: Mask, *, bits: int = 4) -> Gaps:
    """Positions of the kept weights as gaps of a few bits; filler zeros bridge larger gaps.

    An entry lies 1 to `2^bits` positions after the previous one, in row-major order:
    `positions = cumsum(steps + 1) - 1`, without the fillers.

    mask: bool, True is kept. bits: 1 to 16; Deep Compression has 8 for convolutions and 5 for linear layers.

    Data: none.
    Errors: RequestError for bits out of range.

    Use: storage above about 70 % sparsity. Avoid: regular patterns, whose positions need fewer bits.
    """
    if not 1 <= bits <= 16:
        raise RequestError(f"bits={bits} is out of range", "a gap takes 1 to 16 bits", "4, 5 and 8 are usual")
    positions = mask.detach().cpu().flatten().nonzero()[:, 0]
    span = 2**bits
    gaps = torch.diff(positions, prepend=torch.tensor([-1], device="cpu"))
    bridges = (gaps - 1) // span
    repeats = bridges + 1
    steps = torch.full((int(repeats.sum()),), span - 1, dtype=torch.int64, device="cpu")
    last = repeats.cumsum(0) - 1
    steps[last] = gaps - 1 - bridges * span
    filler = torch.ones(len(steps), dtype=torch.bool, device="cpu")
    filler[last] = False
    return Gaps(steps, filler, tuple(mask.shape), bits)


def positions(gaps: Gaps) -> Mask:
    """The mask that `relative_index` encoded."""
    mask = torch.zeros(int(np.prod(gaps.shape)), dtype=torch.bool, device="cpu")
    mask[((gaps.steps + 1).cumsum(0) - 1)[~gaps.filler]] = True
    return mask.reshape(gaps.shape)
