"""Weight sharing by k-means, and Deep Compression: prune, share, Huffman."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from prunella.compress.huffman import Encoded, Gaps, decode, huffman, positions, relative_index
from prunella.errors import RequestError
from prunella.measure.text import byte_size
from prunella.model.unwrap import unwrap
from prunella.registry.method import compression

ROUNDS = 100


class CentroidInit(Enum):
    """The initial centroids of k-means."""

    LINEAR = "linear"
    """Equal steps from the smallest to the largest weight: large weights get their own centroids."""
    DENSITY = "density"
    """Equal numbers of weights for each centroid."""
    RANDOM = "random"
    """Random weights, by the seed."""


@dataclass(frozen=True)
class Shared:
    """A weight as codes of a book: 0 is zero, `i` is `book[i - 1]`. bits: the book has at most `2^bits` values."""

    codes: Tensor
    book: Tensor
    bits: int

    def weight(self) -> Tensor:
        """The decoded weight."""
        values = torch.cat([self.book.new_zeros(1), self.book])
        return values[self.codes]


@compression(source="Han et al. 2016, arXiv:1510.00149 (trained quantization: weight sharing)")
def share_weight(weight: Tensor, *, bits: int = 5, start: CentroidInit = CentroidInit.LINEAR, seed: int = 0) -> Shared:
    """Round the non-zero weights of a layer to at most `2^bits` values by k-means; zeros stay zeros.

    `min over values c and codes of sum (w - c[code])^2` by Lloyd's algorithm on the sorted weights, until convergence
    or for 100 rounds; the error never grows in a round. Each weight gets the nearest value, the lower one for ties.

    weight: any shape. bits: 1 to 8. start: the initial values; linear keeps large weights best. seed: of a random
    start.

    Data: none.
    Errors: RequestError for bits out of range.

    Example:

        >>> import torch, prunella as pr
        >>> weight = torch.tensor([[0.0, 1.0, 1.1], [2.0, 0.0, 2.1]])
        >>> len(pr.compress.share_weight(weight, bits=1).book)
        2

    Use: storing a pruned network in few bits, with `huffman`. Avoid: speed: every value needs a look-up; integers
    (`quantize_weight`) multiply faster.
    """
    if not 1 <= bits <= 8:
        raise RequestError(f"bits={bits} is out of range", "a book has 2 to 256 values", "bits from 1 to 8")
    flat = weight.detach().flatten()
    alive = flat != 0
    values = flat[alive].double().sort().values
    codes = torch.zeros(flat.shape, dtype=torch.int64, device=flat.device)
    if not len(values):
        return Shared(codes.reshape(weight.shape), flat.new_zeros(0), bits)
    book: Tensor = torch.unique(_lloyd(values, _first(values, 2**bits, start, seed)).to(flat.dtype))
    book = book[book != 0] if bool((book != 0).any()) else flat[alive][:1]
    middles = (book[1:] + book[:-1]) / 2
    codes[alive] = torch.searchsorted(middles, flat[alive]) + 1
    return Shared(codes.reshape(weight.shape), book, bits)


@dataclass(frozen=True)
class SharedStorage:
    """One stored layer: Huffman codes of the values and of the gaps between them, and the book of values.

    Fillers of long gaps have value 0. error: `|w - w'| / |w|` of sharing; all other steps are lossless.
    """

    name: str
    values: Encoded
    gaps: Encoded
    book: Tensor
    shape: tuple[int, ...]
    gap_bits: int
    error: float

    @property
    def bits(self) -> int:
        """Bits of all that decoding needs."""
        return self.values.bits + self.gaps.bits + self.book.numel() * self.book.element_size() * 8

    def weight(self) -> Tensor:
        """The decoded weight."""
        codes, steps = decode(self.values), decode(self.gaps)
        mask = positions(Gaps(steps, codes == 0, self.shape, self.gap_bits))
        full = self.book.new_zeros(self.shape)
        full[mask] = self.book[codes[codes > 0] - 1]
        return full


@dataclass(frozen=True)
class DeepCompression:
    """A network stored by Deep Compression. other_bits: bits of parameters without sharing: biases and norms."""

    layers: tuple[SharedStorage, ...]
    other_bits: int
    dense_bits: int

    @property
    def bytes(self) -> int:
        """Bytes of the stored network."""
        return -(-(sum(layer.bits for layer in self.layers) + self.other_bits) // 8)

    @property
    def ratio(self) -> float:
        """Bytes of the dense parameters, divided by the stored bytes."""
        return self.dense_bits / 8 / self.bytes

    def __str__(self) -> str:
        lines = [f"{byte_size(self.dense_bits / 8)} -> {byte_size(self.bytes)}, {self.ratio:.1f} times smaller"]
        lines += [f"{x.name}: {byte_size(x.bits / 8)}, {len(x.book)} values, error {x.error:.2%}" for x in self.layers]
        return "\n".join(lines)


@compression(source="Han et al. 2016, arXiv:1510.00149")
def deep_compression_(
    model: nn.Module,
    *,
    bits: int = 5,
    gap_bits: int = 4,
    start: CentroidInit = CentroidInit.LINEAR,
    seed: int = 0,
    only: Sequence[str] = ("*",),
) -> DeepCompression:
    """Share the weights of a pruned model in place, and store them as Huffman codes of values and of gaps.

    Every parameter with at least two axes gets at most `2^bits` non-zero values (`share_weight`). The positions of
    its non-zeros are gaps of `gap_bits` bits (`relative_index`), and `huffman` encodes both. `layer.weight()` decodes
    exactly the weight of the model. The size counts codes, code books, books of values, and all other parameters.

    bits: 1 to 8. gap_bits: 1 to 16. start, seed: of k-means. only: patterns of parameter names.

    Data: none.
    Errors: RequestError if `only` matches no weight.

    Use: sending a network over a slow line, at 80 % sparsity and more. Avoid: saving memory at run time: the network
    must be decoded first.
    """
    bare = unwrap(model)
    parameters = list(bare.named_parameters())
    chosen = [(n, p) for n, p in parameters if p.dim() > 1 and any(fnmatchcase(n, pattern) for pattern in only)]
    if not chosen:
        raise RequestError(
            f"only={list(only)!r} names no weight", "weights have two axes or more", "see named_parameters()"
        )
    shared = [share_weight(p, bits=bits, start=start, seed=seed) for _, p in chosen]
    layers = tuple(_store(n, p, x, gap_bits) for (n, p), x in zip(chosen, shared, strict=True))
    with torch.no_grad():
        for (_, parameter), sharing in zip(chosen, shared, strict=True):
            parameter.copy_(sharing.weight())
    names = {name for name, _ in chosen}
    other = sum(p.nbytes * 8 for n, p in parameters if n not in names)
    return DeepCompression(layers, other, sum(p.nbytes * 8 for _, p in parameters))


def _store(name: str, parameter: nn.Parameter, shared: Shared, gap_bits: int) -> SharedStorage:
    gaps = relative_index(shared.codes > 0, bits=gap_bits)
    values = torch.zeros(len(gaps.steps), dtype=torch.int64, device="cpu")
    codes = shared.codes.cpu().flatten()
    values[~gaps.filler] = codes[codes > 0]
    size = float(parameter.detach().double().norm())
    error = float((parameter.detach().double() - shared.weight().double()).norm()) / size if size else 0.0
    book_bits = max(1, len(shared.book).bit_length())
    return SharedStorage(
        name,
        huffman(values, symbol_bits=book_bits),
        huffman(gaps.steps, symbol_bits=gap_bits),
        shared.book.cpu(),
        tuple(parameter.shape),
        gap_bits,
        error,
    )


def _first(values: Tensor, count: int, start: CentroidInit, seed: int) -> Tensor:
    """The initial centroids of k-means, on sorted values."""
    if start is CentroidInit.LINEAR:
        return torch.linspace(float(values[0]), float(values[-1]), count, dtype=values.dtype, device=values.device)
    if start is CentroidInit.DENSITY:
        middles = (torch.arange(count, dtype=values.dtype, device="cpu") + 0.5) / count
        indices = (middles * len(values)).long().clamp_max(len(values) - 1)
    else:
        generator = torch.Generator().manual_seed(seed)
        indices = torch.randperm(len(values), generator=generator, device="cpu")[:count].sort().values
    return values[indices.to(values.device)]


def _lloyd(values: Tensor, book: Tensor) -> Tensor:
    """Lloyd's algorithm: each centroid becomes the mean of its nearest weights; one without weights does not move."""
    sums = torch.cat([values.new_zeros(1), values.cumsum(0)])
    for _ in range(ROUNDS):
        ends = torch.searchsorted(values, (book[1:] + book[:-1]) / 2, right=True)
        edges = torch.cat([ends.new_zeros(1), ends, ends.new_full((1,), len(values))])
        counts = edges.diff()
        means = torch.where(counts > 0, sums[edges].diff() / counts.clamp_min(1), book)
        if torch.equal(means, book):
            break
        book = means.sort().values
    ends = torch.searchsorted(values, (book[1:] + book[:-1]) / 2, right=True)
    used = torch.cat([ends.new_zeros(1), ends, ends.new_full((1,), len(values))]).diff() > 0
    return book[used]
