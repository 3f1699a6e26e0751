"""The picture of the coupling: every group is a rail with a dot at each layer that makes or reads it."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from prunella.cli.app import app
from prunella.graph.data import Graph
from prunella.graph.solve.groups import couple
from prunella.reporting.coupling import rails, render_coupling


class Residual(nn.Module):
    """A stem, a block with its shortcut, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        out: Tensor = self.head(x + self.b(self.a(x).relu()))
        return out


def _graph() -> Graph:
    return couple(Residual(), torch.randn(2, 4))


def test_rails_go_from_what_makes_a_group_to_what_reads_it() -> None:
    stream, inner = rails(_graph())
    assert (stream.name, inner.name) == ("stem", "a")
    # rows: stem 0, a 1, b 2, head 3
    assert [(s.row, s.makes) for s in stream.stops] == [(0, True), (1, False), (2, True), (3, False)]
    assert [(s.row, s.makes) for s in inner.stops] == [(1, True), (2, False)]
    assert stream.column != inner.column and stream.color != inner.color


def test_a_column_is_used_again_when_its_group_has_ended() -> None:
    layers = [layer for _ in range(6) for layer in (nn.Linear(8, 8), nn.ReLU())]
    found = rails(couple(nn.Sequential(*layers, nn.Linear(8, 2)), torch.randn(2, 8)))
    assert len(found) == 6 and {rail.column for rail in found} == {0, 1}


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.circles = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not any(name.startswith("on") or name in ("src", "href") for name, _ in attrs)


def test_the_page_escapes_names_and_runs_nothing() -> None:
    graph = _graph()
    evil = "<script>alert(1)</script>"
    graph = replace(graph, groups=tuple(replace(g, name=evil) for g in graph.groups))
    page = render_coupling(graph, evil)
    assert "<script" not in page and "&lt;script&gt;" in page
    parser = _Tags()
    parser.feed(page)
    assert parser.tags.count("circle") == 6 and not {"script", "link", "img", "iframe"} & set(parser.tags)


def test_inspect_writes_the_page_and_does_not_overwrite_it(tmp_path: Path) -> None:
    file = tmp_path / "map.html"
    command = ["inspect", "tests.reporting.test_coupling:Residual", "--inputs", "2x4", "--html", str(file)]
    assert CliRunner().invoke(app, command).exit_code == 0
    assert "What goes together" in file.read_text(encoding="utf-8")
    again = CliRunner().invoke(app, command)
    assert again.exit_code != 0
