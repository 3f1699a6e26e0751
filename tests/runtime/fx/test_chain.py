"""Convolutions that follow each other run in one step, and as their layers would wherever that is not certain."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import prunella as pr
from prunella.runtime.fx.chain import Chain
from prunella.runtime.kernels import chain as kernel_chain
from prunella.runtime.kernels.chain import ChainStep
from prunella.runtime.layers import SparseConv2d
from tests.runtime.standin import Calls
from tests.runtime.test_sparse import IMAGE, net, with_zeros

pytestmark = pytest.mark.usefixtures("eager_to_skip", "kernels")


class Called(list[str]):
    """Layers whose own forward ran."""


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Called:
    found, forward = Called(), SparseConv2d.forward

    def spied(self: SparseConv2d, x: Tensor, residual: Tensor | None = None) -> Tensor:
        found.append(self.norm_path)
        return forward(self, x, residual)

    monkeypatch.setattr(SparseConv2d, "forward", spied)
    return found


def pair() -> tuple[nn.Module, GraphModule, Chain]:
    """A dense model, the one that skips its zeros, and the chain in it."""
    dense = net()
    made = pr.sparse(dense, IMAGE)
    assert isinstance(made, GraphModule)
    (chain,) = (module for module in made.modules() if isinstance(module, Chain))
    return dense, made, chain


def agree(dense: nn.Module, made: nn.Module, x: Tensor = IMAGE) -> None:
    torch.testing.assert_close(made(x), dense(x), equal_nan=True, rtol=1e-4, atol=1e-4)


def test_the_wiring_is_worked_by_hand() -> None:
    *_, chain = pair()
    # places: 0 the image, 1 what `one` gives, 2 what `side` gives, 3 what `two` gives with that added
    assert chain.steps == (ChainStep(0, None), ChainStep(0, None, (0,)), ChainStep(1, 2, (1, 2)))
    assert chain.outputs == (3,)


def test_what_is_read_elsewhere_comes_out() -> None:
    dense = net(tangled=True)
    made = pr.sparse(dense, IMAGE)
    (chain,) = (module for module in made.modules() if isinstance(module, Chain))
    assert len(chain.outputs) == 2
    with torch.inference_mode():
        agree(dense, made)


def test_nothing_is_in_between(called: Called, kernels: Calls) -> None:
    dense, made, _ = pair()
    del called[:], kernels[:]
    for image in (IMAGE, IMAGE[:1, :, :3], IMAGE.contiguous(memory_format=torch.channels_last)):
        with torch.inference_mode():
            agree(dense, made, image)
    assert called == [] and sum(name.startswith("conv2d") for name in kernels) == 9
    assert not any(name.startswith("pack") for name in kernels)  # nothing was laid out again


def odd(made: GraphModule) -> Tensor:
    x = IMAGE.clone()
    x[0, 0, 0, 0] = torch.inf
    return x


def hooked(made: GraphModule) -> Tensor:
    made.get_submodule("0.two").register_forward_hook(lambda *_: None)
    return IMAGE


def training(made: GraphModule) -> Tensor:
    made.get_submodule("0.two.norm").train()
    return IMAGE


@pytest.mark.parametrize("spoil", [odd, hooked, training])
def test_the_layers_themselves_run_where_something_is_unusual(called: Called, spoil: Callable[..., Tensor]) -> None:
    dense, made, _ = pair()
    x = spoil(made)
    if spoil is training:
        dense.get_submodule("0.second").train()
    del called[:]
    with torch.inference_mode():
        agree(dense, made, x)
    assert len(called) == 3


def test_an_image_of_odd_strides_is_left_to_the_layers(called: Called) -> None:
    _, made, chain = pair()
    layers: Any = [made.get_submodule(f"0.{name}") for name in ("one", "side", "two")]
    x = IMAGE.transpose(2, 3).contiguous().transpose(2, 3)
    del called[:]
    with torch.inference_mode():
        (y,) = chain((x,), layers)
        assert len(called) == 3
        torch.testing.assert_close(y, chain((IMAGE,), layers)[0])
    assert len(called) == 3


def test_the_layers_themselves_run_under_autocast_and_with_gradients(called: Called) -> None:
    dense, made, _ = pair()
    del called[:]
    agree(dense, made)  # gradients are on, though nothing wants one
    assert called == []
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(made(IMAGE), dense(IMAGE), atol=0.05, rtol=0.05)
    assert len(called) == 3
    x = IMAGE.clone().requires_grad_()
    made(x).sum().backward()
    wanted = IMAGE.clone().requires_grad_()
    dense(wanted).sum().backward()
    torch.testing.assert_close(x.grad, wanted.grad)
    assert len(called) == 6
    made.get_submodule("0.side").values.requires_grad_()  # type: ignore[union-attr]
    made(IMAGE).sum().backward()
    assert len(called) == 9 and made.get_submodule("0.side").values.grad is not None


def test_kernels_that_refuse_leave_all_to_the_layers(called: Called, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, made, _ = pair()
    asked = list[Any]()
    monkeypatch.setattr(kernel_chain, "run", lambda *given: asked.append(given))
    del called[:]
    with torch.inference_mode():
        agree(dense, made)
    assert len(called) == 3 and len(asked) == 1


@torch.no_grad()
def test_a_change_of_a_layer_is_seen(called: Called) -> None:
    dense, made, _ = pair()
    agree(dense, made)
    del called[:]
    dense.get_submodule("0.first").weight.mul_(2.0)  # type: ignore[operator]
    made.get_submodule("0.one.norm").weight.mul_(2.0)  # type: ignore[operator]
    agree(dense, made)
    other: Any = copy.deepcopy(made.get_submodule("0.side"))
    other.values.mul_(-1.0)
    dense.get_submodule("0.side").weight.mul_(-1.0)  # type: ignore[operator]
    dense.get_submodule("0.side").bias.mul_(-1.0)  # type: ignore[operator]
    other.bias.mul_(-1.0)
    made.get_submodule("0").side = other
    agree(dense, made)
    assert called == []


@torch.inference_mode()
def test_a_copy_makes_its_own_layouts(called: Called) -> None:
    dense, made, chain = pair()
    agree(dense, made)
    replica = copy.deepcopy(made)
    (other,) = (module for module in replica.modules() if isinstance(module, Chain))
    assert chain.plans.prepared and not other.plans.prepared
    del called[:]
    agree(dense, replica)
    assert other.plans.prepared and called == []
    assert replica.state_dict().keys() == made.state_dict().keys()


@torch.inference_mode()
def test_the_number_of_plans_has_an_end() -> None:
    dense, made, chain = pair()
    for size in range(3, 40):
        agree(dense, made, torch.randn(1, 8, size, 3))
    assert 0 < len(chain.plans.prepared) <= 16


class Sides(nn.Module):
    """Two ways whose results are of one size for images of 5 x 5, and not for others."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.side = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.main(x) + self.side(x))


@torch.inference_mode()
def test_a_residual_of_another_size_is_spread_or_refused_as_in_dense_code() -> None:
    torch.manual_seed(0)
    with torch.inference_mode(False):
        dense = with_zeros(Sides())
        made = pr.sparse(dense, IMAGE)
    assert any(isinstance(module, Chain) for module in made.modules())
    agree(dense, made)
    agree(dense, made, torch.randn(1, 8, 3, 3))  # 1 x 1 and 2 x 2
    for model in (dense, made):
        with pytest.raises(RuntimeError):
            model(torch.randn(1, 8, 7, 7))


def test_a_compiler_follows_it() -> None:
    dense, made, _ = pair()
    torch._dynamo.reset()
    compiled = torch.compile(made, fullgraph=True, backend="eager")
    with torch.no_grad():
        agree(dense, compiled)


def test_one_layer_alone_is_no_chain() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 1), nn.MaxPool2d(2), nn.Conv2d(8, 8, 1)).eval()
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight[:, ::2] = 0
    made = pr.sparse(model, IMAGE)
    assert len(pr.runtime.sparsified(made).replaced) == 2 and not any(isinstance(m, Chain) for m in made.modules())
    with torch.inference_mode():
        agree(model, made)
