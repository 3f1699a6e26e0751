"""Tables for other programs: read again, and nothing in them is obeyed."""

from __future__ import annotations

import csv

import torch
from torch import nn

import prunella as pr
from prunella.measure.formats import csv_table, html_table, latex_table


def test_csv_is_read_again_and_runs_no_formula() -> None:
    text = csv_table(("name", "x"), [('a,"b"', 1.5), ("=cmd()", -2.0), ("\x1b[2J", float("nan"))])
    rows = list(csv.reader(text.splitlines()))
    assert rows[0] == ["name", "x"] and rows[1] == ['a,"b"', "1.5"] and rows[2] == ["'=cmd()", "-2.0"]
    assert "\x1b" not in text


def test_latex_escapes_what_it_would_obey() -> None:
    text = latex_table(("a_b", "x"), [(r"\input{x} & 5 %", "3 ± 1")], right=(1,))
    assert text.startswith(r"\begin{tabular}{lr}") and r"a\_b & x \\" in text
    assert r"\textbackslash{}input\{x\} \& 5 \%" in text and r"3 $\pm$ 1" in text


def test_html_is_escaped_and_short() -> None:
    text = html_table("<h>", ("<a>",), [("<script>alert(1)</script>",)] * 70, ("a & b",))
    assert "<script" not in text and "&lt;script&gt;" in text and "and 10 more rows" in text and "a &amp; b" in text


class Named(nn.Module):
    """A model with a module of a name that a page would obey."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("<img onerror=x>", nn.Linear(8, 16))
        self.last = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.get_submodule("<img onerror=x>")
        return self.last(first(x))


def test_plans_reports_and_results_show_themselves_in_notebooks() -> None:
    model, x = Named().eval(), torch.randn(4, 8)
    made = pr.prune(model, x, target=pr.Params(0.6))
    shown = [made.plan._repr_html_(), pr.report(model, made.model, x, rounds=5)._repr_html_(), made._repr_html_()]
    assert all(text.startswith("<div><b>") and "<img" not in text and "<script" not in text for text in shown)
    assert "&lt;img onerror=x&gt;" in shown[0] and "parameters" in shown[1] and "NOT RECOVERED" in shown[2]
