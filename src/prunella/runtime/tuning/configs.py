"""The kernel configurations to try for a weight: those that won an exhaustive search, for each tier of instructions."""

from __future__ import annotations

from collections.abc import Mapping

from prunella.runtime.kernels import library
from prunella.runtime.kernels.config import Config, Kind, Precision

FEW_TOKENS = 8
"""The most tokens for which the kernels for decoding, which read a weight once, are tried."""


def kernel_configs(shape: tuple[int, int], density: float, tokens: int) -> tuple[Config, ...]:
    """The configurations to try for a weight (M, K) of this density and this number of tokens, best guess first."""
    if not library.available() or tokens < 1 or not all(shape):
        return ()
    if tokens <= FEW_TOKENS:
        few = _few_configs(shape[1], density, tokens)
        return few if tokens == 1 else (*few, Config(Kind.ROWS, rows=4, tile=1, depth=512))
    wide = _wide()
    if density > 0.35:
        return _WIDE_HIGH if wide else _HIGH
    if density > 0.15:
        return _WIDE_MEDIUM if wide else _MEDIUM
    return _WIDE_LOW if wide else _LOW


_HIGH = tuple(
    Config(kind, rows=r, tile=t, depth=d)
    for kind, r, t, d in (
        (Kind.ROWS, 2, 4, 128), (Kind.ROWS, 2, 6, 64), (Kind.ROWS, 1, 8, 64), (Kind.ROWS, 4, 3, 256),
        (Kind.GROUPS, 4, 3, 512),
    )
)  # fmt: skip
_MEDIUM = tuple(
    Config(Kind.ROWS, rows=r, tile=t, depth=d) for r, t, d in ((2, 4, 128), (4, 3, 256), (1, 8, 128), (2, 6, 64))
)
_LOW = tuple(
    Config(Kind.ROWS, rows=r, tile=t, depth=d) for r, t, d in ((2, 4, 256), (4, 3, 256), (2, 4, 512), (4, 2, 512))
)
_BLOCKS = ((0, 1024), (2, 128), (0, 512), (3, 256))
"""Tile and depth. The sums of four rows fit 16 registers with two or three vectors of tokens. Tile 0: rows as lanes."""
_WIDE_BLOCKS = ((2, 1024), (0, 1024), (3, 512), (4, 512), (2, 512))
_WIDE_HIGH = tuple(
    Config(kind, rows=r, tile=t, depth=d)
    for kind, r, t, d in (
        (Kind.GROUPS, 4, 4, 128), (Kind.GROUPS, 4, 4, 256), (Kind.GROUPS, 4, 8, 512), (Kind.GROUPS, 2, 8, 64),
        (Kind.GROUPS, 4, 6, 256), (Kind.ROWS, 2, 2, 128), (Kind.ROWS, 2, 8, 64),
    )
)  # fmt: skip
_WIDE_MEDIUM = tuple(
    Config(kind, rows=r, tile=t, depth=d)
    for kind, r, t, d in (
        (Kind.ROWS, 2, 4, 128), (Kind.GROUPS, 4, 4, 128), (Kind.GROUPS, 2, 8, 64), (Kind.ROWS, 4, 4, 128),
        (Kind.GROUPS, 2, 8, 128), (Kind.GROUPS, 4, 8, 128), (Kind.ROWS, 2, 6, 128), (Kind.ROWS, 4, 2, 256),
    )
)  # fmt: skip
_WIDE_LOW = tuple(
    Config(Kind.ROWS, rows=r, tile=t, depth=d)
    for r, t, d in ((4, 3, 256), (4, 4, 128), (2, 4, 128), (4, 2, 512), (2, 6, 128), (4, 6, 128), (2, 2, 512))
)


def _wide() -> bool:
    """Whether the tier in use has 32 registers of 16 lanes."""
    return library.isa().startswith("avx512")


def block_configs(kind: Kind) -> tuple[Config, ...]:
    """The configurations to try for blocks of rows that share their columns."""
    sizes = _WIDE_BLOCKS if _wide() else _BLOCKS
    return tuple(Config(kind, tile=t, depth=d) for t, d in sizes if t or kind is Kind.BLOCK16)


def half_configs() -> tuple[Config, ...]:
    """Further configurations for many tokens in bfloat16: pairs, where the processor multiplies two values at once."""
    if library.isa() != "avx512bf16":
        return ()
    sizes = ((4, 2, 512), (4, 4, 512), (4, 4, 256), (2, 4, 512), (4, 2, 1024), (4, 4, 1024))
    return tuple(Config(Kind.PAIRS, Precision.BF16, rows=r, tile=t, depth=d) for r, t, d in sizes)


_DOT_COST = {Kind.BLOCK4X4: 1.0, Kind.BLOCK2X4: 1.1, Kind.BLOCK1X4: 1.5}
"""Time of a stored weight in a block, relative to that of the largest block: a load serves all rows of a block."""
_DOT_SIZES = {Kind.BLOCK4X4: ((2, 4096), (2, 512)), Kind.BLOCK2X4: ((2, 4096), (2, 512)), Kind.BLOCK1X4: ((4, 512),)}
_WIDE_DOT_SIZES = ((4, 4096), (4, 512), (3, 512))


def dot_configs(kept: Mapping[Kind, float], columns: int, tokens: int) -> tuple[Config, ...]:
    """The configurations of int8 blocks to try, for the two blocks that promise most.

    kept: the fraction of the weights that blocks of each kind store.
    """
    if not library.available() or tokens <= FEW_TOKENS or not 0 < columns <= 1 << 16:
        return ()
    best = sorted(kept, key=lambda kind: kept[kind] * _DOT_COST[kind])[:2]
    sizes = {kind: _WIDE_DOT_SIZES if _wide() else _DOT_SIZES[kind] for kind in best}
    tried = ((kind, tile, depth) for kind in best for tile, depth in sizes[kind] if depth == 4096 or depth < columns)
    return tuple(Config(kind, Precision.INT8, tile=t, depth=d) for kind, t, d in tried)


def _few_configs(columns: int, density: float, tokens: int) -> tuple[Config, ...]:
    """A bit for each weight is fastest for one token of a dense weight; otherwise 16-bit columns are, up to 65536."""
    bitmap, columns16 = Config(Kind.DECODE), Config(Kind.CSR)
    if columns > 1 << 16:
        return (bitmap,)
    if density < 0.12:
        return (columns16,)
    if _wide() and tokens == 1 and density > 0.16:  # one expand instruction a cycle: columns were never faster
        return (bitmap,)
    return (bitmap, columns16) if tokens == 1 and density > 0.4 else (columns16, bitmap)
