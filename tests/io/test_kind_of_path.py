"""A path of the wrong kind: the error says what lies there, and which verb opens it."""

from __future__ import annotations

import os
import shutil
import sqlite3
import zipfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import prunella as pr
from prunella.errors import BadInput, RequestError
from prunella.io.checkpoint_file import load_tensors_only
from prunella.io.exported import load_exported
from prunella.io.json import read_json
from prunella.io.kind_of_path import described_path
from prunella.io.load import load_model, load_weights
from prunella.io.manifest import read_manifest
from prunella.io.plan_file import load_plan, save_plan
from prunella.io.tensor_file import open_tensors
from tests.graphs import mlp

X = torch.randn(2, 4)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a path of each kind."""
    root = tmp_path_factory.mktemp("places")
    plan = pr.plan(mlp().eval(), X, target=pr.MACs(0.5))
    save_plan(plan, root / "a plan")
    pr.save(pr.shrink(mlp().eval(), plan), root / "saved", plan=plan, factory=mlp)
    save_file({"w": torch.ones(2)}, root / "weights")
    torch.save({"w": torch.ones(2)}, root / "archive")
    for name, file in (("hub", "config.json"), ("run", "journal.sqlite"), ("other", "x")):
        (root / name).mkdir()
        (root / name / file).write_text("{}")
    (root / "empty").touch()
    (root / "text").write_text("hello")
    (root / "page").write_text("<!DOCTYPE html><html><title>404 Not Found</title></html>")
    (root / "pointer").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n")
    (root / "image").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(64))
    (root / "noise").write_bytes(bytes(range(200, 256)) * 4)
    with zipfile.ZipFile(root / "zip", "w") as archive:
        archive.writestr("a.txt", "hello")
    torch.save(torch.nn.Linear(2, 2), root / "module")
    os.mkfifo(root / "pipe")
    with closing(sqlite3.connect(root / "journal")) as database:
        database.execute("CREATE TABLE t(a)")
    return root


KINDS = {
    "a plan": "it is a plan: show opens it",
    "saved": "it is a folder that prunella saved: verify, report and inspect open it",
    "weights": "it is a safetensors file: --weights takes it",
    "archive": "it is a checkpoint of torch: --weights takes FILE.pt",
    "hub": "it is a Hugging Face folder: inspect, plan, run and llm open it",
    "run": "it is the folder of a run that resumes",
    "other": "it is a folder that holds no model",
    "empty": "it is an empty file",
    "text": "it is a text file",
    "page": "it is a web page (HTML)",
    "pointer": "it is a pointer of Git LFS",
    "image": "it is an image (PNG)",
    "zip": "it is a zip archive",
    "module": "it is a pickle of an object, torch.nn.modules.linear.Linear",
    "pipe": "it is a pipe or a device",
    "journal": "it is the journal of a run",
    "noise": "it is a file of another kind",
    "missing": "no such file or folder",
}


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_is_named(places: Path, name: str) -> None:
    assert described_path(places / name).startswith(KINDS[name])


@pytest.mark.parametrize("name", ["saved", "hub", "other", "missing"])
def test_a_folder_is_no_plan(places: Path, name: str) -> None:
    with pytest.raises(BadInput, match="there is no plan at") as caught:
        load_plan(places / name)
    assert KINDS[name] in caught.value.why


@pytest.mark.parametrize("name", ["a plan", "weights", "hub", "run"])
def test_a_file_or_another_folder_is_no_artifact(places: Path, name: str) -> None:
    with pytest.raises(BadInput, match="is not a finished artifact") as caught:
        read_manifest(places / name)
    assert KINDS[name] in caught.value.why


@pytest.mark.parametrize("name", ["a plan", "weights", "text", "empty"])
def test_a_file_that_is_there_is_not_called_missing(places: Path, name: str) -> None:
    with pytest.raises(RequestError, match="cannot find the model") as caught:
        load_model(str(places / name))
    assert KINDS[name] in caught.value.why


def test_pickles_in_the_manner_of_every_version(tmp_path: Path) -> None:
    file = tmp_path / "x"
    for archive in (True, False):
        for value in (
            {"w": torch.ones(2)},
            {"epoch": 3, "model": {"w": torch.ones(2)}},
            torch.nn.Parameter(torch.ones(2)),
        ):
            torch.save(value, file, _use_new_zipfile_serialization=archive)
            assert described_path(file).startswith("it is a checkpoint of torch")
        torch.save(mlp(), file, _use_new_zipfile_serialization=archive)
        assert described_path(file).startswith("it is a pickle of an object, torch.nn.modules.container.Sequential")


READERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "plan": (load_plan, "x.plan"),
    "safetensors": (open_tensors, "x.safetensors"),
    "torch": (load_tensors_only, "x.pt"),
    "program": (load_exported, "x.pt2"),
    "json": (read_json, "x.json"),
    "weights": (lambda file: load_weights(mlp(), file), "x.pth"),
    "model": (lambda file: load_model(str(file)), "x.bin"),
    "gguf": (lambda file: load_model(str(file)), "x.gguf"),
}
FOREIGN = ("text", "page", "pointer", "image", "zip", "journal", "empty")


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", FOREIGN)
def test_every_reader_says_what_a_file_of_another_kind_is(places: Path, name: str, reader: str, tmp_path: Path) -> None:
    read, called = READERS[reader]
    shutil.copy(places / name, tmp_path / called)
    with pytest.raises(BadInput) as caught:
        read(tmp_path / called)
    assert caught.value.why.startswith(KINDS[name]) and caught.value.todo
    if name == "pointer":
        assert "git lfs pull" in caught.value.todo


def test_what_is_of_the_right_kind_but_cut_short_is_damaged(places: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes((places / "weights").read_bytes()[:-1])
    with pytest.raises(BadInput, match="truncated or damaged"):
        open_tensors(file)
