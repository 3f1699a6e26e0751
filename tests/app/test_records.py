"""What is passed on names no folder, no host and no person."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import torch
from torch import nn

import prunella as pr
from prunella.app.job import Job
from prunella.app.run import run
from prunella.cli.run import named
from prunella.io.card import Card, render_card
from prunella.io.origin import passed_on


def test_the_folder_of_a_run_does_not_say_where_it_was_made(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    command = " ".join(map(named, ["run", "x:net", "--weights", f"{tmp_path}/w.pt", f"--output={tmp_path}/out"]))
    assert command == "run x:net --weights w.pt --output=out"
    job = Job(pr.Recipe(pr.magnitude, pr.Channel()), pr.MACs(0.5), command=command)
    run(model, torch.ones(2, 8), job, tmp_path / "out")
    for file in (tmp_path / "out").iterdir():
        content = file.read_bytes()
        assert str(tmp_path).encode() not in content, file.name
        if file.suffix != ".safetensors" and len(socket.gethostname()) > 4:
            assert socket.gethostname().encode() not in content, file.name
    assert json.loads((tmp_path / "out" / "run.json").read_text())["folder"] == "out"


def test_a_configuration_does_not_say_from_which_folder_it_came() -> None:
    config = {"_name_or_path": "/home/alice/bert", "auto_map": {"AutoModel": "x.Y"}, "hidden_size": 3,
              "text_config": {"_name_or_path": "~/b", "n": 1}}  # fmt: skip
    assert passed_on(config) == {"hidden_size": 3, "text_config": {"n": 1}}
    assert passed_on({"_name_or_path": "bert-base-uncased"}) == {"_name_or_path": "bert-base-uncased"}


def test_a_card_has_no_links_cells_or_marks_of_its_text() -> None:
    base = "a | [x](javascript:alert(1)) `b` <img src=x onerror=y>\x1b[31m\u202e"
    text = render_card(Card(base, "BertModel", "wanda", "NM(2, 4)", 0.5))
    body = text.split("---")[2]  # its head is JSON, which says what it is
    assert "[x](" not in body and "<img" not in body and "\x1b" not in text and "\u202e" not in text
    row = next(line for line in text.splitlines() if line.startswith("| base"))
    assert row.count("|") == 3
