"""A layer that skips zeros gives what the dense one gives, in every way a module is used."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from prunella.errors import RequestError
from prunella.runtime.kernels.config import Activation, Config, Kind
from prunella.runtime.layers import FastLinear, SparseConv2d, SparseLinear
from prunella.runtime.operators import fold_batchnorm
from prunella.runtime.packed_cache import ACTIVATE, dense_matrix, mask_of
from prunella.runtime.tuning.choice import Choice, Geometry, Route, Table
from tests.runtime.standin import Calls

ROWS, DECODE = Config(Kind.ROWS), Config(Kind.DECODE)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def holes(*shape: int, seed: int = 0) -> Tensor:
    return noise(*shape, seed=seed) * (noise(*shape, seed=seed + 1) > 0.5)


def always(choice: Choice) -> Table:
    return Table(((8, choice),))


CHOICES = [Route.TORCH, Route.ONEDNN, Route.CSR, ROWS, DECODE]


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("activation", list(Activation))
def test_a_linear_layer_is_the_sum_in_float64(kernels: Calls, choice: Choice, activation: Activation) -> None:
    weight, bias, x, residual = holes(7, 13), noise(7), noise(2, 5, 13, seed=3), noise(2, 5, 7, seed=4)
    layer = SparseLinear(weight, bias, table=always(choice), activation=activation)
    with torch.inference_mode():
        got = layer(x, residual)
    sums = torch.einsum("bti,oi->bto", x.double(), weight.double()) + bias.double() + residual.double()
    torch.testing.assert_close(got.double(), ACTIVATE[activation](sums), rtol=1e-5, atol=1e-5)
    assert got.shape == (2, 5, 7) and any("linear rows" in call for call in kernels) == (choice is ROWS)


def test_a_layer_made_in_inference_mode_is_packed_once(kernels: Calls) -> None:
    with torch.inference_mode():
        layer = SparseLinear(holes(7, 13), noise(7), table=always(ROWS))
        first = layer(noise(4, 13))
        packed = dict(layer.cache._packed)
        assert torch.equal(layer(noise(4, 13)), first)
    assert layer.values.is_inference() and packed
    assert all(layer.cache._packed[choice] is weight for choice, weight in packed.items())


@pytest.mark.parametrize("shape", [(13,), (0, 13), (1, 13), (3, 0, 13)])
@pytest.mark.parametrize("choice", CHOICES)
def test_odd_numbers_of_tokens(kernels: Calls, choice: Choice, shape: tuple[int, ...]) -> None:
    weight, bias = holes(7, 13), noise(7)
    layer = SparseLinear(weight, bias, table=always(choice))
    x = noise(*shape)
    torch.testing.assert_close(layer(x), functional.linear(x, weight, bias), rtol=1e-5, atol=1e-5)


def test_a_wrong_size_is_the_error_of_dense_code(kernels: Calls) -> None:
    layer = SparseLinear(holes(7, 13), table=always(ROWS))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer(noise(4, 12))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("choice", [Route.CSR, ROWS, DECODE])
def test_what_is_not_finite_spreads_as_in_dense_code(kernels: Calls, choice: Choice, value: float) -> None:
    weight, x = holes(7, 13), noise(3, 13)
    weight[:, 2] = 0
    x[1, 2] = value
    layer = SparseLinear(weight, table=always(choice))
    torch.testing.assert_close(layer(x), functional.linear(x, weight), equal_nan=True)
    assert layer(x)[1].isnan().all() and layer(x)[0].isfinite().all()


def test_gradients_are_those_of_dense_code(kernels: Calls) -> None:
    weight, bias = holes(7, 13), noise(7)
    layer = SparseLinear(weight, bias, table=always(ROWS), activation=Activation.GELU).requires_grad_(True)
    x, own, b = (t.clone().requires_grad_(True) for t in (noise(5, 13), weight, bias))
    functional.gelu(functional.linear(x, own, b)).square().sum().backward()
    again = x.detach().clone().requires_grad_(True)
    layer(again).square().sum().backward()
    assert x.grad is not None and own.grad is not None and layer.values.grad is not None and layer.bias is not None
    torch.testing.assert_close(again.grad, x.grad)
    torch.testing.assert_close(layer.values.grad, own.grad[weight != 0])
    torch.testing.assert_close(layer.bias.grad, b.grad)
    assert not any("linear" in call for call in kernels)


def test_a_changed_weight_is_packed_again(kernels: Calls) -> None:
    weight, x = holes(7, 13), noise(5, 13)
    layer = SparseLinear(weight, table=always(ROWS))
    layer(x)
    with torch.no_grad():
        layer.values.mul_(2)
    torch.testing.assert_close(layer(x), functional.linear(x, 2 * weight))
    layer(x)
    assert kernels.count("pack rows") == 2


def test_a_copy_has_its_own_packed_weight(kernels: Calls) -> None:
    layer, x = SparseLinear(holes(7, 13), table=always(ROWS)), noise(5, 13)
    before = layer(x)
    replica = copy.deepcopy(layer)
    with torch.no_grad():
        replica.values.zero_()
    assert torch.equal(layer(x), before) and not replica(x).any() and replica.cache.key != layer.cache.key


def test_the_state_is_canonical_and_goes_round(kernels: Calls) -> None:
    weight, x = holes(7, 13), noise(5, 13)
    layer = SparseLinear(weight, noise(7), table=always(ROWS))
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    assert set(state) == {"values", "bits", "bias"} and len(state["bits"]) == -(-7 * 13 // 8)
    other = SparseLinear(weight.sign(), noise(7, seed=9), table=always(ROWS))
    other(x)
    other.load_state_dict(state)
    assert torch.equal(other(x), layer(x)) and torch.equal(layer.weight, weight)


def test_other_types_run_dense(kernels: Calls) -> None:
    weight, x = holes(7, 13), noise(5, 13)
    layer = SparseLinear(weight, table=always(ROWS))
    torch.testing.assert_close(
        copy.deepcopy(layer).double()(x.double()), functional.linear(x.double(), weight.double())
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype is torch.bfloat16
    assert not any("linear" in call for call in kernels)


@pytest.mark.parametrize("choice", [Route.TORCH, Route.CSR, ROWS])
def test_a_layer_compiles_whole(kernels: Calls, choice: Choice) -> None:
    weight, bias, x = holes(7, 13), noise(7), noise(5, 13)
    layer = SparseLinear(weight, bias, table=always(choice)).eval()
    with torch.inference_mode():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), functional.linear(x, weight, bias))
        torch.testing.assert_close(compiled(noise(3, 13)), functional.linear(noise(3, 13), weight, bias))
    torch._dynamo.reset()


def test_the_operators_keep_their_word(kernels: Calls) -> None:
    layer = SparseLinear(holes(7, 13), noise(7), table=always(ROWS))
    args = (noise(5, 13), layer.values.detach(), layer.bits, layer.bias, None, 7, layer.cache.key)
    torch.library.opcheck(torch.ops.prunella.sparse_linear.default, args, test_utils=("test_schema", "test_faketensor"))


CASES = list(itertools.product([(1, 1), (2, 1)], [(0, 0), (1, 2)], [(1, 1), (2, 1)]))


@pytest.mark.parametrize(("stride", "padding", "dilation"), CASES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_convolution_with_its_norm(
    kernels: Calls, stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int], channels_last: bool
) -> None:
    weight, x = holes(6, 4, 3, 2), noise(2, 4, 9, 8)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    conv = nn.Conv2d(4, 6, (3, 2), stride, padding, dilation).eval().requires_grad_(False)
    conv.weight.copy_(weight)
    norm = filled(nn.BatchNorm2d(6))
    geometry = Geometry((3, 2), stride, padding, dilation)
    layer = SparseConv2d(
        weight, conv.bias, geometry=geometry, table=always(ROWS), norm=norm, activation=Activation.RELU
    )
    expected = norm.double()(
        functional.conv2d(x.double(), weight.double(), conv.bias.double(), stride, padding, dilation)
    )
    residual = noise(*expected.shape, seed=5)
    norm.float()
    got = layer(x, residual)
    torch.testing.assert_close(got.double(), torch.relu(expected + residual), rtol=1e-5, atol=1e-5)
    assert geometry.positions((9, 8)) == tuple(got.shape[2:]) and "conv2d rows" in kernels


def filled(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    for k, part in enumerate((norm.running_mean, norm.running_var, norm.weight, norm.bias)):
        assert part is not None
        part.data = noise(norm.num_features, seed=10 + k).abs() + 0.5
    return norm.eval().requires_grad_(False)


def test_a_norm_in_training_is_not_folded(kernels: Calls) -> None:
    weight, x, norm = holes(6, 4, 1, 1), noise(2, 4, 3, 3), filled(nn.BatchNorm2d(6))
    layer = SparseConv2d(weight, geometry=Geometry((1, 1)), table=always(ROWS), norm=norm).train()
    expected = nn.BatchNorm2d(6).train()
    expected.load_state_dict(copy.deepcopy(norm.state_dict()))
    torch.testing.assert_close(layer(x), expected(functional.conv2d(x, weight)))
    assert "conv2d rows" not in kernels


def test_a_convolution_compiles_whole(kernels: Calls) -> None:
    weight, x, norm = holes(6, 4, 3, 3), noise(2, 4, 9, 9), filled(nn.BatchNorm2d(6))
    layer = SparseConv2d(weight, geometry=Geometry((3, 3), (2, 2)), table=always(ROWS), norm=norm).eval()
    with torch.inference_mode():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), norm(functional.conv2d(x, weight, stride=2)))
    torch._dynamo.reset()


def test_folding_is_worked_by_hand() -> None:
    matrix, bias = torch.tensor([[2.0, 0.0]]), torch.tensor([1.0])
    norm = [torch.tensor([v]) for v in (3.0, 3.75, 4.0, 0.5)]  # s = 4 / sqrt(3.75 + 0.25) = 2
    weight, shift = fold_batchnorm(matrix, bias, norm, 0.25)
    assert weight.tolist() == [[4.0, 0.0]] and shift is not None and shift.tolist() == [-3.5]


@pytest.mark.parametrize("count", [1, 5, 7])
def test_a_bias_of_another_size_reaches_no_kernel(kernels: Calls, count: int) -> None:
    layer = SparseConv2d(
        torch.eye(6)[:, :, None, None], torch.ones(6), geometry=Geometry((1, 1)), table=always(ROWS)
    ).eval()
    layer.bias = nn.Parameter(torch.ones(count), requires_grad=False)
    with torch.inference_mode(), pytest.raises(RequestError, match=rf"bias of shape \({count},\)"):
        layer(torch.randn(1, 6, 3, 3))


def test_a_bias_of_another_type_or_stride_is_read_as_it_is(kernels: Calls) -> None:
    layer = SparseConv2d(
        torch.eye(6)[:, :, None, None], torch.ones(6), geometry=Geometry((1, 1)), table=always(ROWS)
    ).eval()
    x = torch.randn(1, 6, 3, 3)
    for bias in (torch.arange(12.0)[::2], torch.arange(6.0).to(torch.bfloat16)):
        layer.bias = nn.Parameter(bias, requires_grad=False)
        with torch.inference_mode():
            torch.testing.assert_close(layer(x), x + bias.float()[:, None, None])


def test_bits_come_highest_first() -> None:
    bits = torch.tensor([0b10100000, 0b01000000], dtype=torch.uint8)
    assert mask_of(bits, (2, 5)).tolist() == [[True, False, True, False, False], [False] * 4 + [True]]
    assert dense_matrix(torch.tensor([1.0, 2.0, 3.0]), bits, (2, 5)).tolist() == [[1, 0, 2, 0, 0], [0, 0, 0, 0, 3]]


def test_the_nearest_number_of_tokens_decides() -> None:
    table = Table(((1, ROWS), (16, Route.CSR), (64, Route.TORCH)))
    assert [table.at(n) for n in (1, 3, 5, 16, 31, 33, 5000)] == [ROWS, ROWS, *[Route.CSR] * 3, *[Route.TORCH] * 2]
    assert table.at(0) is Route.TORCH and table.sparse and not always(Route.ONEDNN).sparse


def test_a_fast_dense_layer_is_a_dense_layer(kernels: Calls) -> None:
    weight, bias, x = noise(7, 13), noise(7), noise(2, 5, 13)
    layer = FastLinear(weight, bias, table=always(Route.ONEDNN))
    torch.testing.assert_close(layer(x), functional.linear(x, weight, bias))
    assert set(layer.state_dict()) == {"weight", "bias"}
    with pytest.raises(RequestError, match="no kernel for many tokens"):
        FastLinear(weight, table=always(ROWS))


def test_a_weight_of_nothing_is_refused() -> None:
    with pytest.raises(RequestError, match="no zeros to skip"):
        SparseLinear(torch.zeros(0, 3), table=always(ROWS))
