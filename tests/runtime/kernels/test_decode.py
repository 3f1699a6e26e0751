"""The kernels for a few tokens against the same sums in float64: every kind, precision, tier and awkward shape."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from prunella.errors import NotSupported, RequestError
from prunella.runtime.kernels import library
from prunella.runtime.kernels.config import Activation, Config, Kind, Precision
from prunella.runtime.tuning import configs

pytestmark = pytest.mark.skipif(not library.available(), reason="the kernels were not built here")
TIERS = ("portable", "avx2", "avx512", "avx512bf16")
CONFIGS = [
    *(Config(Kind.DECODE, precision) for precision in Precision),
    *(Config(Kind.CSR, precision) for precision in (Precision.FP32, Precision.BF16)),
]
SHAPES = [(1, 1), (3, 63), (17, 64), (5, 65), (33, 300), (16, 2049), (40, 4100), (0, 5), (5, 0), (0, 0)]
EXACT = 2e-6
"""Of the sum of absolute products: fp32 adds in another order."""
NAN, INF = float("nan"), float("inf")


@pytest.fixture(params=TIERS)
def tier(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param not in library.tiers():
        pytest.skip(f"this processor has no {request.param}: only {', '.join(library.tiers())}")
    library.use_tier(request.param)
    yield request.param
    library.use_tier()


@pytest.fixture(params=CONFIGS, ids=lambda c: f"{c.kind.value}-{c.precision.value}")
def config(request: pytest.FixtureRequest) -> Config:
    return request.param


def sparse(rows: int, columns: int, density: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    return weight * (torch.rand(rows, columns, generator=generator) < density)


def tokens(count: int, columns: int, seed: int) -> Tensor:
    return torch.randn(count, columns, generator=torch.Generator().manual_seed(seed))


def codes(matrix: Tensor) -> Tensor:
    """Rows as int8 times one scale each, in float64."""
    if matrix.shape[1] == 0:
        return matrix.double()
    scale = (matrix.abs().amax(1, keepdim=True) / 127).double()
    return torch.where(scale > 0, (matrix.double() / scale.clamp_min(1e-300)).round(), 0.0) * scale


def meant(weight: Tensor, x: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """Weight and x in float64, as the precision rounds them."""
    if config.precision is Precision.BF16:
        return weight.bfloat16().double(), x.double()
    if config.precision is Precision.INT8:
        return codes(weight), codes(x)
    return weight.double(), x.double()


def close(got: Tensor, weight: Tensor, x: Tensor, config: Config, tier: str) -> None:
    w, t = meant(weight, x, config)
    rounded = config == Config(Kind.DECODE, Precision.BF16) and tier == "avx512bf16"  # rounds x as well
    # A code of x that lies between two integers may go either way: one step of 127 of the largest, times one weight.
    slack = 2.0**-8 if rounded else 2e-4 if config.precision is Precision.INT8 else EXACT
    bound = slack * (t.abs() @ w.abs().T) + 1e-30
    assert got.dtype == torch.float32
    assert got.shape == bound.shape
    assert bool(((got.double() - t @ w.T).abs() <= bound).all())


@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0])
def test_every_shape_and_number_of_tokens(config: Config, tier: str, density: float) -> None:
    for shape in SHAPES:
        weight = sparse(*shape, density, seed=1)
        packed = library.pack(weight, config)
        assert packed.shape == shape
        assert packed.nnz == int((weight != 0).sum())
        for count in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 17):
            x = tokens(count, shape[1], seed=count)
            close(library.linear(packed, x), weight, x, config, tier)


def test_int8_is_exact(tier: str) -> None:
    """Integers up to 127 with 127 in every row and token have scale 1: every tier must give the very integer."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randint(-127, 128, (9, 5000), generator=generator).float()
    x = torch.randint(-127, 128, (8, 5000), generator=generator).float()
    weight[:, 0], x[:, 7] = 127, -127
    weight[:, 5::3] = 0
    got = library.linear(library.pack(weight, Config(Kind.DECODE, Precision.INT8)), x)
    assert torch.equal(got, (x.double() @ weight.double().T).float())


def test_int8_of_the_largest_codes_does_not_overflow(tier: str) -> None:
    weight, x = torch.full((2, 9000), -127.0), torch.full((3, 9000), 127.0)
    weight[1], x[1] = 127, -127
    got = library.linear(library.pack(weight, Config(Kind.DECODE, Precision.INT8)), x)
    assert torch.equal(got, (x.double() @ weight.double().T).float())


def test_rows_of_very_different_length_on_several_threads(config: Config, tier: str) -> None:
    weight = sparse(203, 517, 0.3, seed=4)
    weight[:100], weight[150] = 0, 1.5
    x, packed = tokens(5, 517, seed=5), library.pack(weight, config)
    one = library.linear(packed, x)
    close(one, weight, x, config, tier)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(library.linear(packed, x), one)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("activation", list(Activation))
def test_bias_residual_and_activation_come_after_the_sum(config: Config, activation: Activation) -> None:
    weight, x = sparse(21, 130, 0.4, seed=6), tokens(4, 130, seed=7)
    bias, residual = tokens(1, 21, seed=8)[0], tokens(4, 21, seed=9)
    packed = library.pack(weight, config)
    plain = library.linear(packed, x)
    after = {
        Activation.NONE: lambda y: y,
        Activation.RELU: torch.relu,
        Activation.GELU: torch.nn.functional.gelu,
        Activation.SILU: torch.nn.functional.silu,
        Activation.RELU6: torch.nn.functional.relu6,
        Activation.HARDSWISH: torch.nn.functional.hardswish,
    }[activation]
    torch.testing.assert_close(library.linear(packed, x, bias, residual, activation), after(plain + bias + residual))
    torch.testing.assert_close(library.linear(packed, x, bias), plain + bias)
    torch.testing.assert_close(library.linear(packed, x, None, residual), plain + residual)


@pytest.mark.parametrize("bad", [NAN, INF, -INF, 3.4e38])
def test_what_is_not_finite_meets_stored_weights_only(config: Config, tier: str, bad: float) -> None:
    weight = sparse(30, 200, 0.3, seed=10)
    weight[:, 77] = 0
    weight[3, 77] = 2.0
    weight[4] = 0
    x = tokens(6, 200, seed=11)
    clean = library.linear(library.pack(weight, config), x)
    x[2, 77] = bad
    got = library.linear(library.pack(weight, config), x)
    others = [row for row in range(6) if row != 2]
    assert torch.equal(got[others], clean[others])
    assert not got[2, 3].isfinite()
    quiet = [row for row in range(30) if row != 3]
    assert bool(got[2, quiet].isfinite().all())
    if config.precision is not Precision.INT8:
        close(got[2:3, quiet], weight[quiet], x[2:3].nan_to_num(0, 0, 0) if bad != 3.4e38 else x[2:3], config, tier)
    assert float(got[2, 4]) == 0.0


def test_the_short_way_is_the_same_and_refuses_what_is_not_finite(config: Config, tier: str) -> None:
    weight, x = sparse(30, 200, 0.3, seed=10), tokens(6, 200, seed=11)
    bias, residual = tokens(1, 30, seed=8)[0], tokens(6, 30, seed=9)
    packed = library.pack(weight, config)
    for more in ((None, None), (bias, None), (bias, residual)):
        for activation in Activation:
            short = library.finite_linear(packed, x.t().contiguous().t(), *more, activation)
            assert short is not None and torch.equal(short, library.linear(packed, x, *more, activation))
    for bad in (NAN, INF, -INF, 3.4e38):
        x[5, 199] = bad
        assert library.finite_linear(packed, x, bias, None, Activation.NONE) is None
    with pytest.raises(RequestError, match="residual"):
        library.finite_linear(packed, x, bias, residual[:5], Activation.NONE)


@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_weight_that_is_not_finite_reaches_its_row_only(config: Config, tier: str, bad: float) -> None:
    weight = sparse(8, 100, 0.5, seed=12)
    weight[5, 40] = bad
    if config.precision is Precision.INT8:
        with pytest.raises(RequestError, match="int8"):
            library.pack(weight, config)
        return
    got = library.linear(library.pack(weight, config), tokens(3, 100, seed=13))
    assert not got[:, 5].isfinite().any()
    assert bool(got[:, [0, 1, 2, 3, 4, 6, 7]].isfinite().all())


def test_negative_zero_is_no_weight(config: Config) -> None:
    packed = library.pack(torch.tensor([[-0.0, 1.0, 0.0]]), config)
    assert packed.nnz == 1
    assert library.linear(packed, torch.tensor([[NAN, 2.0, INF]])).item() == pytest.approx(2.0)


def test_tokens_do_not_depend_on_their_neighbors(config: Config, tier: str) -> None:
    weight, x = sparse(37, 700, 0.4, seed=14), tokens(8, 700, seed=15)
    packed = library.pack(weight, config)
    alone = torch.cat([library.linear(packed, x[i : i + 1]) for i in range(8)])
    torch.testing.assert_close(library.linear(packed, x), alone, rtol=1e-4, atol=1e-4)


def test_bytes_are_a_bit_a_weight_and_the_nonzeros() -> None:
    weight = sparse(256, 1024, 0.3, seed=16)
    rest = 257 * 8 + 2 * 256 * 4 + 2048
    nnz = int((weight != 0).sum())
    for precision, size in ((Precision.FP32, 4), (Precision.BF16, 2), (Precision.INT8, 1)):
        exact = 256 * 1024 // 8 + nnz * size
        assert exact <= library.pack(weight, Config(Kind.DECODE, precision)).nbytes <= exact + rest
    assert nnz * 6 <= library.pack(weight, Config(Kind.CSR)).nbytes <= nnz * 6 + rest


def test_csr_reaches_65536_columns_and_no_further() -> None:
    weight = torch.zeros(2, 65536)
    weight[0, -1], weight[1, 0] = 3.0, 2.0
    x = torch.arange(65536.0).reshape(1, -1)
    assert library.linear(library.pack(weight, Config(Kind.CSR)), x).tolist() == [[3.0 * 65535, 0.0]]
    wide = torch.zeros(1, 65537)
    wide[0, -1] = 1.0
    with pytest.raises(RequestError):
        library.pack(wide, Config(Kind.CSR))
    assert library.linear(library.pack(wide, Config(Kind.DECODE)), torch.ones(1, 65537)).item() == 1.0


def test_there_is_no_int8_with_columns() -> None:
    with pytest.raises(NotSupported):
        library.pack(torch.eye(3), Config(Kind.CSR, Precision.INT8))


@pytest.mark.parametrize(
    ("starts", "columns"),
    [
        ([0, 2, 1, 3], [0, 1, 2]),  # falls
        ([1, 2, 3, 3], [0, 1, 2]),  # does not begin at 0
        ([0, 1, 2, 9], [0, 1, 2]),  # ends beyond
        ([0, -4, 2, 3], [0, 1, 2]),  # negative
        ([0, 1, 2, 3], [0, 1, 5]),  # column outside
        ([0, 1, 2, 3], [0, -1, 2]),  # negative column
        ([0, 2, 2, 3], [1, 1, 0]),  # twice
        ([0, 2, 2, 3], [2, 1, 0]),  # falls inside a row
        ([0, 1, 2, 3], [0, 1, 2**62]),  # far outside
    ],
)
def test_hostile_rows_are_refused(config: Config, starts: list[int], columns: list[int]) -> None:
    with pytest.raises(RequestError):
        library.pack_rows((3, 5), torch.tensor(starts), torch.tensor(columns), torch.ones(3), config)


def test_what_to_try_is_for_few_tokens() -> None:
    for density in (0.05, 0.1, 0.2, 0.3, 0.5):
        for count in range(1, 9):
            tried = configs.kernel_configs((512, 512), density, count)
            assert {c.kind for c in tried} & {Kind.DECODE, Kind.CSR}
        assert not {c.kind for c in configs.kernel_configs((512, 512), density, 64)} & {Kind.DECODE, Kind.CSR}
    assert Config(Kind.CSR) not in configs.kernel_configs((8, 70000), 0.05, 1)
