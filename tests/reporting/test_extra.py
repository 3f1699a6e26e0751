"""What is there without the extra `report`, and what is said of the rest."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import prunella as pr
from prunella.app.job import Job
from prunella.app.run import run, summary
from prunella.cli.run import run_text
from prunella.errors import MissingExtra
from prunella.experiments.pareto_experiment import PAGE, RECORD, ParetoExperiment, pareto
from prunella.graph.solve.groups import couple
from prunella.io.card import Card, render_card
from prunella.reporting.chart import latency_chart
from prunella.reporting.coupling import render_coupling
from tests.app.test_run import net
from tests.experiments import experiment_parts as parts

SENTENCE = r"needs {}\nit is not installed\npip install 'prunella\[report\]'"
HIDDEN = ("matplotlib", "jinja2", "markupsafe")


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in HIDDEN:
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.usefixtures("bare")
def test_pages_and_charts_say_what_to_install() -> None:
    model, inputs = net(), torch.randn(2, 6)
    with pytest.raises(MissingExtra, match=SENTENCE.format("jinja2")):
        render_coupling(couple(model, inputs), "x")
    compared = pr.report(model, model, inputs, rounds=5)
    with pytest.raises(MissingExtra, match=SENTENCE.format("jinja2")):
        pr.reporting.write_page(compared, "never.html")
    with pytest.raises(MissingExtra, match=SENTENCE.format("matplotlib")):
        latency_chart(compared.latency)
    assert "parameters" in str(compared)


@pytest.mark.usefixtures("bare")
def test_a_run_writes_all_but_the_page_and_says_so(tmp_path: Path) -> None:
    job = Job(pr.Recipe(), pr.MACs(0.5), factory="tests.app.test_run:net")
    outcome = run(net(), torch.randn(2, 6), job, tmp_path / "out")
    reason = "no report.html: the HTML page needs jinja2, and it is not installed: pip install 'prunella[report]'"
    assert outcome.missing == reason and not (tmp_path / "out" / "report.html").exists()
    assert json.loads((tmp_path / "out" / "run.json").read_text())["missing"] == reason
    text = run_text(summary(outcome, job), tmp_path / "out")
    assert text.endswith(reason) and "multiply-adds" in text and "look at" not in text
    assert sum(p.numel() for p in pr.load(tmp_path / "out", factory=net).parameters()) == outcome.plan.after.params


@pytest.mark.usefixtures("bare")
def test_a_study_keeps_its_record_and_its_table(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        experiment = ParetoExperiment(parts.make, parts.evaluate, parts.example)
        found = pareto(experiment, tmp_path, ratios=(2,), seeds=(0,))
    assert (tmp_path / RECORD).is_file() and not (tmp_path / PAGE).exists()
    assert "prunella[report]" in caplog.text and "magnitude, global" in str(found)
    with pytest.raises(MissingExtra):
        found.section()


@pytest.mark.usefixtures("bare")
def test_a_card_needs_no_template_engine() -> None:
    assert "| base | $base &lt;x&gt; |" in render_card(Card("$base <x>", "Model", "admm", "2:4", 0.5))


def test_nothing_else_imports_the_extra() -> None:
    hide = f"import sys; sys.modules.update(dict.fromkeys({HIDDEN}))"
    modules = "page chart frontier coupling report section"
    imports = "; ".join(f"import prunella.reporting.{module}" for module in modules.split())
    code = f"{hide}; {imports}; import prunella.app.run, prunella.app.backends, prunella.experiments.pareto_experiment"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
