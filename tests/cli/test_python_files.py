"""Functions that are named by their file: FILE.py:name, for the model, its data and its metric."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prunella.errors import RequestError
from prunella.io.load import load_object
from tests.cli.conftest import MODULE, Run

IMAGE = ("--inputs", "1x3x8x8")


@pytest.fixture
def file(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A file with a model, and a neighbour that it imports."""
    folder = tmp_path / "some" / "where"
    folder.mkdir(parents=True)
    name = "".join(letter for letter in request.node.name if letter.isalnum())
    (folder / f"beside_{name}.py").write_text(MODULE)
    path = folder / f"nets_{name}.py"
    path.write_text(f"from beside_{name} import *\nfrom beside_{name} import net, loader\n")
    return path


def test_a_run_takes_functions_of_a_file_and_records_no_folder(prunella: Run, file: Path, tmp_path: Path) -> None:
    output = tmp_path / "small"
    result = prunella(
        "run", f"{file}:net", *IMAGE, "--remove", "0=1", "--metric", f"{file}:kept_filters", "-o", str(output)
    )
    assert result.code == 0, result.err
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["origin"]["name"] == f"{file.name}:net"
    assert all(str(tmp_path) not in path.read_text() for path in output.glob("*.json"))
    again = prunella("verify", str(output), f"{file}:net")
    assert again.code == 0, again.err
    assert "give its MODEL" in prunella("verify", str(output)).out


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("{file}", "name one: "),
        ("{file}:nett", "has no 'nett'"),
        ("{folder}/none.py:net", "there is no file"),
        ("{folder}/json.py:net", "a module named json is in use"),
        ("{folder}/wrong.py:net", "SyntaxError"),
    ],
)
def test_what_cannot_be_imported(prunella: Run, file: Path, spec: str, says: str) -> None:
    (file.parent / "json.py").write_text("net = None\n")
    (file.parent / "wrong.py").write_text("def net(:\n")
    result = prunella("inspect", spec.format(file=file, folder=file.parent), *IMAGE)
    assert result.code in (2, 3) and says in result.err


def test_what_a_file_says_is_never_a_path(file: Path) -> None:
    with pytest.raises(RequestError, match="cannot import"):
        load_object(f"{file}:net")
