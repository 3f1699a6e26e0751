"""A folder pruned block by block on the GPU, with copies beside the work, against the CPU."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

import prunella as pr
from prunella.llm.streaming.offload import OnDisk
from prunella.llm.streaming.staged import Staged, lane_to, staged
from tests.gpu.nets import close

ADMM = pr.llm.OneShot(pr.NM(2, 4))


@pytest.mark.parametrize("refined", [False, True])
def test_weights_are_those_of_the_cpu(gpu: torch.device, tmp_path: Path, refined: bool) -> None:
    pytest.importorskip("transformers")
    from tests.llm.streaming.models import data, write
    from tests.llm.streaming.test_folder import weights

    how = replace(ADMM, refine=pr.llm.Refine(epochs=1)) if refined else ADMM
    write(tmp_path / "in", "Llama")
    for name, device in (("cpu", torch.device("cpu")), ("gpu", gpu)):
        pr.llm.solve_folder(tmp_path / "in", tmp_path / name, how, data=data(), device=device)
    one, other = weights(tmp_path / "cpu"), weights(tmp_path / "gpu")
    differ = sum(int(((one[name] == 0) != (other[name] == 0)).sum()) for name in one)
    assert differ <= 0.01 * sum(value.numel() for value in one.values())  # scores that are nearly equal
    if not differ:
        close(one, other, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("on_disk", [False, True])
def test_hidden_states_come_back_whole_while_the_gpu_works(real: torch.device, tmp_path: Path, on_disk: bool) -> None:
    """Large batches and long products: a copy that is read or overwritten too early shows."""
    store = staged(partial(OnDisk, folder=tmp_path) if on_disk else list, real)
    weight = torch.randn(4096, 4096, device=real) / 64
    batches = [torch.randn(2048, 4096) for _ in range(6)]

    def work(x: torch.Tensor) -> torch.Tensor:
        for _ in range(8):
            x = torch.tanh(x @ weight)
        return x

    sent = store(iter(batches))
    outputs = store(work(sent[k]) for k in range(len(sent)))
    assert isinstance(outputs, Staged) and outputs[0].device.type == real.type
    for k, batch in enumerate(batches):
        assert torch.equal(sent[k].cpu(), batch)
        torch.testing.assert_close(outputs[k], work(batch.to(real)), rtol=0, atol=0)


def test_a_copy_runs_beside_the_work(real: torch.device) -> None:
    """`send` returns before the work that was queued before it is done; what arrives is ordered after the copy."""
    lane, host = lane_to(real), torch.randn(4096, 4096).pin_memory()
    weight = torch.randn(8192, 8192, device=real)
    busy = weight
    for _ in range(40):
        busy = busy @ weight / 8192
    arrival = lane.send(host)
    done = torch.cuda.Event()
    done.record()
    assert not done.query()  # the products still run
    assert torch.equal(arrival().cpu(), host)
    assert torch.isfinite(lane.fetch(busy)()).all()
