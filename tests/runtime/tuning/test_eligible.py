"""Which layers a kernel can take is read from the products that a module computes, not from its class."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import prunella as pr
from prunella.runtime.layers import SparseConv2d, SparseLinear
from prunella.runtime.restore import restored
from prunella.runtime.tuning.choice import Geometry
from prunella.runtime.tuning.eligible import LayerForm, form_of, read_layers
from tests.runtime.standin import Calls


class Own(nn.Module):
    """A module with a weight of its own, whose forward is a function of module and input."""

    def __init__(self, run: Callable[[Own, Tensor], Tensor], *shape: int, bias: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.run, self.weight = run, nn.Parameter(torch.randn(shape, generator=generator))
        self.bias = nn.Parameter(torch.randn(bias, generator=generator)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


READ: dict[str, tuple[Own, tuple[int, ...], LayerForm]] = {
    "matmul": (Own(lambda m, x: x @ m.weight, 4, 6), (3, 5, 4), LayerForm(True)),
    "matmul and bias": (Own(lambda m, x: x @ m.weight + m.bias, 4, 4, bias=4), (3, 4), LayerForm(True)),
    "einsum": (Own(lambda m, x: torch.einsum("...i,oi->...o", x, m.weight), 6, 4), (3, 5, 4), LayerForm()),
    "addmm": (Own(lambda m, x: torch.addmm(m.bias, x, m.weight), 4, 6, bias=6), (3, 4), LayerForm(True)),  # type: ignore[call-overload]
    "tensordot": (Own(lambda m, x: torch.tensordot(x, m.weight, dims=1), 4, 6), (3, 5, 4), LayerForm(True)),
    "same": (
        Own(lambda m, x: functional.conv2d(x, m.weight, padding="same"), 6, 4, 3, 3),
        (2, 4, 7, 7),
        LayerForm(False, Geometry((3, 3), (1, 1), (1, 1), (1, 1))),
    ),
}


@pytest.mark.parametrize("name", READ)
def test_a_module_that_multiplies_by_its_weight_is_a_layer(name: str) -> None:
    module, shape, expected = READ[name]
    form = form_of(module, shape)
    assert form == expected
    x = torch.randn(shape)
    torch.testing.assert_close(expected.product(module, x), module(x))


def spread(m: Own, x: Tensor) -> Tensor:
    return functional.conv_transpose2d(x, m.weight)


OTHER: dict[str, tuple[Own, tuple[int, ...], str]] = {
    "activation": (Own(lambda m, x: functional.linear(x, m.weight).relu(), 4, 4), (3, 4), "also calls relu"),
    "constant": (Own(lambda m, x: functional.linear(x, m.weight) + 2, 4, 4), (3, 4), "more than multiply"),
    "twice": (Own(lambda m, x: x @ m.weight @ m.weight, 4, 4), (3, 4), "multiply by it once"),
    "axes": (Own(lambda m, x: (x.transpose(1, 2) @ m.weight).transpose(1, 2), 4, 4), (2, 4, 4), "more than multiply"),
    "groups": (Own(lambda m, x: functional.conv2d(x, m.weight, groups=2), 4, 2, 1, 1), (1, 4, 3, 3), "2 groups"),
    "transposed": (Own(spread, 4, 2, 2, 2), (1, 4, 3, 3), "transposed convolution"),
    "distances": (Own(lambda m, x: torch.cdist(x, m.weight), 4, 4), (3, 4), "it computes distances"),
    "values": (Own(lambda m, x: x if x.sum() > 1e9 else x @ m.weight, 4, 4), (3, 4), "also calls sum"),
}


@pytest.mark.parametrize("name", OTHER)
def test_another_module_is_not_a_layer_and_the_reason_is_named(name: str) -> None:
    module, shape, why = OTHER[name]
    form = form_of(module, shape)
    assert isinstance(form, str) and why in form


class Mixed(nn.Module):
    """One weight for each kind of reason."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.attention = nn.Embedding(9, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.steps, self.own = nn.LSTM(8, 8, batch_first=True), Own(lambda m, x: x @ m.weight, 8, 8)
        self.idle = nn.Linear(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        x = x + self.attention(x, x, x)[0]
        out: Tensor = self.own(self.steps(x)[0])
        return out


def test_every_other_matrix_is_named_with_the_reason_that_all_parts_share() -> None:
    layers = read_layers(Mixed().eval().requires_grad_(False), torch.arange(6).reshape(2, 3))
    assert set(layers.forms) == {"own"}
    assert layers.others["words"] == "embedding reads it: it looks up rows by index"
    assert layers.others["steps.weight_ih_l0"] == "lstm reads it: its steps run inside one call, which hides them"
    assert "does more than multiply" in layers.others["attention.in_proj_weight"]
    assert "does more than multiply" in layers.others["attention.out_proj"]
    assert layers.others["idle"] == "the example does not call it"


def zeros_(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data *= torch.rand(parameter.shape, generator=torch.Generator().manual_seed(1)) > 0.8
    return model.eval()


@pytest.mark.usefixtures("eager_to_skip", "kernels")
def test_a_layer_of_any_class_skips_its_zeros_and_is_restored_as_that_class() -> None:
    own = Own(lambda m, x: x @ m.weight + m.bias, 8, 6, bias=6)
    model = zeros_(nn.Sequential(own, nn.Unflatten(1, (6, 1, 1)), nn.Conv2d(6, 4, 1, padding="same")))
    x = torch.randn(5, 8)
    quick = pr.sparse(model, x, fuse=False)
    assert isinstance(quick[0], SparseLinear) and isinstance(quick[2], SparseConv2d)  # type: ignore[index]
    torch.testing.assert_close(quick(x), model(x), rtol=1e-4, atol=1e-4)
    back = restored(quick)
    assert type(back[0]) is Own  # type: ignore[index]
    assert back.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(back(x), model(x)) and torch.equal(back[0].weight, own.weight)  # type: ignore[index]


@pytest.mark.usefixtures("eager_to_skip")
def test_the_record_names_the_matrices_with_zeros_that_no_kernel_takes(kernels: Calls) -> None:
    record = pr.runtime.sparsified(pr.sparse(zeros_(Mixed()), torch.arange(6).reshape(2, 3)))
    assert {layer.name for layer in record.layers} == {"own", "idle"}
    assert "words" in {other.name for other in record.others}
    assert "words  " in str(record) and "it looks up rows by index" in str(record)
