"""A path of the wrong kind: the error says what lies there, and which verb opens it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import prunella as pr
from prunella.errors import BadInput, RequestError
from prunella.io.kind_of_path import described_path
from prunella.io.load import load_model
from prunella.io.manifest import read_manifest
from prunella.io.plan_file import load_plan, save_plan
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
    return root


KINDS = {
    "a plan": "it is a plan: show opens it",
    "saved": "it is a folder that prunella saved: verify, report and inspect open it",
    "weights": "it is a safetensors file: --weights takes it",
    "archive": "it is an archive of torch, a program or a checkpoint: inspect opens FILE.pt2",
    "hub": "it is a Hugging Face folder: inspect, plan, run and llm open it",
    "run": "it is the folder of a run that resumes",
    "other": "it is a folder that holds no model",
    "empty": "it is an empty file",
    "text": "it is a file of another kind",
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
def test_a_file_or_another_folder_is_no_artefact(places: Path, name: str) -> None:
    with pytest.raises(BadInput, match="is not a finished artefact") as caught:
        read_manifest(places / name)
    assert KINDS[name] in caught.value.why


@pytest.mark.parametrize("name", ["a plan", "weights", "text", "empty"])
def test_a_file_that_is_there_is_not_called_missing(places: Path, name: str) -> None:
    with pytest.raises(RequestError, match="cannot find the model") as caught:
        load_model(str(places / name))
    assert KINDS[name] in caught.value.why
