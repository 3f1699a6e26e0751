from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import Tensor, nn

import prunella as pr
from prunella.compress import int8
from prunella.compress.int8 import to_int8_
from prunella.compress.quantize import quantization_aware, quantize_weight, round_weights_
from prunella.errors import CheckFailed, MissingExtra, NotSupported, RequestError
from prunella.recovery.finetune import Training, finetune
from prunella.recovery.lr_schedules import constant_lr

X = torch.randn(6, 16, generator=torch.Generator().manual_seed(5))


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 4)).eval()


def _two_of_four() -> nn.Sequential:
    net = _net()
    pr.apply_(net, pr.plan(net, X, pr.Recipe(granularity=pr.NM(2, 4)), skip=["4"]))
    return net


def _zeros(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() == 0 for name, p in net.named_parameters() if p.dim() > 1}


def test_codes_by_hand() -> None:
    found = quantize_weight(torch.tensor([[127.0, -63.6, 0.4, 0.0], [0.0, 0.0, 0.0, 0.0], [-2.54, 0.01, 1.0, 0.0]]))
    assert found.codes.tolist() == [[127, -64, 0, 0], [0, 0, 0, 0], [-127, 0, 50, 0]]
    assert found.scale.flatten().tolist() == pytest.approx([1, 1, 0.02])
    assert found.codes.dtype is torch.int8 and found.stored_bits == 12 * 8 + 3 * 32


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shape", [(5, 7), (4, 3, 3, 3), (6,)])
def test_zero_stays_zero_and_the_error_is_half_a_step(bits: int, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight[0, ...] = torch.where(weight[0, ...] > 0, weight[0, ...], 0.0)
    found = quantize_weight(weight, bits=bits)
    assert torch.count_nonzero(found.weight()[weight == 0]) == 0
    assert bool(((found.weight() - weight).abs() <= found.scale / 2 * (1 + 1e-12)).all())
    top = 2 ** (bits - 1) - 1
    assert int(found.codes.abs().max()) == top and len(found.codes.unique()) <= 2 * top + 1
    rows = weight.flatten(1) if weight.dim() > 1 else weight[:, None]
    at = rows.abs().argmax(1)
    exact = found.weight().reshape(rows.shape).gather(1, at[:, None])
    torch.testing.assert_close(exact, rows.gather(1, at[:, None]), rtol=1e-12, atol=0)


def test_rounding_a_model_keeps_masks_and_the_pattern() -> None:
    net = _two_of_four()
    zeros = _zeros(net)
    rows = round_weights_(net, bits=4)
    assert [row.name for row in rows] == ["0.weight", "2.weight", "4.weight"]
    assert all(torch.equal(_zeros(net)[name] & zero, zero) for name, zero in zeros.items())
    assert bool((net[0].weight.unflatten(1, (-1, 4)) != 0).sum(-1).le(2).all())
    assert sum(row.new_zeros for row in rows) == sum(int(z.sum()) for z in _zeros(net).values()) - sum(
        int(z.sum()) for z in zeros.values()
    )
    assert 0 < rows[0].error < 0.2 and "are zero" in str(rows[0])
    pr.finalize(net)


def _loss(model: nn.Module, batch: Tensor) -> Tensor:
    return (model(batch) - 1).square().mean()


def test_the_loss_sees_rounded_weights_and_the_gradient_passes_the_rounding() -> None:
    net = _net().double()
    x = X.double()
    value = quantization_aware(_loss, bits=3)(net, x)
    value.backward()
    replica = copy.deepcopy(net)
    round_weights_(replica, bits=3)
    expected = _loss(replica, x)
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-12) and value.item() != _loss(net, x).item()
    for ours, theirs in zip(net.parameters(), replica.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-12)
    assert [n for n, _ in net.named_parameters()] == [n for n, _ in replica.named_parameters()]


def test_training_for_rounding_keeps_the_mask_and_helps() -> None:
    net = _two_of_four()
    masks = pr.masks_of(net)
    replica = copy.deepcopy(net)
    data = [X]
    how = Training(lr_schedule=constant_lr)
    finetune(net, data, quantization_aware(_loss, bits=2), steps=80, lr=0.01, training=how)
    finetune(replica, data, _loss, steps=80, lr=0.01, training=how)
    for model in (net, replica):
        assert all(torch.count_nonzero(model.get_parameter(n)[~mask]) == 0 for n, mask in masks.items())
        round_weights_(model, bits=2)
        assert all(torch.count_nonzero(model.get_parameter(n)[~mask]) == 0 for n, mask in masks.items())
    assert _loss(net, X) < 0.5 * _loss(replica, X)


def test_a_tied_weight_is_rounded_once_and_everywhere() -> None:
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    net[1].weight = net[0].weight
    x = torch.eye(4)
    rounded = quantize_weight(net[0].weight, bits=2).weight()
    found = quantization_aware(lambda m, b: m(b).sum(), bits=2)(net, x)
    assert found.item() == pytest.approx(float((rounded @ rounded).sum()), rel=1e-5)
    assert len(round_weights_(net)) == 1


def test_recurrent_layers_are_rounded_too() -> None:
    torch.manual_seed(0)
    net, x = nn.LSTM(4, 3), torch.randn(5, 2, 4)
    replica = copy.deepcopy(net)
    round_weights_(replica, bits=2)
    found = quantization_aware(lambda m, b: m(b)[0].square().sum(), bits=2)(net, x)
    assert found.item() == pytest.approx(replica(x)[0].square().sum().item(), rel=1e-6)
    assert found.item() != pytest.approx(net(x)[0].square().sum().item(), rel=1e-3)
    found.backward()
    assert net.weight_ih_l0.grad is not None and net._flat_weights[0] is net.weight_ih_l0


@pytest.mark.parametrize("activations", [False, True])
def test_int8_by_torchao_keeps_zeros_and_patterns(activations: bool, capfd: pytest.CaptureFixture[str]) -> None:
    _need_torchao()
    net = _two_of_four()
    zeros, before = _zeros(net), net(X)
    done = to_int8_(net, activations=activations)
    assert [row.name for row in done.layers] == ["0.weight", "2.weight", "4.weight"]
    for name, parameter in net.named_parameters():
        if parameter.dim() > 1:
            value = parameter.dequantize()
            assert torch.count_nonzero(value[zeros[name]]) == 0
            assert parameter.qdata.dtype is torch.int8  # type: ignore[attr-defined]
    kept = (net[0].weight.dequantize().unflatten(1, (-1, 4)) != 0).sum(-1)
    assert bool(kept.le(2).all())
    torch.testing.assert_close(net(X), before, atol=0.05, rtol=0.05)
    assert done.after < 0.5 * done.before and "int8" in str(done)
    assert all(0 < row.error < 0.01 and row.zeros == int(zeros[row.name].sum()) for row in done.layers)
    counted = pr.metrics.count(net)
    assert counted.bytes == done.after and counted.total - counted.nonzero == sum(
        row.zeros + row.new_zeros for row in done.layers
    )
    assert capfd.readouterr() == ("", "")
    with pytest.raises(NotSupported, match="cannot be saved"):
        pr.save(net, "never-written")


def test_the_weights_are_those_of_our_own_rounding() -> None:
    _need_torchao()
    net = _net()
    ours = {n: quantize_weight(p).codes for n, p in net.named_parameters() if p.dim() > 1}
    to_int8_(net)
    for name, codes in ours.items():
        theirs = net.get_parameter(name).qdata  # type: ignore[attr-defined]
        assert int((theirs.int() - codes.int()).abs().max()) <= 1


def _need_torchao() -> None:
    try:
        int8._torchao(False)
    except (MissingExtra, NotSupported) as error:
        pytest.skip(str(error))


def test_what_is_not_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match="torchao"):
        to_int8_(_net())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())

    def broken(name: str) -> object:
        raise RuntimeError("undefined symbol: x\nand more")

    monkeypatch.setattr("prunella.compress.int8.importlib.import_module", broken)
    with pytest.raises(NotSupported, match="undefined symbol: x"):
        to_int8_(_net())
    assert logging.root.manager.disable == logging.NOTSET


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(RequestError, match="bits=1"):
        quantize_weight(torch.ones(2, 2), bits=1)
    with pytest.raises(RequestError, match="bits=9"):
        quantization_aware(_loss, bits=9)
    with pytest.raises(RequestError, match="not finite"):
        quantize_weight(torch.tensor([[float("nan")]]))
    with pytest.raises(RequestError, match="names no weight"):
        round_weights_(_net(), only=["7.*"])
    with pytest.raises(RequestError, match="one text"):
        round_weights_(_net(), only="0.weight")
    from prunella.compress.quantize import compare

    with pytest.raises(CheckFailed, match="1 zeros of w"):
        compare("w", torch.tensor([0.0, 1.0]), torch.tensor([0.1, 1.0]), 8)
