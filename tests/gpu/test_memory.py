"""A GPU that is really full: batches in halves, then hidden states on the CPU, then exit code 5."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

import prunella as pr
from prunella.errors import OutOfResources

WIDTH = 256


class Wide(nn.Module):
    """A residual block whose activations take `grow` times the memory of its input."""

    def __init__(self, grow: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, grow * WIDTH), nn.Linear(grow * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


@contextmanager
def limited(device: torch.device, free: int) -> Iterator[None]:
    """In the body torch may allocate so many bytes more."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(device) + free) / total, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
        torch.cuda.empty_cache()


def net(device: torch.device, blocks: int = 2, grow: int = 32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Wide(grow) for _ in range(blocks))).eval().to(device)


def test_large_batches_are_halved(real: torch.device) -> None:
    model, how = net(real), pr.llm.OneShot(pr.NM(2, 4), method=pr.solvers.sparsegpt)
    data = [torch.randn(64, 512, WIDTH, device=real) for _ in range(2)]  # 1 GiB of activations each
    with limited(real, 1 << 30):
        done = pr.llm.solve_(model, data[0][:1], how, data=data)
    assert any(not fit.skipped for fit in done.fits)


def test_what_does_not_fit_at_all_has_exit_code_5(real: torch.device) -> None:
    model = net(real, grow=64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = [torch.randn(1, 1 << 17, WIDTH, device=real)]
    with limited(real, 600 << 20), pytest.raises(OutOfResources) as caught:
        pr.llm.solve_(model, data[0][:, :8], pr.llm.OneShot(pr.NM(2, 4)), data=data)
    assert caught.value.exit_code == 5 and "smaller batches" in caught.value.todo
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())


def test_peak_memory_is_that_of_torch(real: torch.device) -> None:
    from prunella.measure.profile import peak_memory

    model, x = net(real), torch.randn(8, 128, WIDTH, device=real)
    assert peak_memory(model, x) >= sum(p.nbytes for p in model.parameters()) + 8 * 128 * 32 * WIDTH * 4
