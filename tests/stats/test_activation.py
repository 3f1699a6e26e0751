"""Input norms against the plainest computation, for every way in which a weight is multiplied."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from prunella.graph.data import Entity, Graph, Layer
from prunella.model.state import untouched
from prunella.stats import Source, Subject, collect


def norms(model: nn.Module, data: list[Tensor], *layers: Layer, loss: bool = False) -> dict[str, Tensor]:
    """`input_norm` of some layers of a model."""
    entities = {n: Entity(n, (n,), tuple(p.shape), 4, True, True) for n, p in model.named_parameters()}
    subject = Subject(model, Graph(entities, (), (), layers, (), {}), layers=layers)
    needs = ["input_norm", "grad"] if loss else ["input_norm"]
    with untouched(model, 0):
        values = collect(subject, needs, Source(data, (lambda m, b: m(b).sum()) if loss else None)).values
    return dict(values["input_norm"])


def linear(name: str, *, transposed: bool = False) -> Layer:
    out, into = (1, 0) if transposed else (0, 1)
    return Layer(name, f"{name}.weight" if name else "weight", out, into, 1, "linear")


def columns(x: Tensor) -> Tensor:
    """L2 norm of every column over all rows."""
    return x.double().flatten(0, -2).norm(dim=0).float()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 4), (2, 3, 4), (4,)])
@pytest.mark.parametrize("loss", [True, False])
def test_linear(bias: bool, shape: tuple[int, ...], loss: bool) -> None:
    x = torch.randn(shape)
    found = norms(nn.Sequential(nn.Linear(4, 5, bias=bias)), [x], linear("0"), loss=loss)["0.weight"]
    assert torch.allclose(found, columns(x.reshape(-1, 4)).expand(5, 4))


class Transposed(nn.Module):
    """`transformers`' Conv1D: a linear layer whose weight is (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(4, 5)), nn.Parameter(torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, 4), self.weight).view(*x.shape[:-1], 5)


def test_a_transposed_weight_through_addmm() -> None:
    x = torch.randn(2, 3, 4)
    found = norms(Transposed(), [x], linear("", transposed=True))["weight"]
    assert torch.allclose(found, columns(x).unsqueeze(1).expand(4, 5))


class Matmul(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.weight = how, nn.Parameter(torch.randn(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "right":
            return x @ self.weight.t()
        if self.how == "left":
            return self.weight @ x.transpose(-1, -2)
        if self.how == "einsum":
            return torch.einsum("bti,oi->bto", x, self.weight)
        halves = self.weight.chunk(2, dim=1)
        return functional.linear(x[..., :2], halves[0]) + functional.linear(x[..., 2:], halves[1])


@pytest.mark.parametrize("how", ["right", "left", "einsum", "chunks"])
def test_products_of_any_spelling(how: str) -> None:
    x = torch.randn(2, 3, 4)
    found = norms(Matmul(how), [x], linear(""))["weight"]
    assert torch.allclose(found, columns(x).expand(5, 4), atol=1e-6)


def test_slices_of_one_weight_that_read_different_inputs() -> None:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(4, 2, batch_first=True)

    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mha = model

        def forward(self, x: Tensor) -> Tensor:
            out = self.mha(x, 2 * x, 3 * x)[0]
            assert isinstance(out, Tensor)
            return out

    x = torch.randn(2, 3, 4)
    layer = Layer("mha.in_proj", "mha.in_proj_weight", 0, 1, 1, "linear")
    found = norms(Cross(), [x], layer)["mha.in_proj_weight"]
    for block, factor in zip(found.split(4), (1, 2, 3), strict=True):
        assert torch.allclose(block, factor * columns(x).expand(4, 4), atol=1e-5)


CONVS = [
    (nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
    (nn.Conv2d(4, 6, (3, 2), stride=2, padding=(1, 0), dilation=(1, 2)), (2, 4, 9, 8)),
    (nn.Conv2d(4, 6, 3, padding="same", padding_mode="circular"), (2, 4, 5, 5)),
    (nn.Conv2d(4, 6, 3, groups=2, bias=False), (2, 4, 6, 5)),
    (nn.Conv2d(4, 8, 3, groups=4, padding=1), (3, 4, 6, 5)),
    (nn.Conv3d(2, 3, 2), (2, 2, 4, 3, 5)),
]


@pytest.mark.parametrize(("conv", "shape"), CONVS)
def test_convolutions_over_their_patches(conv: nn.Conv2d, shape: tuple[int, ...]) -> None:
    """The squared norm of what w_i multiplies is the output's sum where w is 1 at i and the input is squared."""
    x = torch.randn(shape)
    layer = Layer("0", "0.weight", 0, 1, conv.groups, "conv")
    found = norms(nn.Sequential(conv), [x], layer)["0.weight"]
    assert found.shape == conv.weight.shape
    squared = nn.Sequential(type(conv)(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding,
                                       conv.dilation, conv.groups, False, conv.padding_mode)).double()  # type: ignore[arg-type]  # fmt: skip
    weight = squared[0].weight
    assert isinstance(weight, Tensor)
    (expected,) = torch.autograd.grad(squared(x.double().square()).sum(), weight)
    assert torch.allclose(found, expected.sqrt().float(), rtol=1e-5)


def test_transposed_convolution_over_all_positions() -> None:
    x = torch.randn(2, 3, 4, 4)
    layer = Layer("0", "0.weight", 1, 0, 1, "conv_transpose")
    found = norms(nn.Sequential(nn.ConvTranspose2d(3, 5, 2, 2)), [x], layer)["0.weight"]
    expected = x.transpose(0, 1).flatten(1).norm(dim=1)
    assert torch.allclose(found, expected.view(3, 1, 1, 1).expand(3, 5, 2, 2))


def test_streaming_over_batches_equals_one_full_pass() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 9, 2))
    data = torch.randn(12, 3, 5, 5)
    layers = (Layer("0", "0.weight", 0, 1, 1, "conv"), linear("2"))
    full, streamed = norms(model, [data], *layers), norms(model, list(data.split(5)), *layers)
    assert full.keys() == streamed.keys() == {"0.weight", "2.weight"}
    assert all(torch.allclose(full[name], streamed[name], rtol=1e-6) for name in full)


def test_a_weight_used_twice_adds_up_and_one_never_used_is_absent() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.idle = nn.Linear(4, 4, bias=False), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            out = self.used(x) + self.used(2 * x)
            assert isinstance(out, Tensor)
            return out

    x = torch.randn(6, 4)
    found = norms(Twice(), [x], linear("used"), linear("idle"))
    assert list(found) == ["used.weight"]
    assert torch.allclose(found["used.weight"][0], 5**0.5 * columns(x))


def test_copies_that_autocast_makes_are_the_same_weight() -> None:
    model, x = nn.Sequential(nn.Linear(4, 5)), torch.randn(6, 4)

    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                out = self.inner(x)
            assert isinstance(out, Tensor)
            return out

    found = norms(Cast(), [x], linear("inner.0"))["inner.0.weight"]
    assert torch.allclose(found[0], columns(x), rtol=2e-2)


def test_fused_transformer_layers_are_seen_through() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    found = norms(model, [torch.randn(2, 3, 8)], linear("linear1"), linear("linear2"))
    assert set(found) == {"linear1.weight", "linear2.weight"}
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_table_that_is_looked_up_has_no_input_and_the_reason_is_said() -> None:
    model, layer = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3)), linear("0", transposed=True)
    entities = {n: Entity(n, (n,), tuple(p.shape), 4, True, True) for n, p in model.named_parameters()}
    subject = Subject(model, Graph(entities, (), (), (layer,), (), {}), layers=(layer,))
    with untouched(model, 0):
        found = collect(subject, ["input_norm", "input_var"], Source([torch.tensor([1, 2])]))
    assert found.get("input_norm", "0.weight") is None and found.get("input_var", "0.weight") is None
    assert found.unread == {"0.weight": "embedding reads it: it looks up rows by index"}


def test_without_autograd_compound_products_are_read_as_they_stand() -> None:
    """Under inference mode `einsum` and `matmul` arrive whole."""
    x = torch.randn(2, 3, 4)
    for how in ("einsum", "right", "left"):
        with torch.inference_mode():
            found = norms(Matmul(how), [x], linear(""))["weight"]
        assert torch.allclose(found, columns(x).expand(5, 4), atol=1e-6)
