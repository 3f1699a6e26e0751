"""A folder pruned block by block on the second device: the weights are those of the CPU."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import prunella as pr
from prunella.errors import OutOfResources, RequestError
from prunella.llm.blocks import BlockCall
from prunella.llm.distributed import SINGLE_PROCESS
from prunella.llm.streaming import BlockStep, runner, staged
from prunella.llm.streaming.offload import OnDisk
from prunella.llm.streaming.staged import CallsOn, Lane, Staged
from tests.devices.second import DEVICE, far, near, second_device
from tests.llm.streaming.models import KINDS, data, read, write
from tests.llm.streaming.test_folder import weights

ADMM = pr.llm.OneShot(pr.NM(2, 4))
HOW = {"admm": ADMM, "refined": replace(ADMM, refine=pr.llm.Refine(epochs=1))}


def alike(first: Path, second: Path) -> None:
    """The same zeros, and weights that differ by rounding: attention on the second device is not one operation."""
    one, other = weights(first), weights(second)
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value == 0, other[name] == 0), name
        torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "recipe"), [("Llama", "admm"), ("Llama", "refined"), ("GPT2", "admm"), ("Mixtral", "admm")]
)
def test_weights_are_those_of_the_cpu(tmp_path: Path, kind: str, recipe: str) -> None:
    write(tmp_path / "in", kind)
    pr.llm.solve_folder(tmp_path / "in", tmp_path / "cpu", HOW[recipe], data=data())
    with second_device() as device:
        there = pr.llm.solve_folder(tmp_path / "in", tmp_path / "there", HOW[recipe], data=data(), device=device)
    alike(tmp_path / "cpu", tmp_path / "there")
    assert any(not fit.skipped for fit in there.solving.fits)


def test_what_a_block_makes_itself_comes_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A causal mask that the constructor of each block computes, and that is in no file."""
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 32, "vocab_size": 64}
    kinds = {"attention_types": [[["global", "local"], 1]], "bos_token_id": 0, "eos_token_id": 1}
    monkeypatch.setitem(KINDS, "GPTNeo", ("ForCausalLM", {**sizes, **kinds}))
    model = write(tmp_path / "in", "GPTNeo")
    pr.llm.solve_folder(tmp_path / "in", tmp_path / "cpu", ADMM, data=data())
    pr.llm.solve_(model, data()[0], ADMM, data=data())
    again = read(tmp_path / "cpu", model).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in model.state_dict().items())
    with second_device() as device:
        pr.llm.solve_folder(tmp_path / "in", tmp_path / "there", ADMM, data=data(), device=device)
    alike(tmp_path / "cpu", tmp_path / "there")


def test_blocks_run_there_and_nothing_stays_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "in")
    places: list[set[str]] = []
    solve = runner.solve_block_

    def noted(problem: Any) -> Any:
        kept = problem.calls.hidden_states
        state = [*problem.module.parameters(), *problem.module.buffers()]
        places.append({tensor.device.type for tensor in (*state, kept[0], *kept[-2:])})
        assert {tensor.device.type for tensor in kept._host} == {"cpu"}
        return solve(problem)

    monkeypatch.setattr(runner, "solve_block_", noted)
    with second_device() as device:
        run = runner.StreamingRun(
            tmp_path / "in", ADMM, data(), SINGLE_PROCESS, budget=None, skip=(), device=torch.device(device)
        )
        pr.llm.solve_folder(tmp_path / "in", tmp_path / "out", ADMM, data=data(), device=device)
        run.measured()
    assert places == [{DEVICE.type}] * 4
    assert {buffer.device.type for buffer in run.skeleton.model.buffers()} <= {"cpu", "meta"}


def test_a_killed_run_goes_on_there_and_another_device_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "in")

    def stop(step: BlockStep) -> None:
        if step.number == 2:
            raise KeyboardInterrupt

    with second_device() as device:
        pr.llm.solve_folder(tmp_path / "in", tmp_path / "whole", HOW["refined"], data=data(), device=device)
        with pytest.raises(KeyboardInterrupt):
            pr.llm.solve_folder(
                tmp_path / "in", tmp_path / "out", HOW["refined"], data=data(), device=device, on_block=stop
            )
        with pytest.raises(RequestError, match="device"):
            pr.llm.solve_folder(tmp_path / "in", tmp_path / "out", HOW["refined"], data=data())
        done = pr.llm.solve_folder(tmp_path / "in", tmp_path / "out", HOW["refined"], data=data(), device=device)
    assert done.replayed == 2
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "out")
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_hidden_states_on_disk_come_to_the_device(tmp_path: Path) -> None:
    values = [torch.randn(2, 3) for _ in range(3)]
    with second_device() as device:
        stored = staged.staged(partial(OnDisk, folder=tmp_path), device)(far(values))
        assert isinstance(stored, Staged) and isinstance(stored._host, OnDisk)
        back = [stored[k] for k in (2, 0, 1)]
        assert {tensor.device.type for tensor in back} == {DEVICE.type}
    assert all(torch.equal(near(there), values[k]) for there, k in zip(back, (2, 0, 1), strict=True))


class Noted(Lane):
    """Copies that are noted when they begin and when they are waited for."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.steps: list[str] = []

    def _begun(self, what: str, tensor: Tensor) -> Any:
        self.steps.append(f"{what} {int(tensor)}")

        def arrived() -> Tensor:
            self.steps.append(f"{what} {int(tensor)} arrived")
            return tensor

        return arrived

    def send(self, tensor: Tensor) -> Any:
        return self._begun("send", tensor)

    def fetch(self, tensor: Tensor) -> Any:
        return self._begun("fetch", tensor)


def test_a_copy_begins_before_the_one_before_it_is_waited_for() -> None:
    lane = Noted()
    stored = Staged((torch.tensor(k) for k in range(3)), list, lane)
    assert lane.steps == ["fetch 0", "fetch 1", "fetch 0 arrived", "fetch 2", "fetch 1 arrived", "fetch 2 arrived"]
    lane.steps.clear()
    assert [int(tensor) for tensor in stored] == [0, 1, 2]
    assert lane.steps == ["send 0", "send 1", "send 0 arrived", "send 2", "send 1 arrived", "send 2 arrived"]
    lane.steps.clear()
    assert int(stored[0]) == 0 and int(stored[2]) == 2  # what was sent ahead in vain is dropped
    assert lane.steps == ["send 0", "send 1", "send 0 arrived", "send 2", "send 2 arrived"]
    assert not stored._ahead


def test_tensors_that_calls_share_are_moved_once() -> None:
    mask, rest = torch.ones(2, 2), torch.empty(0)
    calls = [BlockCall((rest,), {"mask": mask, "own": torch.full((1,), float(k))}) for k in range(40)]
    with second_device() as device:
        moved = CallsOn(calls, device)
        kept = moved[0].kwargs["mask"]
        assert kept.device.type == DEVICE.type and moved[1].kwargs["mask"] is kept
        assert [float(near(moved[k].kwargs["own"])) for k in range(40)] == list(range(40))
        assert len(moved._moved) <= staged._SHARED and moved[:3][2].kwargs["own"].device.type == DEVICE.type


def test_a_block_that_does_not_fit_is_refused_before_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "in")
    with second_device() as device:
        expected = pr.llm.forecast(tmp_path / "in", ADMM, data=data(), device=device, measured=False)
        assert expected.there is not None and "memory of the device" in str(expected)
        assert expected.there.parts["work"] > 0 and "work" in expected.peak.parts and not expected.peak.parts["work"]
        monkeypatch.setattr(runner, "free_memory", lambda device: expected.there.bytes - 1)  # type: ignore[union-attr]
        with pytest.raises(OutOfResources, match="is not enough") as caught:
            pr.llm.solve_folder(tmp_path / "in", tmp_path / "out", ADMM, data=data(), device=device)
    assert caught.value.exit_code == 5 and not (tmp_path / "out").exists()


def test_a_device_that_is_full_in_a_block_ends_with_5_and_keeps_what_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "in")
    solve, blocks = runner.solve_block_, [0]

    def full(problem: Any) -> Any:
        blocks[0] += 1
        if blocks[0] == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return solve(problem)

    monkeypatch.setattr(runner, "solve_block_", full)
    with second_device() as device:
        with pytest.raises(OutOfResources, match="out of memory in a block") as caught:
            pr.llm.solve_folder(tmp_path / "in", tmp_path / "out", ADMM, data=data(), device=device)
        done = pr.llm.solve_folder(tmp_path / "in", tmp_path / "out", ADMM, data=data(), device=device)
    assert caught.value.exit_code == 5 and done.replayed == 1
