"""Safetensors files read tensor by tensor: what is refused, and that nothing is accepted which the library refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load, save

from prunella.errors import BadInput
from prunella.io.tensor_file import INDEX, StoredTensor, bytes_of, open_tensors, read_folder
from prunella.llm.streaming.shards import shard_name, write_shard

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).view(3, 4),
    "b": torch.randn(5, 2).to(torch.bfloat16),
    "c": torch.tensor([True, False]),
    "d": torch.tensor(7),
    "e": torch.zeros(0, 3, dtype=torch.float16),
}


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of a file by name."""
    return dict(open_tensors(file).tensors)


def test_an_index_says_which_files_count(tmp_path: Path) -> None:
    write_shard(tmp_path / shard_name(1, 2), {"a": TENSORS["a"]})
    write_shard(tmp_path / shard_name(2, 2), {"b": TENSORS["b"]})
    write_shard(tmp_path / "other.safetensors", {"a": TENSORS["a"]})
    with pytest.raises(BadInput, match="holds a twice"):
        read_folder(tmp_path)
    places = {"a": shard_name(1, 2), "b": shard_name(2, 2)}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": places}))
    assert read_folder(tmp_path).keys() == {"a", "b"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "../../etc/passwd"}}))
    with pytest.raises(BadInput, match="never paths"):
        read_folder(tmp_path)
    with pytest.raises(BadInput, match="no safetensors"):
        read_folder(tmp_path / "nowhere")


def _with_header(file: Path, entries: object, data: bytes = b"\0" * 48) -> Path:
    text = json.dumps(entries).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return file


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 47]},
        {"dtype": "F32", "shape": [3, 4], "data_offsets": [8, 56]},
        {"dtype": "F32", "shape": [-3, -4], "data_offsets": [0, 48]},
        {"dtype": "F32", "shape": [3, 4], "data_offsets": [-48, 0]},
        {"dtype": "X9", "shape": [3, 4], "data_offsets": [0, 48]},
        {"shape": [3, 4], "data_offsets": [0, 48]},
        "nothing",
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, entry: object) -> None:
    with pytest.raises(BadInput, match="cannot read"):
        read_header(_with_header(tmp_path / "x.safetensors", {"a": entry}))


SOUND = save(TENSORS)
HEADER = int.from_bytes(SOUND[:8], "little")


@settings(deadline=None, max_examples=400)
@given(
    edits=st.lists(st.tuples(st.integers(0, len(SOUND) - 1), st.integers(0, 255)), max_size=3),
    digits=st.lists(st.tuples(st.integers(8, 8 + HEADER - 1), st.sampled_from(b"0123456789[],{}:")), max_size=2),
    cut=st.integers(0, 3),
    tail=st.binary(max_size=3),
)
def test_what_is_accepted_is_what_the_library_reads(
    tmp_path_factory: pytest.TempPathFactory,
    edits: list[tuple[int, int]],
    digits: list[tuple[int, int]],
    cut: int,
    tail: bytes,
) -> None:
    """Bytes of a sound file are changed, cut off and added: ours accepts nothing that the format's library refuses."""
    content = bytearray(SOUND)
    for place, value in [*edits, *digits]:
        content[place] = value
    data = bytes(content[: len(content) - cut]) + tail
    file = tmp_path_factory.mktemp("shard") / "x.safetensors"
    file.write_bytes(data)
    try:
        ours = {name: stored.read() for name, stored in read_header(file).items()}
    except BadInput:
        return
    try:
        theirs = load(data)
    except SafetensorError as error:
        raise AssertionError(f"accepted what the library refuses: {error}") from error
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype and ours[name].shape == value.shape
        assert bytes_of(ours[name].contiguous()) == bytes_of(value.contiguous())


@pytest.mark.parametrize(
    ("second", "tail"),
    [([40, 88], b""), ([40, 88], bytes(8)), ([56, 104], bytes(8)), ([48, 96], b"x")],
    ids=["overlap", "overlap-filled-up", "hole", "tail"],
)
def test_tensors_that_do_not_fill_the_file_exactly(tmp_path: Path, second: list[int], tail: bytes) -> None:
    entries = {"a": {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]},
               "b": {"dtype": "F32", "shape": [3, 4], "data_offsets": second}}  # fmt: skip
    header = json.dumps(entries).encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(second[1]) + tail)
    with pytest.raises(BadInput, match=r"overlap or leave a hole|belong to no tensor"):
        read_header(file)


def test_a_tensor_that_ends_behind_the_file_lies_outside_of_it(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]}}).encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(40))
    with pytest.raises(BadInput, match="lies outside of the file"):
        read_header(file)
