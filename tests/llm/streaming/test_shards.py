"""Shards written tensor by tensor, against the library of the format; hidden states on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from prunella.errors import BadInput
from prunella.io.tensor_file import open_tensors
from prunella.llm.streaming.offload import OnDisk
from prunella.llm.streaming.shards import write_shard

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).view(3, 4),
    "b": torch.randn(5, 2).to(torch.bfloat16),
    "c": torch.tensor([True, False]),
    "d": torch.tensor(7),
    "e": torch.zeros(0, 3, dtype=torch.float16),
}


def test_both_ways_agree_with_the_library(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "theirs.safetensors")
    stored = open_tensors(tmp_path / "theirs.safetensors").tensors
    copied = write_shard(tmp_path / "copied.safetensors", stored)
    ours = write_shard(tmp_path / "ours.safetensors", {**TENSORS, "a": TENSORS["a"].T.contiguous().T})
    for file in (copied, ours):
        for name, value in load_file(file).items():
            assert value.equal(TENSORS[name]) and value.dtype == TENSORS[name].dtype
            assert stored[name].read().equal(value) and open_tensors(file).tensors[name].read().equal(value)
        assert int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0


def _with_header(file: Path, entries: object, data: bytes = b"\0" * 48) -> Path:
    text = json.dumps(entries).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return file


def test_files_that_are_cut_short(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes((1 << 60).to_bytes(8, "little"))
    with pytest.raises(BadInput, match="truncated or damaged"):
        open_tensors(file)
    whole = _with_header(file, {"a": {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]}})
    stored = open_tensors(whole).tensors["a"]
    whole.write_bytes(whole.read_bytes()[:-8])
    with pytest.raises(BadInput, match="cut short"):
        stored.read()
    with pytest.raises(BadInput, match="cut short"):
        write_shard(tmp_path / "y.safetensors", {"a": stored})
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


def test_hidden_states_on_disk_are_a_list_that_is_not_in_memory(tmp_path: Path) -> None:
    given = [TENSORS["a"], TENSORS["b"], TENSORS["a"].T]
    held = OnDisk(iter(given), tmp_path)
    assert len(held) == 3 and all(a.equal(b) and a.dtype == b.dtype for a, b in zip(held, given, strict=True))
    assert held[2].equal(given[2]) and [t.shape for t in held[:2]] == [(3, 4), (5, 2)]
    assert list(tmp_path.iterdir()) == []  # gone when the process is, killed or not
    held[0].zero_()
    assert held[0].equal(given[0])
