"""Before any work: is there room, can it be written, and is it apart from what is read?"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections import namedtuple
from pathlib import Path

import pytest
from torch import nn

import prunella as pr
from prunella.errors import OutOfResources, RequestError
from prunella.io.files import write_atomic
from prunella.io.lock import lock_file, locked
from prunella.io.space import (
    check_apart,
    check_folder_of_weights,
    check_output_file,
    check_output_folder,
    check_room_for_journal,
    check_space,
    check_writable,
)

Usage = namedtuple("Usage", "total used free")


def test_too_little_room_is_told_in_bytes_before_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_space(tmp_path / "not" / "yet", 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10_000, 8_766, 1_234))
    check_space(tmp_path, 1_234)
    with pytest.raises(OutOfResources, match="5,678 bytes are needed, and 1,234 are free") as caught:
        check_space(tmp_path, 5_678)
    assert caught.value.exit_code == 5
    with pytest.raises(OutOfResources, match="bytes are needed"):
        pr.save(nn.Linear(40, 40), tmp_path / "out", factory=lambda: nn.Linear(40, 40))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "a" / "source").mkdir(parents=True)
    (tmp_path / "a" / "source" / "model.safetensors").touch()
    (tmp_path / "link").symlink_to(tmp_path / "a" / "source")
    (tmp_path / "up").symlink_to(tmp_path / "a")
    os.link(tmp_path / "a" / "source" / "model.safetensors", tmp_path / "hard")
    return tmp_path / "a" / "source"


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("a/source", "is the same as"),
        ("a/source/../source/", "is the same as"),
        ("a/other/../source", "is the same as"),
        ("link", "is the same as"),
        ("up/source", "is the same as"),
        ("a/source/out", "lies inside of"),
        ("link/deep/out", "lies inside of"),
        ("a/source/x/../../source/y", "lies inside of"),
        ("a", "lies around"),
        ("up", "lies around"),
        (".", "lies around"),
    ],
)
def test_an_output_that_is_the_source_is_refused(source: Path, tmp_path: Path, output: str, said: str) -> None:
    with pytest.raises(RequestError, match=f"it {said} .*, which is read"):
        check_apart(f"{tmp_path}/{output}", source)


def test_files_are_compared_too_and_others_pass(source: Path, tmp_path: Path) -> None:
    for same in ("a/source/model.safetensors", "link/model.safetensors", "hard"):
        with pytest.raises(RequestError, match="is the same as"):
            check_output_file(tmp_path / same, source / "model.safetensors")
    check_apart(tmp_path / "a" / "source2", source)
    check_apart(tmp_path / "a" / "out", source, None, "package.module:factory", "timm:resnet18")
    check_output_folder(tmp_path / "a" / "out", source)
    with pytest.raises(RequestError, match="cannot write"):
        pr.save(nn.Linear(4, 4), source / "out", factory=lambda: nn.Linear(4, 4), source=source)
    assert [file.name for file in source.iterdir()] == ["model.safetensors"]


def test_a_name_that_is_too_long_is_told_before_any_work(tmp_path: Path) -> None:
    """Bytes count, and what lies beside the output has a longer name."""
    for path in (tmp_path / ("x" * 241), tmp_path / ("\u00fc" * 150)):
        for check in (check_output_file, check_output_folder, check_writable, lock_file):
            with pytest.raises(RequestError, match=r"its name has (241|300) bytes, which is too long"):
                check(path)
    with locked(tmp_path / ("x" * 240)):
        check_output_file(tmp_path / ("x" * 240))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/", "it is the root of the file system"),
        ("/".join(["p" * 200] * 25), r"its path has \d+ bytes, the longest name in it 200"),
        (f"{'p' * 256}/out", r"its path has \d+ bytes, the longest name in it 256"),
        ("loop", "it is a link that leads to itself"),
    ],
)
def test_a_path_that_nothing_can_have_is_told_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("loop").symlink_to("loop")
    for check in (check_output_file, check_output_folder, check_writable, lock_file, check_folder_of_weights):
        with pytest.raises(RequestError, match=said):
            check(path)


@pytest.mark.parametrize("link", ["dangling", "loop"])
def test_a_folder_below_a_link_to_nothing_is_told_before_any_work(tmp_path: Path, link: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    for check in (check_room_for_journal, check_output_folder):
        with pytest.raises(RequestError, match=f"{link} is a link that leads to no folder"):
            check(tmp_path / link / "x")
    with pytest.raises(RequestError, match="leads to no folder"):
        check_room_for_journal(tmp_path / link)
    assert not (tmp_path / "nowhere").exists()


def test_transformers_reads_no_folder_whose_name_is_not_utf_8(tmp_path: Path) -> None:
    check_folder_of_weights(tmp_path / "\u00fc")
    with pytest.raises(RequestError, match="its name is not UTF-8"):
        check_folder_of_weights(os.fsdecode(os.fsencode(tmp_path) + b"/a\xff"))


def test_what_a_source_links_to_is_read_too(tmp_path: Path) -> None:
    """As in the cache of Hugging Face: to write there would change the source."""
    source, blobs = tmp_path / "snapshots" / "4f2c", tmp_path / "blobs"
    source.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "e3b0").touch()
    (source / "model.safetensors").symlink_to("../../blobs/e3b0")
    (source / "gone.json").symlink_to("../../blobs/nothing")
    for output, said in (("blobs/e3b0", "is the same as"), ("blobs", "lies around")):
        with pytest.raises(RequestError, match=f"it {said} .*model.safetensors, which is read"):
            check_apart(tmp_path / output, source)
    check_apart(tmp_path / "blobs2", source)


@pytest.mark.skipif(not shutil.which("mount") or os.name != "posix" or os.getuid() != 0, reason="only root can mount")
def test_a_folder_that_is_mounted_twice_is_one_folder(source: Path, tmp_path: Path) -> None:
    place = tmp_path / "mounted"
    place.mkdir()
    if subprocess.run(["mount", "--bind", str(source.parent), str(place)], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    try:
        for output, said in (("source", "is the same as"), ("source/x/../y", "lies inside of"), ("", "lies around")):
            with pytest.raises(RequestError, match=f"it {said} .*, which is read"):
                check_apart(place / output, source)
    finally:
        subprocess.run(["umount", str(place)], check=True)


def test_what_cannot_be_written_is_found_and_nothing_stays(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "out", tmp_path / "file" / "deep" / "out"):
        with pytest.raises(RequestError, match="Not a directory"):
            check_writable(path)
    with pytest.raises(RequestError, match="cannot write"):
        check_output_file(tmp_path / "no" / "x.plan")
    with pytest.raises(RequestError, match="a folder of that name"):
        check_output_file(tmp_path)
    check_writable(tmp_path / "new" / "deep")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_the_target_of_a_link_is_written_and_the_link_stays(tmp_path: Path) -> None:
    """A large disk by a link on a small one; also where the target does not exist yet."""
    disk = tmp_path / "disk"
    disk.mkdir()
    for name in ("file", "folder", "new"):
        (tmp_path / name).symlink_to(disk / f"the {name}")
    (disk / "the file").write_text("old")
    (disk / "the file").chmod(0o600)
    check_output_file(tmp_path / "file")
    write_atomic(tmp_path / "file", b"new")
    assert (disk / "the file").read_text() == "new" and (disk / "the file").stat().st_mode & 0o777 == 0o600
    write_atomic(tmp_path / "new", b"new")
    for _ in range(2):
        saved = pr.save(nn.Linear(4, 4), tmp_path / "folder", factory=lambda: nn.Linear(4, 4), overwrite=True)
        assert saved.path == tmp_path / "folder" and pr.load(tmp_path / "folder", factory=lambda: nn.Linear(4, 4))
    assert sorted(place.name for place in disk.iterdir()) == ["the file", "the folder", "the new"]
    assert all((tmp_path / name).is_symlink() for name in ("file", "folder", "new"))
    assert sorted(place.name for place in tmp_path.iterdir()) == ["disk", "file", "folder", "new"]


def test_a_link_to_a_folder_has_its_lock(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to("out")
    with locked(tmp_path / "out"):
        assert lock_file(tmp_path / "link") == lock_file(tmp_path / "out") and lock_file(tmp_path / "link").exists()


def test_a_pipe_or_a_device_is_never_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link"):
        for write in (check_output_file, lambda path: write_atomic(path, b"x")):
            with pytest.raises(RequestError, match="a pipe or a device"):
                write(tmp_path / name)
    assert not (tmp_path / "pipe").is_file() and (tmp_path / "pipe").exists()
