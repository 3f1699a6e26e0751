"""The kernels in int8 for many tokens against exact sums of integers: every block, tier, tile and awkward shape."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from prunella.errors import NotSupported, PruningError, RequestError
from prunella.runtime.kernels import library
from prunella.runtime.kernels.config import DOT_ROWS, Activation, Config, Kind, Precision

pytestmark = pytest.mark.skipif(not library.available(), reason="the kernels were not built here")
TIERS = ("portable", "avx2", "avx512", "avx512bf16")
ROWS = {Kind.BLOCK4X4: 4, Kind.BLOCK2X4: 2, Kind.BLOCK1X4: 1}
SHAPES = [(1, 1, 1), (5, 7, 3), (33, 130, 70), (64, 64, 64), (50, 300, 129), (150, 1028, 17), (7, 0, 3), (0, 5, 2)]
ACTIVATIONS = {
    Activation.NONE: lambda y: y, Activation.RELU: functional.relu, Activation.GELU: functional.gelu,
    Activation.SILU: functional.silu, Activation.RELU6: functional.relu6, Activation.HARDSWISH: functional.hardswish,
}  # fmt: skip


@pytest.fixture(params=TIERS)
def tier(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param not in library.tiers():
        pytest.skip(f"this processor has no {request.param}: only {', '.join(library.tiers())}")
    library.use_tier(request.param)
    yield request.param
    library.use_tier()


@pytest.fixture(params=list(DOT_ROWS), ids=lambda kind: kind.value)
def kind(request: pytest.FixtureRequest) -> Kind:
    return request.param


def noise(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def sparse(rows: int, columns: int, density: float, seed: int) -> Tensor:
    keep = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed + 1)) < density
    return noise(rows, columns, seed) * keep


@dataclass(frozen=True)
class Codes:
    """Integers in float64, and the scales that they are multiplied by."""

    codes: Tensor
    scale: Tensor


def codes_of_weight(weight: Tensor) -> Codes:
    scale = weight.abs().amax(1) / 127 if weight.shape[1] else weight.new_zeros(len(weight))
    codes = (weight / scale.clamp_min(1e-38)[:, None]).round().clamp(-127, 127)
    return Codes(codes.double(), scale)


def codes_of_tokens(x: Tensor, scale: float = 0.0, zero: int = 0) -> Codes:
    """x as codes from 0 to 255 minus their zero, by the definition in prunella_dot.h."""
    nothing = x.new_zeros(len(x))
    high, low = (x.amax(1).clamp(min=0), x.amin(1).clamp(max=0)) if x.shape[1] else (nothing, nothing)
    scales = torch.full_like(high, scale) if scale else high / 255 - low / 255
    inverse = torch.where(scales > 0, 1 / scales, 0.0)
    zeros = torch.full_like(high, float(zero)) if scale else (-low * inverse).round()
    codes = ((x * inverse[:, None]).round() + zeros[:, None]).clamp(0, 255)
    return Codes((codes - zeros[:, None]).double(), scales)


def expected(weight: Tensor, x: Tensor) -> Tensor:
    w, t = codes_of_weight(weight), codes_of_tokens(x)
    return (t.codes @ w.codes.t()).float() * (w.scale * t.scale[:, None])


@pytest.mark.parametrize("tile", [1, 2, 3, 4])
@pytest.mark.parametrize("depth", [32, 4096])
def test_sums_of_codes_are_exact_in_every_tier(tier: str, kind: Kind, tile: int, depth: int) -> None:
    for number, (rows, columns, tokens) in enumerate(SHAPES):
        weight, x = sparse(rows, columns, 0.3, number), noise(tokens, columns, 99 + number) + 0.5
        packed = library.pack(weight, Config(kind, Precision.INT8, tile=tile, depth=depth))
        torch.testing.assert_close(library.linear(packed, x), expected(weight, x), rtol=3e-7, atol=1e-30)


def test_codes_that_are_integers_give_integers(tier: str, kind: Kind) -> None:
    """Scales of 1: y is the sum itself, bit for bit."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (70, 513), generator=generator).float()
    x = torch.randint(-100, 156, (45, 513), generator=generator).float()
    weight[:, 0], x[:, 1], x[:, 2] = 127, -100, 155
    y = library.linear(library.pack(weight, Config(kind, Precision.INT8)), x)
    assert torch.equal(y.double(), x.double() @ weight.double().t())


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("low", [0.0, -255.0])
def test_the_largest_sums_do_not_saturate(tier: str, kind: Kind, sign: float, low: float) -> None:
    """65536 columns of the largest codes: in 16 bits, and in a saturating instruction, they would."""
    weight, x = torch.full((5, 65536), sign * 127), torch.full((3, 65536), 255.0 + low)
    x[:, 0] = low if low else 255.0
    y = library.linear(library.pack(weight, Config(kind, Precision.INT8, depth=65536)), x)
    assert torch.equal(y, (x.double() @ weight.double().t()).float())


@pytest.mark.parametrize("activation", list(Activation), ids=lambda a: a.value)
def test_bias_residual_and_activation_come_after_the_scales(tier: str, activation: Activation) -> None:
    weight, x = sparse(37, 96, 0.5, 1), noise(21, 96, 2)
    bias, residual = noise(1, 37, 3)[0], noise(21, 37, 4)
    packed = library.pack(weight, Config(Kind.BLOCK2X4, Precision.INT8, tile=2))
    y = library.linear(packed, x, bias, residual, activation)
    wanted = ACTIVATIONS[activation](expected(weight, x) + bias + residual)
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=2e-6)


def test_a_calibrated_scale_holds_codes_to_their_range(tier: str, kind: Kind) -> None:
    weight, x = sparse(19, 60, 0.6, 5), 3 * noise(40, 60, 6)
    packed = library.pack(weight, Config(kind, Precision.INT8))
    w, t = codes_of_weight(weight), codes_of_tokens(x, 0.0125, 90)
    wanted = (t.codes @ w.codes.t()).float() * (w.scale * 0.0125)
    assert float((t.codes + 90).min()) == 0 and float((t.codes + 90).max()) == 255
    torch.testing.assert_close(library.calibrated_linear(packed, x, 0.0125, 90), wanted, rtol=3e-7, atol=1e-30)
    for scale, zero in ((float("nan"), 0), (float("inf"), 0), (1e-45, 0), (-1.0, 0), (0.0, 0), (1.0, -1), (1.0, 256)):
        with pytest.raises(RequestError, match="scale"):
            library.calibrated_linear(packed, x, scale, zero)


def test_every_number_of_threads_gives_the_same(tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = sparse(300, 200, 0.3, 7), noise(90, 200, 8)
    weight[:140] = 0
    packed = library.pack(weight, Config(Kind.BLOCK4X4, Precision.INT8, tile=2))
    for tokens in (1, 90):
        wanted = library.linear(packed, x[:tokens])
        for threads in (2, 3, 7):
            with monkeypatch.context() as patch:
                patch.setattr(library, "thread_count", lambda threads=threads: threads)
                assert torch.equal(library.linear(packed, x[:tokens]), wanted)


def test_all_zeros_give_the_bias(tier: str, kind: Kind) -> None:
    bias, config = noise(1, 6, 9)[0], Config(kind, Precision.INT8)
    nothing = library.pack(torch.zeros(6, 40), config)
    assert torch.equal(library.linear(nothing, noise(5, 40, 10), bias), bias.expand(5, 6))
    some = library.pack(noise(6, 40, 11), config)
    for x in (torch.zeros(5, 40), torch.full((5, 40), 1e-38)):
        assert torch.equal(library.linear(some, x, bias), bias.expand(5, 6))


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf"), 3.4e38])
@pytest.mark.parametrize("place", [(0, 0), (8, 39), (4, 38)])
def test_a_token_that_is_not_finite_is_left_to_dense_code(
    tier: str, kind: Kind, odd: float, place: tuple[int, int]
) -> None:
    packed, x = library.pack(noise(6, 40, 12), Config(kind, Precision.INT8)), noise(9, 40, 13)
    x[place] = odd
    assert library.finite_linear(packed, x, None, None, Activation.NONE) is None
    with pytest.raises(RequestError, match="NaN or infinity"):
        library.linear(packed, x)


def test_blocks_with_a_nonzero_are_stored_whole(kind: Kind) -> None:
    """Bytes: 4 a row and 2 for the place of each block, whatever number of its weights is zero."""
    full = torch.zeros(8, 64)
    full[:, ::4] = 1
    several = torch.ones(8, 64)
    config = Config(kind, Precision.INT8, depth=64)
    sizes = [library.pack(weight, config).nbytes for weight in (torch.zeros(8, 64), full, several)]
    blocks = 8 // ROWS[kind] * 16
    assert sizes[1] == sizes[2] == sizes[0] + blocks * (2 + 4 * ROWS[kind])


def test_what_no_kernel_has_is_refused(kind: Kind) -> None:
    with pytest.raises(NotSupported):
        library.pack(torch.ones(4, 4), Config(kind, Precision.FP32))
    with pytest.raises(RequestError):
        library.pack(torch.ones(1, 65537), Config(kind, Precision.INT8))
    for depth in (0, 2, 6, 65540):
        with pytest.raises(RequestError):
            library.pack(torch.ones(4, 4), Config(kind, Precision.INT8, depth=depth))
    for odd in (float("nan"), float("inf")):
        with pytest.raises(PruningError, match="int8"):
            library.pack(torch.full((4, 4), odd), Config(kind, Precision.INT8))
    with pytest.raises(RequestError):
        library.linear(library.pack(torch.ones(4, 4), Config(kind, Precision.INT8, tile=5)), torch.ones(1, 4))
