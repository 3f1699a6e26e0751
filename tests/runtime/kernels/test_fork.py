"""Kernels in a forked child: the threads of the parent are not there, and waiting for them would not end."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from prunella.runtime.kernels import library
from prunella.runtime.kernels.config import Precision
from prunella.runtime.tuning.tune import configs_for

needs_kernels = pytest.mark.skipif(not library.available(), reason="the kernels are not built")


def in_child(seconds: int = 30) -> bool:
    """Whether the block runs in a forked child, which is ended by the alarm if it waits for ever."""
    child = os.fork()
    if child == 0:
        signal.alarm(seconds)
        return True
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return False


@needs_kernels
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_child_computes_the_same() -> None:
    threads, generator = torch.get_num_threads(), torch.Generator().manual_seed(0)
    weight = torch.randn(256, 256, generator=generator) * (torch.rand(256, 256, generator=generator) < 0.1)
    x = torch.randn(64, 256, generator=generator)
    packed = [library.pack(weight, config) for config in configs_for(weight, 64, Precision.FP32)[:2]]
    torch.set_num_threads(2)
    try:
        expected, dense = [library.linear(one, x) for one in packed], torch.sin(torch.cat([x @ weight] * 40)).sum()
        if in_child():
            torch.set_num_threads(2)  # as a user's code may do
            same = all(library.linear(one, x).equal(y) for one, y in zip(packed, expected, strict=True))
            os._exit(0 if same and library.thread_count() == 1 else 1)
        if in_child():
            near = torch.sin(torch.cat([x @ weight] * 40)).sum().isclose(dense, rtol=1e-3)
            os._exit(0 if bool(near) and torch.get_num_threads() == 1 else 1)
        assert library.thread_count() == 2
    finally:
        torch.set_num_threads(threads)
