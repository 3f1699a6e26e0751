"""Norms that are functions, identities between, and modules that cannot be followed do not keep layers from fusing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional

import prunella as pr
from prunella.runtime.fx.fuse import traced
from prunella.runtime.kernels.config import Activation
from prunella.runtime.layers import FoldedConv2d, SparseConv2d
from prunella.runtime.restore import restored
from tests.runtime.test_sparse import with_zeros

IMAGE = torch.linspace(-2, 2, 2 * 3 * 81).view(2, 3, 9, 9)


class NormAct(nn.BatchNorm2d):
    """A batch norm with its activation, as image libraries have it: tensors of a norm, but calls of functions."""

    def __init__(self, wide: int, act: nn.Module) -> None:
        super().__init__(wide)
        self.drop, self.act = nn.Identity(), act

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, f"four axes are needed, not {x.ndim}")
        y = functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps
        )
        return self.act(self.drop(y))


class Padded(nn.Conv2d):
    """A convolution whose padding depends on the image: no trace can follow the question."""

    def forward(self, x: Tensor) -> Tensor:
        x = functional.pad(x, (0, 1, 0, 1)) if x.shape[-1] % 2 else x
        return functional.conv2d(x, self.weight, self.bias, stride=2)


class Gate(nn.Module):
    """Asks for a value, with a layer inside."""

    def __init__(self, wide: int) -> None:
        super().__init__()
        self.inner = nn.Conv2d(wide, wide, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return y if float(y.abs().sum()) >= 0 else -y


class Net(nn.Module):
    """All of it in one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first = Padded(3, 8, 2), NormAct(8, nn.ReLU6())
        self.wide, self.second = nn.Conv2d(8, 16, 1, bias=False), NormAct(16, nn.Hardswish())
        self.deep, self.third = nn.Conv2d(16, 16, 3, padding=1, groups=16), NormAct(16, nn.ReLU6(inplace=True))
        self.gate, self.none, self.last = Gate(16), nn.Identity(), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.third(self.deep(self.second(self.wide(self.first(self.stem(x))))))
        return functional.relu6(self.last(self.none(self.gate(y))))


def net() -> nn.Module:
    torch.manual_seed(0)
    return with_zeros(Net(), 0.4)


@pytest.mark.usefixtures("eager_to_skip", "kernels")
def test_norms_that_are_functions_join_what_is_before_them() -> None:
    model = net()
    made = pr.sparse(model, IMAGE)
    assert isinstance(made, GraphModule)
    wide, deep, last = (made.get_submodule(name) for name in ("wide", "deep", "last"))
    assert isinstance(wide, SparseConv2d) and wide.norm_path == "second" and wide.activation is Activation.HARDSWISH
    assert isinstance(deep, FoldedConv2d) and deep.norm_path == "third" and deep.activation is Activation.RELU6
    assert isinstance(last, SparseConv2d) and last.activation is Activation.RELU6
    steps = [str(node.target) for node in made.graph.nodes if node.op == "call_module"]
    assert steps == ["stem", "first", "first.act", "wide", "deep", "gate", "last"]
    assert not [node for node in made.graph.nodes if node.op in ("call_function", "get_attr")]


@pytest.mark.usefixtures("eager_to_skip", "kernels")
@pytest.mark.parametrize("size", [8, 9, 13])
def test_the_output_is_that_of_the_dense_model_for_other_images_too(size: int) -> None:
    model = net()
    made = pr.sparse(model, IMAGE)
    assert isinstance(made.get_submodule("gate.inner"), SparseConv2d)  # inside what could not be followed
    assert set(pr.runtime.sparsified(made).replaced) == {"wide", "gate.inner", "last"}
    x = torch.randn(3, 3, size, size)
    with torch.no_grad():
        want = copy.deepcopy(model).double()(x.double())
        torch.testing.assert_close(made(x).double(), want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(copy.deepcopy(made)(x), made(x))


@pytest.mark.usefixtures("eager_to_skip", "kernels")
def test_no_tensor_is_lost_and_a_folder_gives_the_model_back(tmp_path: Path) -> None:
    model = net()
    made = pr.sparse(model, IMAGE)
    want = {name: tensor.tolist() for name, tensor in model.state_dict().items()}
    assert {name: tensor.tolist() for name, tensor in restored(made).state_dict().items()} == want
    pr.runtime.save_sparse(made, tmp_path / "net", factory=net)
    again = pr.runtime.load_sparse(tmp_path / "net", factory=net)
    assert isinstance(again.get_submodule("gate.inner"), SparseConv2d)
    torch.testing.assert_close(again(IMAGE), made(IMAGE))


class Checked(nn.Module):
    """A batch norm as a function in the middle of other things."""

    def __init__(self, body: Callable[[Checked, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.norm, self.body = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), body

    def called(self, x: Tensor, *, training: bool = False, eps: float = 1e-5) -> Tensor:
        norm = self.norm
        return functional.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, training, 0.1, eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self, self.conv(x))


KEPT: dict[str, Callable[[Checked, Tensor], Tensor]] = {
    "called twice": lambda m, x: m.called(m.called(x)),
    "in training": lambda m, x: m.called(x, training=True),
    "another eps": lambda m, x: m.called(x, eps=0.5),
}


@pytest.mark.parametrize("what", KEPT)
def test_a_norm_that_is_more_than_one_module_stays_a_function(what: str) -> None:
    torch.manual_seed(0)
    model = Checked(KEPT[what]).eval()
    program = traced(model, {}, IMAGE)
    assert program is not None  # a program that differs is none
    assert [node.target for node in program.graph.nodes if node.target is functional.batch_norm]
    torch.testing.assert_close(program(IMAGE), model(IMAGE))
    once = traced(Checked(lambda m, x: m.called(x)).eval(), {}, IMAGE)
    assert once is not None and [node.target for node in once.graph.nodes if node.op == "call_module"] == [
        "conv",
        "norm",
    ]


@pytest.mark.usefixtures("eager_to_skip", "kernels")
@pytest.mark.parametrize("fits", [lambda x: x.shape[0] < 3, lambda x: x.shape == IMAGE.shape])
def test_a_check_of_sizes_stays(fits: Callable[[Tensor], bool]) -> None:
    class Few(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            torch._assert(fits(x), "few")
            return self.conv(x)

    made = pr.sparse(with_zeros(Few(), 0.5), IMAGE)
    assert isinstance(made, GraphModule)
    with pytest.raises(AssertionError, match="few"):
        made(IMAGE.repeat(2, 1, 1, 1))


def test_an_identity_that_somebody_listens_to_stays() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Identity(), nn.ReLU()).eval()
    called: list[int] = []
    model[1].register_forward_hook(lambda *_: called.append(1))
    program = traced(model, {}, IMAGE)
    assert program is not None
    called.clear()
    program(IMAGE)
    assert called == [1]
