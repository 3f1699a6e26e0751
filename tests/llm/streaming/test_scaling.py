"""The forecast for several processes, from a configuration alone, against runs of one, two and four processes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import prunella as pr
from prunella.cli.app import parse_and_run
from prunella.errors import RequestError
from prunella.io.tensor_file import StoredTensor
from prunella.llm.distributed import ProcessGroup
from prunella.llm.streaming.runner import StreamingRun
from prunella.llm.streaming.scaling import RANKS, InputGroup, Scaling, UnitCosts, forecast_scaling
from tests.llm.streaming.models import data, write
from tests.ranks import together

COSTS = UnitCosts(1e-9, 1e-9)
HOW = pr.llm.OneShot(pr.NM(2, 4))


def counted_run(source: Path, place: Path) -> None:
    """What each process does: a run, and the bytes that it reads and sends."""
    counted = {"read": 0, "reduced": 0, "sent": 0}

    def counting(name: str, function: Any, size: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            counted[name] += size(args[0])
            return function(*args, **options)

        return call

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(StoredTensor, "read", counting("read", StoredTensor.read, lambda stored: stored.size))
        patched.setattr(dist, "all_reduce", counting("reduced", dist.all_reduce, lambda tensor: tensor.nbytes))
        patched.setattr(dist, "broadcast", counting("sent", dist.broadcast, lambda tensor: tensor.nbytes))
        dist.init_process_group("gloo")
        rank = dist.get_rank()
        pr.llm.solve_folder(source, place / "out", HOW, data=data(4))
        (place / f"counted_{rank}.json").write_text(json.dumps(counted))
        dist.destroy_process_group()


def alone(folder: Path, kind: str) -> Path:
    """The configuration of a model without its weights; the model is in the folder `full` beside it."""
    write(folder / "full", kind)
    (folder / "config").mkdir()
    shutil.copy(folder / "full" / "config.json", folder / "config")
    return folder / "config"


def forecast(folder: Path, count: int = 4) -> Scaling:
    return forecast_scaling(folder, HOW, data=data(count), costs=COSTS)


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "GPT2"])
def test_memory_and_bytes_are_those_of_a_run_of_the_weights(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = alone(tmp_path, kind)
    expected = forecast(config)
    for row in expected.rows:
        real = StreamingRun(tmp_path / "full", HOW, data(4), ProcessGroup(0, row.processes), budget=None)
        parts = {name: size for name, size in real.peak.parts.items() if name != "process"}
        assert parts == {name: size for name, size in row.peak.parts.items() if name != "process"}
        assert row.written == real.disk
    counted, plain = [0], StoredTensor.read

    def read(stored: StoredTensor) -> torch.Tensor:
        counted[0] += stored.size
        return plain(stored)

    monkeypatch.setattr(StoredTensor, "read", read)
    done = pr.llm.solve_folder(tmp_path / "full", tmp_path / "out", HOW, data=data(4))
    assert counted[0] == expected.rows[0].read
    assert expected.layers == len([fit for fit in done.solving.fits if not fit.skipped])
    assert expected.rows[0].reduced == expected.rows[0].sent == 0


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_read_and_send_what_was_forecast(tmp_path: Path, processes: int) -> None:
    config = alone(tmp_path, "Llama")
    together(processes, lambda: counted_run(tmp_path / "full", tmp_path), tmp_path)
    row = next(row for row in forecast(config).rows if row.processes == processes)
    for rank in range(processes):
        counted = json.loads((tmp_path / f"counted_{rank}.json").read_text())
        assert counted["reduced"] == row.reduced and counted["read"] == row.read
        assert abs(counted["sent"] - row.sent) < 5000 * processes / 2  # lists of names and records go along


def test_rows_stop_at_the_batches_and_the_limits_are_said(tmp_path: Path) -> None:
    config = alone(tmp_path, "Llama")
    expected = forecast(config)
    assert [row.processes for row in expected.rows] == [1, 2, 4]
    assert "there are 4 batches" in str(expected) and "at most 3 processes" in str(expected)
    assert "48 columns" in str(expected)
    memory = [row.peak.parts["stream"] for row in expected.rows]
    assert memory[0] == 2 * memory[1] == 4 * memory[2]
    seconds = [row.seconds for row in expected.rows]
    assert seconds == sorted(seconds, reverse=True)
    with pytest.raises(RequestError, match="not enough"):
        forecast_scaling(config, HOW, data=data(4), memory="1MB", costs=COSTS)


def test_experts_are_solved_one_by_one_and_thin_ones_are_told(tmp_path: Path) -> None:
    config = alone(tmp_path, "Mixtral")
    expected = forecast(config, 1)
    assert "an expert sees about 16 tokens" in str(expected) and "at most 4 processes" in str(expected)


def test_a_solver_takes_whole_matrices() -> None:
    group = InputGroup(((4, 8), (2, 8), (2, 8)), (8,))
    one, two, three, many = (group.solving(count, UnitCosts(0.0, 1.0)) for count in (1, 2, 3, 64))
    assert one == 3 * (4 * 64 + 512) and two == one * 2 / 3 and three == many == one / 3
    assert group.reduced == 8 * 64 + 8 and group.sent == 5 * 64 + 3 * 16


def test_large_models_are_forecast_from_their_configuration(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        architectures=["LlamaForCausalLM"], hidden_size=2048, intermediate_size=4096, num_hidden_layers=2,
        num_attention_heads=16, num_key_value_heads=4, vocab_size=8_000_000, dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    batch = {"input_ids": torch.zeros(1, 64, dtype=torch.long)}
    expected = forecast_scaling(tmp_path, HOW, data=[batch] * 64, costs=COSTS)
    assert [row.processes for row in expected.rows] == list(RANKS)
    assert expected.size > 60e9 > expected.rows[0].peak.bytes > expected.rows[-1].peak.bytes


def test_the_command_line_forecasts_a_folder_without_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = alone(tmp_path, "Llama")
    line = ["llm", str(config), "--pattern", "2:4", "--nsamples", "4", "--seqlen", "16", "--dry-run"]
    assert parse_and_run([*line, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [row["processes"] for row in said["rows"]] == [1, 2, 4] and said["rows"][0]["peak"]["together"] > 0
    assert parse_and_run(line) == 0 and "memory each" in capsys.readouterr().out
    assert parse_and_run(["llm", str(config), "--pattern", "2:4", "-o", str(tmp_path / "out")]) == 3
