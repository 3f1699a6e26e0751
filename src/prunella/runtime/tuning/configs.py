"""Which kernels are worth a try for a weight: kinds and sizes that won when all were searched, tier by tier."""

from __future__ import annotations

from prunella.runtime.kernels import library as native
from prunella.runtime.kernels.library import Config, Kind, Precision

FEW_TOKENS = 8
"""Up to so many tokens a weight is read once and the kernels for decoding are worth a try."""


def configs(shape: tuple[int, int], density: float, tokens: int) -> tuple[Config, ...]:
    """Kernels worth trying for a weight (M, K) with this part of nonzeros and so many tokens, best guess first."""
    if not native.available() or tokens < 1 or not all(shape):
        return ()
    if tokens <= FEW_TOKENS:
        few = _few_configs(shape[1], density, tokens)
        return few if tokens == 1 else (*few, Config(Kind.ROWS, rows=4, tile=1, depth=512))
    wide = _wide()
    if density > 0.35:
        return _WIDE_MUCH if wide else _MUCH
    if density > 0.15:
        return _WIDE_SOME if wide else _SOME
    return _WIDE_LITTLE if wide else _LITTLE


_MUCH = tuple(
    Config(kind, rows=r, tile=t, depth=d)
    for kind, r, t, d in (
        (Kind.ROWS, 2, 4, 128), (Kind.ROWS, 2, 6, 64), (Kind.ROWS, 1, 8, 64), (Kind.ROWS, 4, 3, 256),
        (Kind.GROUPS, 4, 3, 512),
    )
)  # fmt: skip
_SOME = tuple(
    Config(Kind.ROWS, rows=r, tile=t, depth=d) for r, t, d in ((2, 4, 128), (4, 3, 256), (1, 8, 128), (2, 6, 64))
)
_LITTLE = tuple(
    Config(Kind.ROWS, rows=r, tile=t, depth=d) for r, t, d in ((2, 4, 256), (4, 3, 256), (2, 4, 512), (4, 2, 512))
)
_BLOCKS = ((0, 1024), (2, 128), (0, 512), (3, 256))
"""Four rows of sums fit 16 registers with two or three vectors of tokens, and 32 with more; 0: 16 rows as lanes."""
_WIDE_BLOCKS = ((2, 1024), (0, 1024), (3, 512), (4, 512), (2, 512))
_WIDE_MUCH = tuple(
    Config(kind, rows=r, tile=t, depth=d)
    for kind, r, t, d in (
        (Kind.GROUPS, 4, 4, 128), (Kind.GROUPS, 4, 4, 256), (Kind.GROUPS, 4, 8, 512), (Kind.GROUPS, 2, 8, 64),
        (Kind.GROUPS, 4, 6, 256), (Kind.ROWS, 2, 2, 128), (Kind.ROWS, 2, 8, 64),
    )
)  # fmt: skip
_WIDE_SOME = tuple(
    Config(kind, rows=r, tile=t, depth=d)
    for kind, r, t, d in (
        (Kind.ROWS, 2, 4, 128), (Kind.GROUPS, 4, 4, 128), (Kind.GROUPS, 2, 8, 64), (Kind.ROWS, 4, 4, 128),
        (Kind.GROUPS, 2, 8, 128), (Kind.GROUPS, 4, 8, 128), (Kind.ROWS, 2, 6, 128), (Kind.ROWS, 4, 2, 256),
    )
)  # fmt: skip
_WIDE_LITTLE = tuple(
    Config(Kind.ROWS, rows=r, tile=t, depth=d)
    for r, t, d in ((4, 3, 256), (4, 4, 128), (2, 4, 128), (4, 2, 512), (2, 6, 128), (4, 6, 128), (2, 2, 512))
)


def _wide() -> bool:
    """Whether the tier in use has 32 registers of 16 lanes."""
    return native.isa().startswith("avx512")


def block_configs(kind: Kind) -> tuple[Config, ...]:
    """Kernels worth trying for blocks of rows that share their columns."""
    sizes = _WIDE_BLOCKS if _wide() else _BLOCKS
    return tuple(Config(kind, tile=t, depth=d) for t, d in sizes if t or kind is Kind.BLOCK16)


def half_configs() -> tuple[Config, ...]:
    """Further kernels worth trying for many tokens in bfloat16: pairs, where the processor multiplies such at once."""
    if native.isa() != "avx512bf16":
        return ()
    sizes = ((4, 2, 512), (4, 4, 512), (4, 4, 256), (2, 4, 512), (4, 2, 1024), (4, 4, 1024))
    return tuple(Config(Kind.PAIRS, Precision.BF16, rows=r, tile=t, depth=d) for r, t, d in sizes)


def _few_configs(columns: int, density: float, tokens: int) -> tuple[Config, ...]:
    """One token of a dense enough weight is quickest with a bit a weight; else 16-bit columns are, where they reach."""
    bits, columns16 = Config(Kind.DECODE), Config(Kind.CSR)
    if columns > 1 << 16:
        return (bits,)
    if density < 0.12:
        return (columns16,)
    if _wide() and tokens == 1 and density > 0.16:  # an expand a cycle: columns were never quicker there
        return (bits,)
    return (bits, columns16) if tokens == 1 and density > 0.4 else (columns16, bits)
