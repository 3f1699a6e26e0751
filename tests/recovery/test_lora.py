from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunella as pr
from prunella.errors import CheckFailed, NotSupported, RequestError
from prunella.recovery.finetune import Training, finetune
from prunella.recovery.lora import mask_adapters_, merge_adapters_
from prunella.recovery.lr_schedules import constant_lr
from tests.hand import hand_plan
from tests.io.test_adapters import Adapted

X = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(3))


def _sparse(*, recorded: bool = True) -> nn.Sequential:
    """Two layers with 60 % zeros, and adapters on the first."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 4)).requires_grad_(False)
    masks = {name: torch.rand(model.get_parameter(name).shape) > 0.6 for name in ("0.weight", "2.weight")}
    pr.apply_(model, hand_plan(masks=masks))
    if not recorded:
        pr.finalize(model)
    model[0] = Adapted(model[0], 3)
    return model


def _train(model: nn.Module) -> None:
    data = [torch.randn(8, 12, generator=torch.Generator().manual_seed(1))]
    finetune(
        model,
        data,
        lambda m, b: (m(b) - 1).square().mean(),
        steps=8,
        lr=0.05,
        training=Training(lr_schedule=constant_lr),
    )


@pytest.mark.parametrize("recorded", [True, False])
def test_merging_keeps_every_zero_and_the_trained_function(recorded: bool) -> None:
    model = _sparse(recorded=recorded)
    zeros = {name: p == 0 for name, p in model.named_parameters() if "base" in name or "2." in name}
    assert mask_adapters_(model) == ("0",)
    _train(model)
    before = model.eval()(X)
    (merged,) = merge_adapters_(model)
    assert isinstance(model[0], nn.Linear) and set(dict(model.named_parameters())) == {
        "0.weight", "0.bias", "2.weight", "2.bias",
    }  # fmt: skip
    assert torch.equal(model[0].weight == 0, zeros["0.base.weight"]) and torch.equal(
        model[2].weight == 0, zeros["2.weight"]
    )
    torch.testing.assert_close(model(X), before, rtol=1e-5, atol=1e-5)
    assert merged.rank == 3 and merged.lost == 0 and merged.sparsity == float(zeros["0.base.weight"].double().mean())
    assert pr.masks_of(model).keys() == ({"0.weight", "2.weight"} if recorded else set())


def test_the_merged_weight_by_hand() -> None:
    model = _sparse().double()
    mask_adapters_(model)
    with torch.no_grad():
        model[0].lora_B.weight.normal_()
    base, mask = model[0].base.weight.clone(), pr.masks_of(model)["0.base.weight"]
    wanted = base + mask * (2.0 * model[0].lora_B.weight @ model[0].lora_A.weight)
    merge_adapters_(model)
    torch.testing.assert_close(model[0].weight, wanted, rtol=1e-12, atol=1e-12)


def test_an_adapter_that_was_trained_dense_is_refused_and_the_model_is_left_as_it_was() -> None:
    model = _sparse()
    _train(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckFailed, match=r"would lose \d\d\.\d% of its adapter"):
        merge_adapters_(model)
    assert isinstance(model[0], Adapted)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    product = (model[0].lora_B.weight @ model[0].lora_A.weight).detach()
    mask = pr.masks_of(model)["0.base.weight"]
    (merged,) = merge_adapters_(model, allow_loss=True)
    assert merged.lost == pytest.approx(float((product * ~mask).norm() / product.norm()), rel=1e-5)
    assert torch.equal(model[0].weight != 0, mask) and "lost" in str(merged)


def test_a_dense_base_loses_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Adapted(nn.Linear(12, 12), 4), nn.ReLU(), nn.Linear(12, 3)).eval()
    nn.init.normal_(model[0].lora_B.weight)
    before = model(X)
    (merged,) = merge_adapters_(model)
    assert merged.lost == merged.sparsity == 0
    torch.testing.assert_close(model(X), before, rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_the_masked_product() -> None:
    model = _sparse().double().eval()
    mask_adapters_(model)
    adapter = model[0]
    with torch.no_grad():
        adapter.lora_B.weight.normal_()
    mask = pr.masks_of(model)["0.base.weight"]
    a, b = (w.detach().clone().requires_grad_() for w in (adapter.lora_A.weight, adapter.lora_B.weight))
    by_hand = torch.nn.functional.linear(X.double(), adapter.base.weight + mask * (2.0 * b @ a), adapter.base.bias)
    by_hand.square().sum().backward()
    adapter(X.double()).square().sum().backward()
    torch.testing.assert_close(adapter.lora_A.weight.grad, a.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(adapter.lora_B.weight.grad, b.grad, rtol=1e-12, atol=1e-12)


def test_copies_and_pickles_have_hooks_of_their_own() -> None:
    model = _sparse().eval()
    mask_adapters_(model)
    assert mask_adapters_(model) == ()
    for replica in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            replica[0].lora_B.weight.normal_()
        before = replica(X)
        assert not torch.allclose(before, model(X))
        merge_adapters_(replica)
        torch.testing.assert_close(replica(X), before, rtol=1e-5, atol=1e-5)


class Other(nn.Module):
    """Adds something that no matrix is: an adapter with a nonlinearity."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(6, 5).requires_grad_(False)
        self.a, self.b = nn.Linear(6, 2, bias=False), nn.Linear(2, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.b(self.a(x).relu())
        return out


class Raw(nn.Module):
    """Factors as parameters `(in, r)` and `(r, out)`, and a base that stores its weight as `(in, out)`."""

    def __init__(self) -> None:
        super().__init__()
        self.base = Transposed().requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(6, 2)), nn.Parameter(torch.randn(2, 6))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + x @ self.a @ self.b * 0.5
        return out


class Transposed(nn.Module):
    """As GPT-2's Conv1D."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def test_what_adds_something_else_is_refused() -> None:
    with pytest.raises(NotSupported, match="does not add s B A x"):
        merge_adapters_(nn.Sequential(Other()))
    with pytest.raises(RequestError, match="no low-rank adapters"):
        merge_adapters_(nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 4), nn.Linear(4, 4)))


def test_factors_as_parameters_and_a_transposed_base() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Raw())
    with torch.no_grad():
        model[0].base.weight[1::2] = 0
    with pytest.raises(NotSupported, match="must be linear layers"):
        mask_adapters_(model)
    wanted = model[0].base.weight + 0.5 * model[0].a @ model[0].b
    merge_adapters_(model, allow_loss=True)
    assert torch.equal(model[0].weight[1::2], torch.zeros(3, 6))
    torch.testing.assert_close(model[0].weight[::2], wanted[::2], rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("masked", [True, False])
def test_adapters_of_peft(masked: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 4))
    pr.apply_(model, pr.plan(model, X, pr.Recipe(granularity=pr.NM(2, 4))))
    zeros = [model[i].weight == 0 for i in (0, 2)]
    config = peft.LoraConfig(r=3, lora_alpha=7, lora_dropout=0.1, target_modules=["0", "2"])
    model = peft.get_peft_model(model, config)
    if masked:
        assert len(mask_adapters_(model)) == 2
    _train(model)
    before = model.eval()(X)
    if not masked:
        with pytest.raises(CheckFailed, match="would lose"):
            merge_adapters_(model)
        return
    assert [m.rank for m in merge_adapters_(model)] == [3, 3]
    plain = model.get_base_model()
    assert type(plain) is nn.Sequential and [type(m) for m in plain] == [nn.Linear, nn.ReLU, nn.Linear]
    assert all(torch.equal(plain[i].weight == 0, zero) for i, zero in zip((0, 2), zeros, strict=True))
    torch.testing.assert_close(plain(X), before, rtol=1e-5, atol=1e-5)
    pr.finalize(plain)


@pytest.mark.filterwarnings("ignore")
def test_what_peft_adds_by_dora_is_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["0"], use_dora=True)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 6)), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    with pytest.raises(NotSupported, match="does not add s B A x"):
        merge_adapters_(model)
