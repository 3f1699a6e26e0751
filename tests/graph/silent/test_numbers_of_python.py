"""Values and sizes that become numbers of Python, and index or slice there: no wrong cut on other inputs."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

import prunella as pr
from prunella.errors import PruningError


class Net(nn.Module):
    """`side` changes what the units of `a` are for `c`, on some inputs."""

    TABLE: ClassVar = {60: 1}
    LIMITS = (60,)

    def __init__(self, side: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(8, 16), nn.Linear(16, 4)
        self.known, self.side = {80: 1}, side

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.side(self, self.a(x).relu(), x))


def _turned(h: Tensor, k: int) -> Tensor:
    return torch.cat([h[:, k:], h[:, :k]], -1)


def _third_read(net: nn.Module, h: Tensor, x: Tensor) -> Tensor:
    for k in range(4):
        if x[0, k] > 1000 and k == 2:
            h = h.flip(-1)
    return h


def _first_argument(this: Net, h: Tensor, x: Tensor) -> Tensor:
    return h.flip(-1) if len(x) in this.LIMITS else h


def _in_attribute(net: Net, h: Tensor, x: Tensor) -> Tensor:
    return h.flip(-1) if int(x.abs().sum()) in net.known else h


def _class_table(net: Net, h: Tensor, x: Tensor) -> Tensor:
    return h - h.mean(net.TABLE.get(len(x), 0), keepdim=True)


LARGE, LONG, FIVES = torch.rand(2, 8) * 5000 + 1001, torch.rand(60, 8), torch.full((2, 8), 5.0)
THIRD = -torch.rand(2, 8).index_fill(1, torch.tensor([2]), -2000.0)
FIFTH = -torch.rand(2, 8).index_fill(1, torch.tensor([5]), -1.0)
CASES: dict[str, tuple[Callable[..., Tensor], Tensor]] = {
    "float": (lambda n, h, x: h.flip(-1) if float(x.max()) > 1000 else h, LARGE),
    "floor": (lambda n, h, x: h.flip(-1) if math.floor(x.max()) > 1000 else h, LARGE),
    "slice by a value": (lambda n, h, x: _turned(h, int((x > 1000).sum())), LARGE),
    "index by a value": (lambda n, h, x: (h, h.flip(-1))[int(x.max() > 1000)], LARGE),
    "dimension by a value": (lambda n, h, x: h - h.mean(int((x > 1000).any()), keepdim=True), LARGE),
    "slice by argmax": (lambda n, h, x: _turned(h, int(x[0].argmax().item())), FIFTH),
    "third read": (_third_read, THIRD),
    "value in an attribute": (_in_attribute, FIVES),
    "table of the class": (_class_table, LONG),
    "tuple of the class": (_first_argument, LONG),
    "index by a length": (lambda n, h, x: (h, h.flip(-1))[len(x) > 50], LONG),
    "slice by a length": (lambda n, h, x: _turned(h, len(x) // 50), LONG),
}


@pytest.mark.parametrize("name", CASES)
def test_no_cut_is_wrong_where_the_number_is_another(name: str) -> None:
    side, other = CASES[name]
    torch.manual_seed(0)
    net, x = Net(side).eval(), -torch.rand(2, 8)
    x[0, 0] = 0
    for _ in range(20):  # Python replaces instructions of functions that run often
        net(x)
    try:
        plan = pr.plan(net, x, target=pr.Params(0.6))
    except PruningError as error:
        assert "is another" in str(error) or "on an input of" in str(error)  # the reason
        return
    small, masked = pr.shrink(net, plan), pr.apply_(copy.deepcopy(net), plan)
    with torch.no_grad():
        for batch in (x, other):
            torch.testing.assert_close(small(batch), masked(batch), rtol=1e-4, atol=1e-4)
