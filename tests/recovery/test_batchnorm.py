from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from prunella.errors import CheckFailed, RequestError
from prunella.recovery.batchnorm import absorb_bn, recalibrate_bn


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 5, 2), nn.BatchNorm2d(5)
    ).double()


def _data() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(n, 3, 6, 6, dtype=torch.float64) * n + 2 for n in (4, 7, 2)]


def _inputs(net: nn.Sequential, index: int, data: list[Tensor]) -> Tensor:
    """All values that reach module `index` in evaluation mode, as (channels, values)."""
    with torch.no_grad():
        seen = [net[:index].eval()(x) for x in data]
    return torch.cat([x.transpose(0, 1).flatten(1) for x in seen], 1)


def test_statistics_of_the_first_layer_are_the_exact_pooled_ones() -> None:
    net, data = _net(), _data()
    values = _inputs(net, 1, data)
    assert recalibrate_bn(net, data) == ("1", "5")
    torch.testing.assert_close(net[1].running_mean, values.mean(1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(net[1].running_var, values.var(1, unbiased=True), rtol=1e-12, atol=1e-12)


def test_in_one_pass_later_layers_see_batches_normalized_by_themselves() -> None:
    net, data = _net(), _data()
    replica = copy.deepcopy(net).eval()
    replica[1].train()
    with torch.no_grad():
        seen = torch.cat([replica[:5](x).transpose(0, 1).flatten(1) for x in data], 1)
    recalibrate_bn(net, data)
    torch.testing.assert_close(net[5].running_mean, seen.mean(1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(net[5].running_var, seen.var(1), rtol=1e-12, atol=1e-12)


def test_sequential_statistics_are_those_of_inference_in_every_layer() -> None:
    net, data = _net(), _data()
    recalibrate_bn(net, data, sequential=True)
    for index in (1, 5):
        values = _inputs(net, index, data)
        torch.testing.assert_close(net[index].running_mean, values.mean(1), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(net[index].running_var, values.var(1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sequential", [False, True])
def test_nothing_but_the_statistics_changes(sequential: bool) -> None:
    net = _net().train()
    net[4].eval()
    net[1].momentum, net[5].momentum = 0.3, None
    weights = [p.detach().clone() for p in net.parameters()]
    flags = [m.training for m in net.modules()]
    recalibrate_bn(net, _data(), sequential=sequential)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), weights, strict=True))
    assert [m.training for m in net.modules()] == flags
    assert (net[1].momentum, net[5].momentum) == (0.3, None)
    assert not any(m._forward_pre_hooks for m in net.modules())
    assert net[1].num_batches_tracked == 3 == net[5].num_batches_tracked


@pytest.mark.parametrize(
    ("norm", "shape"), [(nn.BatchNorm1d, (9, 2)), (nn.BatchNorm1d, (5, 2, 3)), (nn.BatchNorm3d, (3, 2, 2, 2, 2))]
)
def test_every_kind_of_batch_norm(norm: type[nn.Module], shape: tuple[int, ...]) -> None:
    net, x = norm(2), torch.randn(shape)
    recalibrate_bn(net, [x])
    values = x.transpose(0, 1).flatten(1)
    torch.testing.assert_close(net.running_mean, values.mean(1))
    torch.testing.assert_close(net.running_var, values.var(1))


def test_the_loss_is_how_the_model_is_run() -> None:
    net, x = nn.BatchNorm1d(2), torch.randn(9, 2)
    recalibrate_bn(net, [(x, "label")], loss=lambda model, batch: model(batch[0]).sum())
    torch.testing.assert_close(net.running_mean, x.mean(0))


def test_models_without_statistics_are_left_alone() -> None:
    assert recalibrate_bn(nn.Linear(2, 2), [torch.randn(3, 2)]) == ()
    assert recalibrate_bn(nn.BatchNorm1d(2, track_running_stats=False), [torch.randn(3, 2)]) == ()


@pytest.mark.parametrize("sequential", [False, True])
def test_values_that_are_not_finite_leave_the_old_statistics(sequential: bool) -> None:
    net, data = _net(), _data()
    recalibrate_bn(net, data)
    before = copy.deepcopy(net.state_dict())
    data[1][0, 0, 0, 0] = float("nan")
    with pytest.raises(CheckFailed, match="not finite"):
        recalibrate_bn(net, data, sequential=sequential)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_no_data_and_batches_of_one_value_are_refused() -> None:
    net = nn.BatchNorm1d(2)
    with pytest.raises(RequestError, match="no batches"):
        recalibrate_bn(net, [])
    with pytest.raises(RequestError, match="one value per channel"):
        recalibrate_bn(net, [torch.randn(1, 2)])
    recalibrate_bn(net, [torch.zeros(1, 2), torch.ones(1, 2)], sequential=True)
    assert net.running_mean.tolist() == [0.5, 0.5] and net.running_var.tolist() == [0.5, 0.5]


def _with_random_norms() -> nn.Sequential:
    net = _net().eval()
    for index in (1, 5):
        for values in (net[index].weight.data, net[index].bias.data, net[index].running_mean):
            values.normal_()
        net[index].running_var.uniform_(0.5, 2)
    return net


def test_absorbed_statistics_leave_the_function_as_it_was() -> None:
    net, data = _with_random_norms(), _data()
    before = [net(x) for x in data]
    assert absorb_bn(net, data) == ("1", "5")
    for x, expected in zip(data, before, strict=True):
        torch.testing.assert_close(net(x), expected, rtol=1e-9, atol=1e-9)
    for index in (1, 5):
        values = _inputs(net, index, data)
        torch.testing.assert_close(net[index].running_mean, values.mean(1), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(net[index].running_var, values.var(1), rtol=1e-9, atol=1e-9)


def test_training_mode_starts_from_the_absorbed_function() -> None:
    net, data = _with_random_norms(), [torch.cat(_data())]
    net[3].p = 0.0
    expected = net(data[0])
    absorb_bn(net, data)
    count = data[0].shape[0] * 16
    torch.testing.assert_close(net.train()(data[0]), expected, rtol=4 / count, atol=4 / count)  # biased variances


def test_nothing_is_absorbed_without_scale_and_bias_or_from_broken_data() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)).double()
    assert absorb_bn(net, _data()) == ()
    net, untouched = _with_random_norms(), _with_random_norms()
    with pytest.raises(CheckFailed, match="not finite"):
        absorb_bn(net, [torch.full((2, 3, 6, 6), torch.nan, dtype=torch.float64)])
    for key, value in untouched.state_dict().items():
        torch.testing.assert_close(net.state_dict()[key], value)


def test_norms_that_share_a_scale_absorb_nothing() -> None:
    net = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4)).eval()
    net[2].weight, net[2].bias = net[0].weight, net[0].bias
    data = [torch.randn(64, 4) * 3 + 1]
    before = net(data[0])
    assert absorb_bn(net, data) == ()
    torch.testing.assert_close(net(data[0]), before)


def test_a_scale_that_is_read_elsewhere_and_values_out_of_range_are_refused_and_nothing_changes() -> None:
    class Elsewhere(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) * self.norm.weight + self.norm.bias

    cases = (Elsewhere().eval(), torch.randn(64, 4) * 3 + 1), (nn.BatchNorm1d(4).eval(), torch.randn(64, 4) * 1e25)
    for net, data in cases:
        before = copy.deepcopy(net.state_dict())
        with pytest.raises(CheckFailed):
            absorb_bn(net, [data])
        assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
