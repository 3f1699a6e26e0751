"""Predictions of memory against sums by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import prunella as pr
from prunella.errors import RequestError
from prunella.llm.blocks import BlockCall
from prunella.llm.streaming.memory import Live, Peak, forward_bytes, largest, parse_bytes, solver_bytes
from prunella.solvers import Solved


@pytest.mark.parametrize(
    ("text", "size"),
    [("4GB", 4 * 10**9), ("1.5 gib", 3 * 2**29), ("800MB", 8 * 10**8), ("2g", 2 * 10**9), ("17", 17), (5, 5)],
)
def test_amounts(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "0GB", "-1GB", "1XB", "1 G B", "4BB"])
def test_amounts_that_are_none(text: str) -> None:
    with pytest.raises(RequestError, match="cannot read the amount"):
        parse_bytes(text)


def test_live_counts_what_is_there_at_the_same_time() -> None:
    before = torch.zeros(1000)
    with Live() as live:
        a = before + 1  # 4000
        b = a.view(10, 100)  # the same memory
        c = a * 2  # 8000
        del a, b
        d = c.sum()  # 4004 after the first went
        c.add_(1)
    assert live.peak == 8000 and live.now == 4004 and float(d) == 2000


class Wide(nn.Module):
    """Two layers between which the stream is eight times as wide."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 128, bias=False), nn.Linear(128, 16, bias=False)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x) * scale))


def test_a_pass_is_counted_without_data() -> None:
    block, one = Wide().to("meta"), 10 * 128 * 4
    call = BlockCall((torch.zeros(10, 16),), {"scale": torch.ones(128)})
    assert forward_bytes(block, call, trained=False) == 2 * one  # one is made of another that then goes
    assert forward_bytes(block, call, trained=True) >= 3 * one  # the gradient needs what a pass alone lets go


def test_a_solver_is_measured_small_and_scaled() -> None:
    def squares(weight: torch.Tensor, gram: torch.Tensor, pattern: pr.Element, *, sparsity: float) -> Solved:
        held = [gram.double() for _ in range(3)]
        return Solved(weight, weight > held[0].sum(), 0.0)

    how = pr.llm.OneShot(method=squares)  # type: ignore[arg-type]
    found, columns = solver_bytes(how, 768, 1536), 1536**2
    assert columns * (4 + 3 * 8) <= found <= 1.5 * columns * (4 + 3 * 8) + 2 * 768 * 1536 * 4 + 2 * columns * 4
    assert solver_bytes(how, 1536, 3072) == pytest.approx(4 * found, rel=0.01)


def test_hidden_states_go_to_disk_before_a_run_is_refused() -> None:
    def moments(on_disk: bool) -> list[Peak]:
        return [Peak({"process": 10}, on_disk), Peak({"process": 10, "stream": 0 if on_disk else 50}, on_disk)]

    assert largest(moments, None).bytes == 60 and largest(moments, 60).bytes == 60
    assert largest(moments, 59).on_disk and largest(moments, 59).bytes == 10
    with pytest.raises(RequestError, match="are not enough"):
        largest(moments, 9)
