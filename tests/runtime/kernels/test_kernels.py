"""The compiled kernels against float64, in every tier that this processor has, at odd sizes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from prunella.errors import NotSupported, PruningError, RequestError
from prunella.runtime.kernels import convolution, library, signatures
from prunella.runtime.kernels.config import Activation, Config, Kind, Precision

pytestmark = pytest.mark.skipif(
    not library.available(), reason="the kernels were not built: no compiler at installation"
)
KINDS = [Kind.ROWS, Kind.GROUPS, Kind.BLOCK16, Kind.BLOCK8, Kind.BLOCK4]
SHAPES = [(1, 1, 1), (5, 3, 7), (33, 70, 19), (200, 300, 65), (17, 1000, 3), (0, 4, 3), (4, 0, 3), (4, 5, 0)]
SIZES = [(1, 1, 64), (2, 4, 100), (4, 2, 256), (4, 3, 64), (2, 6, 33), (1, 8, 512)]
DIRECT = [(4, 0, 100), (4, 0, 512)]
"""Sizes of blocks of 16 rows only."""


@pytest.fixture(params=library.tiers() or ("none",), autouse=True)
def tier(request: pytest.FixtureRequest) -> Iterator[str]:
    library.use_tier(request.param)
    yield request.param
    library.use_tier()


def sparse(*shape: int, density: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator) * (torch.rand(*shape, generator=generator) < density)


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=2e-4)


def test_a_library_of_another_version_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    header = Path(__file__).parents[3] / "kernels" / "prunella.h"
    assert not header.exists() or f"#define PRUNELLA_ABI {signatures.ABI}\n" in header.read_text(encoding="utf-8")
    monkeypatch.setattr(signatures, "ABI", -1)
    loaded = library.load.__wrapped__()
    assert loaded.library is None and loaded.why.endswith("not -1")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("density", [0.0, 0.1, 0.6, 1.0])
@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_linear_is_that_of_float64(kind: Kind, density: float, m: int, k: int, n: int) -> None:
    weight, x, bias, residual = sparse(m, k, density=density), torch.randn(n, k), torch.randn(m), torch.randn(n, m)
    wanted = x.double() @ weight.double().T
    for rows, tile, depth in [*SIZES, *(DIRECT if kind is Kind.BLOCK16 else ())]:
        packed = library.pack(weight, Config(kind, rows=rows, tile=tile, depth=depth))
        assert packed.nnz == int((weight != 0).sum()) and packed.shape == (m, k)
        close(library.linear(packed, x), wanted)
        full = wanted + bias.double() + residual.double()
        close(library.linear(packed, x, bias, residual, Activation.RELU), full.clamp(min=0))


CONVOLUTIONS = [
    ((1, 3, 8, 8), 5, (3, 3), (1, 1), (1, 1), (1, 1)),
    ((2, 16, 9, 7), 33, (1, 1), (1, 1), (0, 0), (1, 1)),
    ((2, 5, 13, 11), 20, (3, 3), (2, 2), (1, 1), (1, 1)),
    ((1, 4, 12, 12), 6, (5, 3), (1, 2), (2, 1), (2, 1)),
    ((2, 4, 9, 9), 6, (1, 1), (2, 2), (0, 0), (1, 1)),
    ((1, 4, 9, 9), 6, (1, 1), (1, 1), (1, 1), (1, 1)),
    ((1, 2, 7, 7), 3, (7, 7), (3, 3), (3, 3), (1, 1)),
    ((0, 2, 7, 7), 3, (3, 3), (1, 1), (1, 1), (1, 1)),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("shape", "out", "kernel", "stride", "padding", "dilation"), CONVOLUTIONS)
def test_convolution_is_that_of_float64(
    kind: Kind, layout: torch.memory_format, shape: tuple[int, ...], out: int, kernel: tuple[int, int],
    stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int],
) -> None:  # fmt: skip
    weight, bias = sparse(out, shape[1], *kernel, density=0.4), torch.randn(out)
    x = torch.randn(shape).to(memory_format=layout)
    wanted = torch.nn.functional.conv2d(x.double(), weight.double(), bias.double(), stride, padding, dilation)
    residual = torch.randn(wanted.shape).to(memory_format=layout)
    for rows, tile, depth in [*SIZES[1:4], *(DIRECT[:1] if kind is Kind.BLOCK16 else ())]:
        packed = library.pack(weight.flatten(1), Config(kind, rows=rows, tile=tile, depth=depth))
        found = convolution.conv2d(
            packed, x, kernel, bias, residual, Activation.RELU, stride=stride, padding=padding, dilation=dilation
        )
        close(found, (wanted + residual.double()).clamp(min=0))
        assert not shape[0] or found.is_contiguous(memory_format=layout)


# Panels of several strips, lines that are no whole vectors, remainders of strides, blocks that end inside a channel.
STRIPS = [
    ((2, 40, 50, 61), 9, (3, 3), (1, 1), (1, 1), (1, 1)),
    ((1, 70, 23, 64), 5, (5, 2), (1, 1), (3, 0), (1, 3)),
    ((2, 33, 41, 30), 7, (3, 3), (2, 2), (1, 1), (2, 1)),
    ((1, 21, 60, 7), 6, (4, 1), (3, 1), (0, 2), (1, 1)),
    ((1, 9, 19, 200), 5, (2, 5), (9, 1), (1, 2), (1, 1)),  # more remainders than a window has
    ((1, 11, 10, 14), 5, (3, 3), (1, 1), (0, 0), (1, 1)),  # lines of 12: the last ends where the next row begins
]


@pytest.mark.parametrize("kind", [Kind.ROWS, Kind.GROUPS, Kind.BLOCK4])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("shape", "out", "kernel", "stride", "padding", "dilation"), STRIPS)
def test_a_large_image_is_cut_into_strips(
    kind: Kind, layout: torch.memory_format, shape: tuple[int, ...], out: int, kernel: tuple[int, int],
    stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int],
) -> None:  # fmt: skip
    weight, x = sparse(out, shape[1], *kernel, density=0.2), torch.randn(shape).to(memory_format=layout)
    wanted = torch.nn.functional.conv2d(x.double(), weight.double(), None, stride, padding, dilation)
    threads = torch.get_num_threads()
    try:
        for rows, tile, depth, count in ((1, 8, 100, 1), (4, 3, 4096, 2), (2, 4, 7, 3), (1, 1, 512, 1)):
            torch.set_num_threads(count)
            packed = library.pack(weight.flatten(1), Config(kind, rows=rows, tile=tile, depth=depth))
            for _ in range(2):  # the second time with the places that the first one found
                close(convolution.conv2d(packed, x, kernel, stride=stride, padding=padding, dilation=dilation), wanted)
            less = x[:, :, : -(x.shape[2] // 3)].contiguous(memory_format=layout)  # another image, the same weight
            small = torch.nn.functional.conv2d(less.double(), weight.double(), None, stride, padding, dilation)
            close(convolution.conv2d(packed, less, kernel, stride=stride, padding=padding, dilation=dilation), small)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_nothing_of_an_image_before_reaches_the_places_that_pad(layout: torch.memory_format) -> None:
    wrong = torch.full((1, 16, 16, 16), torch.nan).to(memory_format=layout)
    convolution.conv2d(library.pack(torch.ones(8, 16 * 9), Config(Kind.ROWS)), wrong, (3, 3), padding=(1, 1))
    weight, x = sparse(7, 4, 3, 3, density=0.3), torch.randn(1, 4, 8, 8).to(memory_format=layout)
    wanted = torch.nn.functional.conv2d(x.double(), weight.double(), padding=1)
    for depth in (5, 20, 512):  # rows of unlike length side by side are padded
        packed = library.pack(weight.flatten(1), Config(Kind.ROWS, rows=4, depth=depth))
        close(convolution.conv2d(packed, x, (3, 3), padding=(1, 1)), wanted)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_line_that_no_patch_reads_need_not_be_finite(layout: torch.memory_format) -> None:
    weight, x = sparse(6, 4, 3, 3, density=0.5), torch.randn(1, 4, 6, 10).to(memory_format=layout)
    packed = library.pack(weight.flatten(1), Config(Kind.ROWS))
    wanted = convolution.conv2d(packed, x, (3, 3), stride=(2, 1))
    x[:, :, 5] = torch.inf
    found = convolution.conv2d(packed, x, (3, 3), stride=(2, 1), strict=True)
    assert wanted is not None and found is not None and torch.equal(found, wanted)
    x[:, :, 4] = torch.inf
    assert convolution.conv2d(packed, x, (3, 3), stride=(2, 1), strict=True) is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tile", [2, 4, 6, 8])
def test_in_bf16_only_x_is_rounded(kind: Kind, tile: int) -> None:
    weight, x, bias = sparse(37, 90, density=0.3), torch.randn(41, 90), torch.randn(37)
    x[3, 5] = float("nan")
    packed = library.pack(weight, Config(kind, Precision.BF16, rows=2, tile=tile, depth=40))
    wanted = x.bfloat16().double() @ weight.double().T + bias
    found = library.linear(packed, x, bias)
    kept = [t for t in range(41) if t != 3]
    close(found[kept], wanted[kept])
    assert bool(found[3][weight[:, 5] != 0].isnan().all())
    if kind in (Kind.ROWS, Kind.GROUPS):  # a block multiplies the zeros inside it too
        assert found[3].isnan().tolist() == (weight[:, 5] != 0).tolist()
    with pytest.raises(NotSupported):
        library.pack(weight, Config(kind, Precision.BF16, tile=3))


@pytest.mark.parametrize("density", [0.0, 0.1, 0.6, 1.0])
@pytest.mark.parametrize(("m", "k", "n"), [*SHAPES, (37, 90, 41)])
def test_pairs_round_x_and_the_weight(density: float, m: int, k: int, n: int) -> None:
    weight, x, bias = sparse(m, k, density=density), torch.randn(n, k), torch.randn(m)
    wanted = x.bfloat16().double() @ weight.bfloat16().double().T
    for rows, tile, depth in [(1, 2, 64), (2, 4, 100), (4, 2, 256), (4, 6, 33), (1, 8, 512), (2, 8, 1)]:
        packed = library.pack(weight, Config(Kind.PAIRS, Precision.BF16, rows=rows, tile=tile, depth=depth))
        assert packed.nnz == int((weight != 0).sum())
        close(library.linear(packed, x), wanted)
        close(library.linear(packed, x, bias, None, Activation.RELU), (wanted + bias).clamp(min=0))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pairs_of_a_convolution(layout: torch.memory_format) -> None:
    x, weight = torch.randn(2, 5, 9, 8).contiguous(memory_format=layout), sparse(20, 45, density=0.3)
    packed = library.pack(weight, Config(Kind.PAIRS, Precision.BF16, rows=2, tile=4, depth=20))
    exact = torch.nn.functional.conv2d(x.bfloat16().double(), weight.bfloat16().double().view(20, 5, 3, 3), padding=1)
    close(convolution.conv2d(packed, x, (3, 3), padding=(1, 1)), exact)


def test_a_token_and_a_weight_that_are_not_finite_stay_alone_in_pairs() -> None:
    weight, x = sparse(37, 90, density=0.3), torch.randn(41, 90)
    x[3, 5] = torch.nan
    packed = library.pack(weight, Config(Kind.PAIRS, Precision.BF16, rows=4, tile=2, depth=40))
    found = library.linear(packed, x)
    assert found.isnan().any(1).nonzero().tolist() == [[3]]
    assert found[3].isnan().tolist() == (weight[:, 5] != 0).tolist()
    assert library.finite_linear(packed, x, None, None, Activation.NONE) is None
    weight[7, 11] = torch.inf
    x[3, 5] = 1.0
    packed = library.pack(weight, Config(Kind.PAIRS, Precision.BF16, rows=4, tile=2, depth=40))
    assert (~library.linear(packed, x).isfinite()).any(0).nonzero().tolist() == [[7]]


def test_pairs_are_of_bf16_and_have_even_tiles() -> None:
    for config in (Config(Kind.PAIRS), Config(Kind.PAIRS, Precision.BF16, tile=3)):
        with pytest.raises(NotSupported):
            library.pack(torch.ones(4, 6), config)


@pytest.mark.parametrize("kind", KINDS)
def test_columns_beyond_sixteen_bits_are_found(kind: Kind) -> None:
    weight = torch.zeros(3, 70_000)
    weight[0, 0], weight[1, 65_535], weight[1, 65_536], weight[2, 69_999] = 1, 2, 3, 4
    x = torch.randn(2, 70_000)
    for depth in (512, 65_535):
        packed = library.pack(weight, Config(kind, rows=2, tile=2, depth=depth))
        close(library.linear(packed, x), x.double() @ weight.double().T)


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_that_is_not_finite_stays_alone(kind: Kind) -> None:
    weight, x = sparse(40, 50, density=0.3), torch.randn(9, 50)
    packed = library.pack(weight, Config(kind, rows=2, tile=2, depth=16))
    clean = library.linear(packed, x)
    x[4] = float("nan")
    x[5] = float("inf")
    found = library.linear(packed, x)
    others = [0, 1, 2, 3, 6, 7, 8]
    assert torch.equal(found[others], clean[others])
    assert not found[4][weight.any(1)].isfinite().any() and not found[5][weight.any(1)].isfinite().any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 3.4e38])
@pytest.mark.parametrize("tile", [2, 0])
def test_the_short_way_is_the_same_and_refuses_what_is_not_finite(
    kind: Kind, precision: Precision, bad: float, tile: int
) -> None:
    weight, x = sparse(33, 70, density=0.3), torch.randn(21, 70)
    packed = library.pack(weight, Config(kind, precision, tile=tile if kind is Kind.BLOCK16 else 2, depth=32))
    bias, residual = torch.randn(33), torch.randn(21, 33)
    for more in ((None, None), (bias, residual)):
        short = library.finite_linear(packed, x, *more, Activation.RELU)
        assert short is not None and torch.equal(short, library.linear(packed, x, *more, Activation.RELU))
    for row, column in ((0, 0), (20, 69), (7, 31)):
        odd = x.clone()
        odd[row, column] = bad
        assert library.finite_linear(packed, odd, None, None, Activation.NONE) is None


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_only_pixels_that_a_convolution_reads_have_to_be_finite(layout: torch.memory_format) -> None:
    x = torch.randn(2, 3, 7, 7).contiguous(memory_format=layout)
    packed = library.pack(sparse(5, 3, density=0.9), Config(Kind.ROWS, tile=1))
    wanted = convolution.conv2d(packed, x, (1, 1), stride=(2, 2))
    x[1, 2, 1, 3] = torch.nan  # every second line is left out
    found = convolution.conv2d(packed, x, (1, 1), stride=(2, 2), strict=True)
    assert found is not None and torch.equal(found, wanted)
    x[1, 2, 6, 6] = torch.nan
    assert convolution.conv2d(packed, x, (1, 1), stride=(2, 2), strict=True) is None


def test_what_stands_at_a_zero_is_not_read() -> None:
    weight = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    x = torch.tensor([[float("inf"), 3.0]])
    found = library.linear(library.pack(weight, Config(Kind.ROWS, rows=4, tile=1, depth=64)), x)
    assert found.tolist() == [[float("inf"), 6.0, 0.0]]


def test_relu_keeps_what_is_no_number() -> None:
    x = torch.tensor([[float("nan")], [-1.0]])
    packed = library.pack(torch.ones(9, 1), Config(Kind.ROWS, rows=1, tile=1, depth=64))
    found = library.linear(packed, x, activation=Activation.RELU)
    assert bool(found[0].isnan().all()) and found[1].tolist() == [0.0] * 9


SMOOTH = {
    Activation.GELU: torch.nn.functional.gelu, Activation.SILU: torch.nn.functional.silu,
    Activation.RELU6: torch.nn.functional.relu6, Activation.HARDSWISH: torch.nn.functional.hardswish,
}  # fmt: skip


@pytest.mark.parametrize("activation", SMOOTH)
def test_smooth_activations_are_those_of_torch(activation: Activation) -> None:
    weight, x = sparse(21, 20, density=0.5), torch.randn(2, 3, 20)
    packed, function = library.pack(weight, Config(Kind.ROWS)), SMOOTH[activation]
    dense = x.double() @ weight.double().T
    found = library.linear(packed, x, activation=activation)
    close(found, function(dense))
    assert found.shape == (2, 3, 21)
    bias, residual = torch.randn(21), torch.randn(2, 3, 21)
    found = library.linear(packed, x, bias, residual, activation)
    close(found, function(dense + bias + residual))
    image = torch.randn(2, 20, 3, 7)
    for layout in (torch.contiguous_format, torch.channels_last):
        found = convolution.conv2d(packed, image.contiguous(memory_format=layout), (1, 1), activation=activation)
        close(found, function(torch.einsum("bchw,oc->bohw", image.double(), weight.double())))


@pytest.mark.parametrize("activation", SMOOTH)
def test_smooth_activations_where_rows_are_the_lanes(activation: Activation) -> None:
    weight, x, bias, residual = sparse(39, 70, density=0.3), torch.randn(13, 70), torch.randn(39), torch.randn(13, 39)
    wanted = SMOOTH[activation](x.double() @ weight.double().T + bias + residual)
    close(
        library.linear(library.pack(weight, Config(Kind.BLOCK16, tile=0, depth=32)), x, bias, residual, activation),
        wanted,
    )


def test_a_thread_that_has_run_nothing_yet_may_begin_with_rows_as_lanes() -> None:
    weight, x, found = sparse(32, 40, density=0.3), torch.randn(5, 40), list[Tensor]()
    packed = library.pack(weight, Config(Kind.BLOCK16, tile=0))
    thread = threading.Thread(target=lambda: found.append(library.linear(packed, x)))
    thread.start()
    thread.join()
    close(found[0], x.double() @ weight.double().T)


@pytest.mark.parametrize("kind", [Kind.ROWS, Kind.GROUPS, Kind.BLOCK8])
def test_only_16_rows_may_be_the_lanes(kind: Kind) -> None:
    with pytest.raises(RequestError):
        library.linear(library.pack(sparse(8, 8, density=0.5), Config(kind, tile=0)), torch.randn(3, 8))


@pytest.mark.parametrize("activation", SMOOTH)
def test_smooth_activations_everywhere(activation: Activation) -> None:
    """From where they vanish to where they change nothing, and beyond what float32 has."""
    packed, function = library.pack(torch.ones(37, 1), Config(Kind.ROWS, rows=1, tile=1, depth=64)), SMOOTH[activation]
    x = torch.cat([torch.linspace(-100, 100, 4001), torch.tensor([0.0, 88.5, 88.9, -88.9, 1e-30, 3e38, -1e30])])
    found, exact = library.linear(packed, x[:, None], activation=activation), function(x.double())
    assert bool((found == found[:, :1]).all())  # whole vectors, and rows that fill none
    off = (found[:, 0] - exact).abs()
    assert float(off[x.abs() < 10].max()) < 1e-6
    assert float((off / exact.abs().clamp(min=1)).max()) < 3e-7
    assert float(off[x < -6].max()) < 1e-7  # where next to nothing is left, however far below
    odd = library.linear(packed, torch.tensor([[torch.nan], [torch.inf]]), activation=activation)[:, 0]
    assert bool(odd[0].isnan()) and float(odd[1]) == float(function(torch.tensor(torch.inf)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16])
def test_what_stands_beside_a_token_changes_no_bit_of_it(kind: Kind, precision: Precision) -> None:
    weight, x, bias = sparse(21, 45, density=0.4), torch.randn(161, 45), torch.randn(21)
    for rows, tile in ((1, 8), (2, 6), (4, 4), (4, 2), *([(4, 0)] if kind is Kind.BLOCK16 else ())):
        packed = library.pack(weight, Config(kind, precision, rows=rows, tile=tile, depth=20))
        alone = torch.cat([library.linear(packed, token, bias) for token in x.split(1)])
        for tokens in (2, 5, 9, 33, 40, 41, 56, 72, 81, 113, 161):  # tails of every number of vectors
            assert torch.equal(library.linear(packed, x[:tokens], bias), alone[:tokens])


@pytest.mark.parametrize("tokens", [3, 200])
def test_threads_change_no_bit(tokens: int) -> None:
    weight, x = sparse(500, 96, density=0.2), torch.randn(tokens, 96)
    packed, before = library.pack(weight, Config(Kind.ROWS, rows=2, tile=2, depth=32)), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = library.linear(packed, x)
        torch.set_num_threads(2)
        assert torch.equal(library.linear(packed, x), alone)
    finally:
        torch.set_num_threads(before)


def test_calls_from_several_threads_do_not_meet() -> None:
    jobs = [(sparse(64 + i, 80, density=0.3, seed=i), torch.randn(50, 80)) for i in range(6)]
    packed = [library.pack(weight, Config(Kind.ROWS, depth=32)) for weight, _ in jobs]
    wrong: list[int] = []

    def work(i: int) -> None:
        found = [library.linear(packed[i], jobs[i][1]) for _ in range(20)]
        wrong.extend(i for y in found if not torch.allclose(y, jobs[i][1] @ jobs[i][0].T, atol=1e-4))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    ("starts", "columns"),
    [
        ([0, 2, 1, 3], [0, 1, 2]),
        ([0, 1, 2, 4], [0, 1, 2]),
        ([1, 1, 2, 3], [0, 1, 2]),
        ([0, 9, 2, 3], [0, 1, 2]),
        ([0, 1, 2, 3], [0, 4, 2]),
        ([0, 1, 2, 3], [0, -1, 2]),
        ([0, 2, 2, 3], [1, 1, 2]),
        ([0, 2, 2, 3], [2, 1, 2]),
        ([0, 1, 3], [0, 1, 2]),
    ],
)
def test_rows_that_are_not_well_formed_are_refused(starts: list[int], columns: list[int]) -> None:
    with pytest.raises(RequestError, match=r"well formed|do not fit"):
        library.pack_rows((3, 4), torch.tensor(starts), torch.tensor(columns), torch.ones(3), Config(Kind.ROWS))


@pytest.mark.parametrize("name", ["stride", "padding", "dilation"])
@pytest.mark.parametrize("value", [-1, (1 << 32) + 1])
def test_sizes_that_the_kernels_cannot_hold_are_refused(name: str, value: int) -> None:
    packed = library.pack(torch.ones(2, 9), Config(Kind.ROWS))
    with pytest.raises(RequestError, match="out of range"):
        convolution.conv2d(packed, torch.ones(1, 1, 8, 8), (3, 3), **{name: (value, 1)})  # type: ignore[arg-type]


def test_requests_that_make_no_sense_are_refused() -> None:
    packed = library.pack(torch.ones(4, 6), Config(Kind.ROWS))
    with pytest.raises(RequestError, match="has 6"):
        library.linear(packed, torch.ones(2, 5))
    with pytest.raises(RequestError, match="bias"):
        library.linear(packed, torch.ones(2, 6), torch.ones(3))
    with pytest.raises(RequestError, match="residual"):
        library.linear(packed, torch.ones(2, 6), None, torch.ones(2, 3))
    with pytest.raises(RequestError, match="cannot read"):
        library.linear(packed, torch.ones(2, 6, dtype=torch.float64))
    with pytest.raises(RequestError, match="out of range"):
        library.pack(torch.ones(4, 6), Config(Kind.ROWS, rows=3))
    with pytest.raises(RequestError, match="smaller than the kernel"):
        convolution.conv2d(library.pack(torch.ones(2, 9), Config(Kind.ROWS)), torch.ones(1, 1, 2, 2), (3, 3))
    with pytest.raises(NotSupported):
        library.pack(torch.ones(4, 6), Config(Kind.GROUPS, Precision.INT8))
    with pytest.raises(PruningError, match="cannot be used"):
        library.use_tier("sse9")


@pytest.mark.parametrize("kind", [Kind.ROWS, Kind.DECODE])
def test_a_bias_is_read_as_it_is_or_refused(kind: Kind) -> None:
    weight, x = sparse(6, 20, density=0.5), torch.randn(5, 20)
    packed = library.pack(weight, Config(kind))
    for bias in (torch.arange(12.0)[::2], torch.arange(6.0), torch.arange(6.0).to(torch.bfloat16)):
        found = library.finite_linear(packed, x, bias, None, Activation.NONE)
        assert found is not None
        close(found, x.double() @ weight.double().T + bias.double())
    for count in (1, 5, 7):
        with pytest.raises(RequestError, match="does not fit"):
            library.finite_linear(packed, x, torch.ones(count), None, Activation.NONE)
