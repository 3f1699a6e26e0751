"""What the operating system refuses: which error it becomes, and that nothing half written is left."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from prunella.errors import BadInput, OutOfResources, PruningError, RequestError, out_of_resources, system_error
from prunella.io.artifact import save
from prunella.io.export import export
from prunella.io.files import make_folder, new_folder, reading, write_atomic, writing
from prunella.io.nested import save_state


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENOMEM])
@pytest.mark.parametrize("guard", [reading, writing])
def test_what_is_used_up_is_said_everywhere(guard: Callable[[str], Any], number: int) -> None:
    with pytest.raises(OutOfResources, match=r"x\.plan") as caught, guard("x.plan"):
        raise OSError(number, os.strerror(number))
    assert caught.value.exit_code == 5 and os.strerror(number) in caught.value.why


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.EISDIR, errno.ENOTDIR])
def test_a_path_that_cannot_be_used_is_named(number: int) -> None:
    with pytest.raises(BadInput, match=r"x\.plan cannot be read") as read, reading("x.plan"):
        raise OSError(number, os.strerror(number), "x.plan")
    with pytest.raises(RequestError, match=r"cannot write x\.plan") as written, writing("x.plan"):
        raise OSError(number, os.strerror(number), "x.plan")
    assert read.value.why == written.value.why == os.strerror(number)


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (MemoryError(), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 8 TiB"), "out of memory"),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534"), "the disk is full"),
        (Exception("I/O error: No space left on device (os error 28)"), "the disk is full"),
        (Exception("database or disk is full"), "the disk is full"),
    ],
)
def test_libraries_that_hide_the_error(error: Exception, what: str) -> None:
    found = out_of_resources(error)
    assert found is not None and found.what == what
    with pytest.raises(OutOfResources, match=what), writing("x"):
        raise error


def test_other_errors_pass_as_they_are() -> None:
    assert out_of_resources(ValueError("x")) is None and out_of_resources(OSError(errno.EIO, "unexpected pos")) is None
    for error in (ValueError("x"), BadInput("x"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, writing("x"):
            raise error
        assert caught.value is error
    assert isinstance(system_error(OSError(errno.EIO, "broken"), "x", "y"), BadInput)


@pytest.fixture
def short_files() -> Iterator[None]:
    """No file of this process may be longer than 2 KiB: the system refuses in the middle, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


WRITERS: list[Callable[[Path], object]] = [
    lambda path: write_atomic(path, b"x" * 10_000),
    lambda path: write_atomic(path, lambda file: save_file({"x": torch.zeros(5000)}, file)),
    lambda path: save_state({"x": torch.zeros(5000)}, path),
    lambda path: save(nn.Linear(80, 80), path),
    lambda path: export(nn.Linear(80, 80), path.with_suffix(".safetensors"), inputs=torch.zeros(1, 80)),
    lambda path: export(nn.Linear(80, 80), path.with_suffix(".pt2"), inputs=torch.zeros(1, 80)),
]


@pytest.mark.usefixtures("short_files")
@pytest.mark.parametrize("write", WRITERS)
def test_a_disk_that_is_really_full(tmp_path: Path, write: Callable[[Path], object]) -> None:
    with pytest.raises(OutOfResources, match="the disk is full"):
        write(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_folders_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RequestError, match="Not a directory"):
        make_folder(tmp_path / "file" / "out")
    with pytest.raises(RequestError, match="cannot write"), new_folder(tmp_path / "file" / "out"):
        pass
    assert make_folder(tmp_path / "a" / "b").is_dir() and make_folder(tmp_path / "a" / "b").is_dir()


def test_a_full_disk_leaves_the_old_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text("old")
    with pytest.raises(PruningError, match="the disk is full"), new_folder(tmp_path / "out", overwrite=True) as folder:
        (folder / "manifest.json").write_text("new")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "manifest.json").read_text() == "old"
