"""What is not finished has another name, which says whose it is; the next writer cleans up what a kill has left."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

import prunella as pr
from prunella.io import files, temporary
from prunella.io.files import new_folder, write_atomic
from prunella.io.temporary import clean_up, discard, name_aside, remove_folder, temporary_file, temporary_folder
from tests.stopping import killed


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_a_killed_process_left_goes_with_the_next_write(tmp_path: Path) -> None:
    assert killed(lambda: write_atomic(tmp_path / "a", die)) == -signal.SIGKILL
    assert len(names(tmp_path)) == 1 and names(tmp_path)[0].startswith(".a.")
    write_atomic(tmp_path / "b", b"x")
    assert names(tmp_path) == ["b"]


def test_a_folder_of_a_killed_process_goes_with_the_next_one(tmp_path: Path) -> None:
    def write() -> None:
        with new_folder(tmp_path / "out") as folder:
            (folder / "half").touch()
            die()

    assert killed(write) == -signal.SIGKILL
    with new_folder(tmp_path / "out") as folder:
        assert len([name for name in names(tmp_path) if name.endswith(".part")]) == 1
        (folder / "whole").touch()
    assert names(tmp_path) == ["out"]


def test_what_was_moved_aside_comes_back_if_nothing_took_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / files.MARKER).write_text("old")
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)

    def write() -> None:
        with new_folder(tmp_path / "out", overwrite=True) as folder:
            (folder / files.MARKER).write_text("new")
            monkeypatch.setattr(Path, "rename", die)

    assert killed(write) == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    clean_up(tmp_path)
    assert (tmp_path / "out" / files.MARKER).read_text() == "old" and names(tmp_path) == ["out", ".out.lock"][::-1]


def test_half_of_a_removed_folder_never_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "a").touch()

    def remove() -> None:
        monkeypatch.setattr(shutil, "rmtree", die)
        remove_folder(folder, of=tmp_path / "name")

    assert killed(remove) == -signal.SIGKILL
    assert not folder.exists() and len(names(tmp_path)) == 1
    clean_up(tmp_path)
    assert names(tmp_path) == []


def test_a_kill_while_the_replaced_folder_is_removed_leaves_nothing_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new, final = tmp_path / ".out.new", tmp_path / "out"
    for folder in (new, final):
        folder.mkdir()
        (folder / "a").write_text(folder.name)

    def swap() -> None:
        monkeypatch.setattr(shutil, "rmtree", die)
        files.swap_in(new, final)

    assert killed(swap) == -signal.SIGKILL
    assert (final / "a").read_text() == ".out.new" and not new.exists()
    clean_up(tmp_path, of=final)
    assert names(tmp_path) == ["out"]


def test_those_of_live_processes_and_of_this_one_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine, folder = temporary_file(tmp_path / "a"), temporary_folder(tmp_path / "b")
    elsewhere = tmp_path / ".c.00000000-1-00000000.part"
    live = tmp_path / f".d.{temporary._space()}-{os.getppid()}-00000000.part"
    before_us = tmp_path / f".e.{temporary._space()}-{os.getpid()}-00000000.part"
    for path in (elsewhere, live, before_us, tmp_path / ".f.part"):
        path.touch()
    clean_up(tmp_path)
    assert {*names(tmp_path)} == {mine.name, folder.name, elsewhere.name, live.name, ".f.part"}
    clean_up(tmp_path, of=tmp_path / "c")  # locked: nobody else writes it
    assert not elsewhere.exists() and live.exists()
    discard(mine)
    discard(folder)
    assert not mine.exists() and not folder.exists()
    assert name_aside(tmp_path / "a").name.endswith(".old")
    assert len(os.fsencode(temporary_file(tmp_path / ("x" * 250)).name)) <= 255


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_modes_follow_the_umask_and_a_file_keeps_its_own(tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        model = nn.Linear(4, 4)
        pr.save(model, tmp_path / "out", factory=lambda: nn.Linear(4, 4))
        plan = pr.plan(
            nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.ones(1, 4), target=pr.MACs(0.6)
        )
        file = pr.io.save_plan(plan, tmp_path / "x.plan")
        assert {path.stat().st_mode & 0o777 for path in (*(tmp_path / "out").iterdir(), file)} == {mode}
        assert (tmp_path / "out").stat().st_mode & 0o777 == mode | (mode & 0o444) >> 2
        file.chmod(0o640)
        pr.io.save_plan(plan, file)
        assert file.stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)
