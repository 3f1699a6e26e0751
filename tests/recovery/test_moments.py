from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import prunella as pr
from prunella.errors import CheckFailed, RequestError
from prunella.recovery.moments import correct_statistics


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 2, bias=False), nn.Flatten(2), nn.Linear(25, 8), nn.LayerNorm(8),
        nn.Linear(8, 4),
    ).double()  # fmt: skip


DATA = [torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(n)).double() + 1 for n in (4, 7)]


def _values(net: nn.Module, name: str, axis: int) -> Tensor:
    """All outputs of a module over the data, `(channels, values)`."""
    seen: list[Tensor] = []
    handle = net.get_submodule(name).register_forward_hook(lambda m, a, y: seen.append(y.movedim(axis, 0).flatten(1)))
    with torch.no_grad():
        for x in DATA:
            net.eval()(x)
    handle.remove()
    return torch.cat(seen, 1)


def _masked(net: nn.Module) -> nn.Module:
    plan = pr.plan(net, DATA[0], pr.Recipe(granularity=pr.Element()), target=pr.Sparsity(0.5))
    return pr.apply_(copy.deepcopy(net), plan)


def _same_statistics(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one.mean(1), other.mean(1), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(one.var(1), other.var(1), rtol=1e-10, atol=1e-10)


def test_mean_and_variance_of_every_corrected_layer_are_those_of_the_dense_model() -> None:
    net = _net()
    model = _masked(net)
    assert correct_statistics(model, net, DATA) == ("0", "4", "6")
    for name, axis in (("0", 1), ("4", -1), ("6", -1)):
        _same_statistics(_values(model, name, axis), _values(net, name, axis))
    pr.finalize(model)


def test_zeros_and_masks_and_the_dense_model_stay() -> None:
    net = _net()
    model, before = _masked(net), copy.deepcopy(net.state_dict())
    zeros = {name: p == 0 for name, p in model.named_parameters() if p.dim() > 1}
    flags = [m.training for m in model.modules()]
    correct_statistics(model, net, DATA)
    assert all(torch.equal(dict(model.named_parameters())[name] == 0, zero) for name, zero in zeros.items())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert [m.training for m in model.modules()] == flags
    assert not any(m._forward_hooks for m in model.modules())


def test_a_norm_takes_the_correction_when_it_is_named() -> None:
    net = _net()
    model = _masked(net)
    before = copy.deepcopy(model[4].state_dict())
    assert correct_statistics(model, net, DATA, names=["5"]) == ("5",)
    _same_statistics(_values(model, "5", -1), _values(net, "5", -1))
    assert all(torch.equal(value, before[name]) for name, value in model[4].state_dict().items())


def test_channels_that_were_cut_have_no_part_in_it() -> None:
    net = _net()
    plan = pr.plan(net, DATA[0], pr.Recipe(), target=pr.Sparsity(0.4))
    small = pr.shrink(net, plan)
    with pytest.raises(RequestError, match="pass plan="):
        correct_statistics(small, net, DATA)
    correct_statistics(small, net, DATA, plan=plan)
    kept = plan.cuts["0.bias"][0]
    assert len(kept) < 6
    _same_statistics(_values(small, "0", 1), _values(net, "0", 1)[kept])


def test_a_constant_channel_gets_the_mean() -> None:
    net = nn.Linear(3, 2).double()
    model = copy.deepcopy(net)
    with torch.no_grad():
        model.weight[0] = 0
    data = [torch.randn(50, 3).double()]
    correct_statistics(model, net, data)
    found, wanted = model(data[0]).detach(), net(data[0]).detach()
    assert found[:, 0].std() == 0 and found[0, 0].item() == pytest.approx(wanted[:, 0].mean().item(), rel=1e-12)


def test_what_cannot_be_corrected_is_told() -> None:
    net = _net()
    with pytest.raises(RequestError, match="not a module with a weight and a bias"):
        correct_statistics(_masked(net), net, DATA, names=["2"])
    with pytest.raises(CheckFailed, match="not finite"):
        correct_statistics(_masked(net), net, [DATA[0] * float("nan")])
