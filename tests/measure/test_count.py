"""Counts against numbers worked by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from prunella.errors import RequestError
from prunella.measure.count import compression, count, count_work, measured_macs


class LeNet(nn.Module):
    """LeCun et al. 1998 with 6 and 16 filters, no padding."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(256, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.conv1(x).relu(), 2)
        x = nn.functional.max_pool2d(self.conv2(x).relu(), 2).flatten(1)
        out: Tensor = self.fc3(self.fc2(self.fc1(x).relu()).relu())
        return out


def test_lenet() -> None:
    net, image = LeNet(), torch.zeros(1, 1, 28, 28)
    assert dict(count_work(net, image).by_module) == {
        "conv1": 86_400,  # 6 * 1 * 25 * 24 * 24
        "conv2": 153_600,  # 16 * 6 * 25 * 8 * 8
        "fc1": 256 * 120,
        "fc2": 120 * 84,
        "fc3": 84 * 10,
    }
    assert measured_macs(net, image) == 86_400 + 153_600 + 30_720 + 10_080 + 840
    assert count(net).params == 156 + 2416 + 30_840 + 10_164 + 850
    assert net.training


@pytest.mark.parametrize(
    ("layer", "shape", "macs"),
    [
        (nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2), (2, 4, 8, 8), 2 * 8 * 2 * 9 * 4 * 4),
        (nn.Conv2d(4, 4, 3, dilation=2, groups=4), (1, 4, 9, 9), 4 * 1 * 9 * 5 * 5),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), (1, 4, 5, 5), 4 * 6 * 4 * 25),
        (nn.Linear(7, 3), (2, 5, 7), 2 * 5 * 7 * 3),
    ],
)
def test_macs_from_real_geometry(layer: nn.Module, shape: tuple[int, ...], macs: int) -> None:
    assert measured_macs(layer, torch.zeros(shape)) == macs


class Attention(nn.Module):
    """Grouped queries: 4 heads share 2 of keys and values."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v)


def test_attention_counts_two_products() -> None:
    q, k, v = torch.zeros(2, 4, 5, 8), torch.zeros(2, 4, 7, 8), torch.zeros(2, 4, 7, 8)
    assert measured_macs(Attention(), (q, k, v)) == 2 * 4 * 5 * 7 * (8 + 8)


def test_tied_weights_count_once_and_scopes_differ() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4, bias=False))
    net[2].weight = net[0].weight
    with torch.no_grad():
        net[0].weight[0] = 0
        net[0].bias.zero_()
    weights, everything = count(net), count(net, scope="parameters")
    assert weights.params == 16 + 4 + 4 + 4
    assert weights.bytes == 4 * (16 + 4 + 4 + 4 + 4 + 4) + 8  # running mean and variance, and an int64 counter
    assert (weights.nonzero, weights.total, weights.sparsity) == (12, 16, 0.25)
    # the first row, the bias, and the normalization's shift are zero
    assert (everything.nonzero, everything.total) == (12 + 4, 28)
    assert str(weights) == "28 parameters, 152 B, 25.0% of the weights are zero"


def test_compression() -> None:
    assert compression(100, 25) == 4
    with pytest.raises(RequestError, match="nothing remains"):
        compression(1, 0)
    with pytest.raises(RequestError, match="unknown scope"):
        count(nn.Linear(1, 1), scope="all")  # type: ignore[arg-type]
