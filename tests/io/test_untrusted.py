"""Files of a stranger: links that lead away, pipes, archives and numbers that would take all memory."""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import prunella as pr
from prunella.errors import BadInput, PruningError
from prunella.io.artifact import load, save
from prunella.io.checkpoint_file import load_tensors_only
from prunella.io.importers.reading import read_source
from prunella.io.json import LARGEST, MOST_MEMORY, decode, memory_of, read_json
from prunella.io.tensor_file import open_tensors, read_folder
from prunella.io.untrusted import check_links
from prunella.llm.streaming.shards import write_shard
from prunella.llm.text import text_tokens


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of a cut model."""
    plan = pr.plan(net(), torch.ones(2, 8), pr.Recipe(pr.magnitude, pr.Channel()), target=pr.MACs(0.5))
    return save(pr.shrink(net(), plan), tmp_path_factory.mktemp("sound") / "a", plan=plan, factory=net).path


@pytest.fixture
def manifest(sound: Path) -> Any:
    """A function that writes a changed manifest and puts the right one back at the end."""
    file = sound / "manifest.json"
    whole = file.read_bytes()

    def write(change: Callable[[dict[str, Any]], object]) -> Path:
        data = json.loads(whole)
        change(data)
        file.write_text(json.dumps(data))
        return sound

    yield write
    file.write_bytes(whole)


WRONG: dict[str, Callable[[dict[str, Any]], object]] = {
    "origin missing": lambda m: m.pop("origin"),
    "origin a list": lambda m: m.update(origin=[]),
    "an entry of files a list": lambda m: m["files"].update({"model.safetensors": []}),
    "an entry of files without bytes": lambda m: m["files"]["model.safetensors"].pop("bytes"),
    "bytes that are true": lambda m: m["files"]["model.safetensors"].update(bytes=True),
    "transient of lists": lambda m: m.update(transient=[["0.weight"]]),
    "low_rank a list": lambda m: m.update(low_rank=[1]),
    "low_rank of text": lambda m: m.update(low_rank={"0": "x"}),
    "a size of 10^30": lambda m: m.update(attributes=[["0", "in_features", 10**30]]),
    "a size of 1.5": lambda m: m.update(attributes=[["0", "in_features", 1.5]]),
    "a tie to nothing": lambda m: m.update(ties={"0.bias": "9.bias"}),
    "a dtype that is a function": lambda m: m["tensors"]["0.weight"].update(dtype="manual_seed"),
    "kept positions of 10^11": lambda m: m["cuts"]["positions"].__setitem__(0, [[0, 10**11]]),
    "an axis of text": lambda m: m["cuts"]["axes"]["0.weight"].update(x=0),
    "an axis of 10^30": lambda m: m["cuts"]["axes"]["0.weight"].update({str(10**30): 0}),
    "dropped blocks of numbers": lambda m: m.update(dropped={"": [1]}),
    "a list of objects": lambda m: m.update(lists=[["", "x", [{}]]]),
    "a format of 10^30": lambda m: m.update(format=10**30),
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG.keys())
def test_a_manifest_of_wrong_types_or_sizes_is_bad_input_at_once(manifest: Any, change: Any) -> None:
    folder, before, start = manifest(change), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(BadInput) as caught:
        load(folder, factory=net)
    assert caught.value.exit_code == 3 and caught.value.what
    assert time.process_time() - start < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kilobytes


def _entry(shape: object, start: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


GOOD = {"w": _entry([2, 2], 0, 16), "b": _entry([2], 16, 24)}
LIES: dict[str, tuple[object, int]] = {
    "overlapping tensors": ({"w": _entry([2, 2], 0, 16), "b": _entry([2], 8, 16)}, 16),
    "a hole": ({"w": _entry([2, 2], 0, 16), "b": _entry([2], 20, 28)}, 28),
    "trailing bytes": (GOOD, 27),
    "a name twice": (json.dumps(GOOD)[:-1] + ', "b": ' + json.dumps(_entry([2], 0, 8)) + "}", 24),
    "a shape of [2.0, 2.7]": ({"w": _entry([2.0, 2.7], 0, 16), "b": _entry([2], 16, 24)}, 24),
    "a shape of text": ({"w": _entry(["2", "2"], 0, 16), "b": _entry([2], 16, 24)}, 24),
    "a shape of truth values": ({"w": _entry([True], 0, 4)}, 4),
    "a shape of [1e999]": (json.dumps(GOOD).replace("[2, 2]", "[1e999]"), 24),
    "a shape of 10^12 without bytes": ({"w": _entry([10**12, 10**12], 0, 0)}, 0),
    "a shape of 10^30 times 0": ({"w": _entry([10**30, 0], 0, 0)}, 0),
    "axes that multiply to more than an index": ({"w": _entry([1 << 40, 1 << 40, 0], 0, 0)}, 0),
    "a thousand axes": ({"w": _entry([1] * 1000, 0, 4)}, 4),
    "metadata that is not text": ({**GOOD, "__metadata__": {"format": 1}}, 24),
    "a list": ([], 0),
}


@pytest.mark.parametrize(("header", "size"), LIES.values(), ids=LIES.keys())
def test_a_shard_that_the_format_forbids(tmp_path: Path, header: object, size: int) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    file = tmp_path / "m.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
    with pytest.raises(BadInput, match="cannot read"):
        open_tensors(file)


def test_a_truth_value_that_is_neither_0_nor_1(tmp_path: Path) -> None:
    file = write_shard(tmp_path / "x.safetensors", {"mask": torch.tensor([True, False])})
    file.write_bytes(file.read_bytes()[:-2] + b"\x02\x00")
    with pytest.raises(BadInput, match="a truth value is 2"):
        dict(open_tensors(file).read())


HUGE = {
    "objects": '{"a":{}},' * 300_000,
    "lists": "[]," * 1_500_000,
    "numbers": "1," * 3_000_000,
    "keys": "".join(f'{{"k{k}":1}},' for k in range(400_000)),
}


@pytest.mark.parametrize("text", HUGE.values(), ids=HUGE.keys())
def test_json_whose_values_would_take_much_memory_is_refused_before_it_is_parsed(text: str) -> None:
    whole = f"[{text}0]"
    assert len(whole) < LARGEST and memory_of(whole) > MOST_MEMORY
    start = time.process_time()
    with pytest.raises(ValueError, match="bytes of memory"):
        decode(whole)
    assert time.process_time() - start < 0.5


def test_half_a_character_in_a_key_and_a_number_without_end() -> None:
    with pytest.raises(ValueError, match="half a character"):
        decode(b'{"\\ud800": 1}')
    assert decode(b'{"\\ud83d\\ude00": 1}') == {"\U0001f600": 1}
    with pytest.raises(ValueError, match="5000 digits"):
        decode("9" * 5000)


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.json")
    for read in (read_json, open_tensors, load_tensors_only):
        with pytest.raises(BadInput, match="a pipe or a device"):
            read(tmp_path / "x.json")


# -- links -------------------------------------------------------------------------------------------------------------


def test_links_are_followed_inside_a_folder_and_in_the_cache_of_hugging_face_only(tmp_path: Path) -> None:
    secret = write_shard(tmp_path / "secret.safetensors", {"w": torch.ones(2)})
    folder = tmp_path / "model"
    (folder / "inner").mkdir(parents=True)
    write_shard(folder / "inner" / "real.bin", {"w": torch.ones(2)})
    (folder / "model.safetensors").symlink_to("inner/real.bin")
    assert read_folder(folder).keys() == {"w"}
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(secret)
    for read in (read_folder, read_source, check_links):
        with pytest.raises(BadInput, match="leads out of the folder"):
            read(folder)
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "4f2c", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    write_shard(blobs / "e3b0", {"v": torch.ones(3)})
    (snapshot / "model.safetensors").symlink_to("../../blobs/e3b0")
    assert read_folder(snapshot).keys() == {"v"}
    (tmp_path / "alias").symlink_to(snapshot)  # the folder itself may be a link: somebody named it
    assert read_folder(tmp_path / "alias").keys() == {"v"}
    (snapshot / "config.json").symlink_to(secret)
    with pytest.raises(BadInput, match=r"config\.json is a link"):
        read_folder(snapshot)


def test_no_link_in_a_source_is_copied_into_what_is_saved(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (tmp_path / "secret").write_text('{"key": "s3cret"}')
    (source / "special_tokens_map.json").symlink_to(tmp_path / "secret")
    with pytest.raises(BadInput, match="leads out of the folder"):
        pr.save(nn.Linear(4, 4), tmp_path / "out", factory=lambda: nn.Linear(4, 4), source=source)
    assert not (tmp_path / "out").exists()


def test_a_text_that_is_a_device_is_never_read(tmp_path: Path) -> None:
    for text in ("/dev/zero", tmp_path / "pipe"):
        if text != "/dev/zero":
            os.mkfifo(text)
        with pytest.raises(BadInput, match="a pipe or a device"):
            text_tokens(tmp_path, text)


def test_an_artifact_with_a_link_out_of_it(sound: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    for file in sound.iterdir():
        (folder / file.name).symlink_to(file)
    with pytest.raises(BadInput, match="leads out of the folder"):
        load(folder, factory=net)


# -- checkpoints of torch ----------------------------------------------------------------------------------------------


def _bomb(file: Path) -> Path:
    """A checkpoint of which one part is compressed a thousandfold."""
    torch.save({"w": torch.zeros(4)}, file)
    with zipfile.ZipFile(io.BytesIO(file.read_bytes())) as source, zipfile.ZipFile(file, "w") as target:
        for name in source.namelist():
            big = name.endswith("data/0")
            content = bytes(100 << 20) if big else source.read(name)
            target.writestr(name, content, zipfile.ZIP_DEFLATED if big else zipfile.ZIP_STORED)
    return file


def test_a_compressed_checkpoint_is_not_unpacked(tmp_path: Path) -> None:
    file = _bomb(tmp_path / "x.pt")
    assert file.stat().st_size < 1 << 20
    with pytest.raises(BadInput, match=r"is compressed to .* torch writes such files uncompressed"):
        load_tensors_only(file)


def test_a_tensor_of_a_million_million_values_in_four_bytes(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.zeros(1).expand(10**6, 10**6)}}, tmp_path / "x.pt")
    with pytest.raises(BadInput, match=r"model\.w has 1000000000000 values in 4 bytes"):
        load_tensors_only(tmp_path / "x.pt")
    with torch.sparse.check_sparse_tensor_invariants():  # type: ignore[no-untyped-call]
        wide = torch.sparse_coo_tensor(torch.zeros(2, 1).long(), torch.ones(1), (10**6, 10**6))
    torch.save({"w": wide}, tmp_path / "y.pt")
    with pytest.raises(BadInput, match="sparse_coo tensor"):
        load_tensors_only(tmp_path / "y.pt")


@pytest.mark.parametrize("body", [b"]" * 200_000 + b"a" * 199_999, b")" + b"\x85" * 200_000], ids=["lists", "tuples"])
def test_what_is_too_deep_in_a_checkpoint_is_refused_at_once(tmp_path: Path, body: bytes) -> None:
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        for name, content in (("data.pkl", b"\x80\x02" + body + b"."), ("byteorder", b"little"), ("version", b"3\n")):
            archive.writestr(f"x/{name}", content)
    start = time.process_time()
    with pytest.raises(BadInput, match="more than 100 lists or mappings are inside each other"):
        load_tensors_only(tmp_path / "x.pt")
    assert time.process_time() - start < 2


def test_an_old_checkpoint_that_asks_for_more_memory_than_there_is(tmp_path: Path) -> None:
    file = tmp_path / "x.pt"
    torch.save({"w": torch.zeros(1000)}, file, _use_new_zipfile_serialization=False)
    data = file.read_bytes()
    assert data.count(b"M\xe8\x03") >= 1  # the number 1000, as a pickle has it
    huge = pickle.dumps(1 << 50, protocol=2)[2:-1]
    file.write_bytes(data.replace(b"M\xe8\x03", huge))
    with pytest.raises(PruningError) as caught:
        load_tensors_only(file)
    assert caught.value.exit_code == 3 and caught.value.__cause__ is None


def test_a_sound_checkpoint_old_or_new_with_shared_tensors_is_read(tmp_path: Path) -> None:
    base = torch.arange(8.0)
    for new in (True, False):
        torch.save({"a": base[:4], "b": base, "n": [1, {"c": base.view(2, 4).T}]}, tmp_path / "x.pt",
                   _use_new_zipfile_serialization=new)  # fmt: skip
        assert load_tensors_only(tmp_path / "x.pt")["n"][1]["c"].equal(base.view(2, 4).T)
