"""Small networks of several kinds, and batches, made on the CPU from a seed and then moved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.devices.test_several import Stack
from tests.graphs import convnet, images

NETS: dict[str, tuple[Callable[[], nn.Module], list[Tensor]]] = {
    "convolutions": (convnet, images()),
    "transformer": (Stack, [torch.randn(6, 8, generator=torch.Generator().manual_seed(k)) for k in range(4)]),
}


def placed(name: str, device: torch.device) -> tuple[nn.Module, list[Tensor]]:
    """A network in evaluation mode, and its batches, on the device."""
    torch.manual_seed(0)
    make, data = NETS[name]
    return make().eval().to(device), [x.to(device) for x in data]


def close(here: dict[str, Any], there: dict[str, Any], *, rtol: float = 1e-3, atol: float = 1e-4) -> None:
    """Both states are the same up to the order of sums."""
    assert here.keys() == there.keys()
    for name, value in here.items():
        torch.testing.assert_close(value.cpu(), there[name].cpu(), rtol=rtol, atol=atol, msg=name)
