"""Every verb does its work, prints its result to stdout alone, and takes --json."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import prunella as pr
from prunella.io.plan_file import load_plan
from prunella.registry.method import REGISTRY
from tests.cli.conftest import Run

IMAGE = ("--inputs", "1x3x8x8")


def test_methods_lists_the_registry(prunella: Run) -> None:
    names = {entry["name"] for entry in prunella("methods", "--json").data}
    assert names == set(REGISTRY) and {"magnitude", "taylor", "uniform", "Channel", "reconstruct"} <= names
    text = prunella("methods", "criterion")
    assert "wanda" in text.out and "uniform" not in text.out and text.err == ""


def test_methods_of_no_kind(prunella: Run) -> None:
    result = prunella("methods", "criteria")
    assert result.code == 2 and "known are allocation, compression" in result.err


def test_explain_has_the_formula_needs_and_source(prunella: Run) -> None:
    text = prunella("explain", "wanda").out
    assert "|W_ij| * ||x_j||_2" in text and "input_norm" in text and "2306.11695" in text
    assert prunella("explain", "wanda", "--json").data["needs"] == ["weight", "input_norm"]


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("gradual", "pr.schedules.cubic"),
        ("2:4", "pr.NM(2, 4)"),
        ("lottery", "pr.lottery.find_ticket"),
        ("Distillation", "pr.recovery.distill_logits"),
        ("semi-structured", "pr.NM(2, 4)"),
    ],
)
def test_explain_finds_a_concept_and_names_what_to_type(prunella: Run, words: str, name: str) -> None:
    assert name in prunella("explain", words).out
    assert name in [typed for row in prunella("explain", words, "--json").data for typed in row["python"]]


def test_explain_leads_to_the_sections_of_a_method(prunella: Run) -> None:
    assert "docs:   methods/wanda.md, concepts/transformers.md#wanda" in prunella("explain", "wanda").out
    assert "docs:        concepts/schedules.md#gradual-cubic-pruning-agp" in prunella("explain", "GMP").out


def test_explain_suggests_a_concept(prunella: Run) -> None:
    assert "lottery" in prunella("explain", "lotery").err


def test_explain_did_you_mean(prunella: Run) -> None:
    result = prunella("explain", "wandda")
    assert result.code == 2 and "did you mean wanda" in result.err and result.out == ""


def test_inspect_counts_by_hand(prunella: Run, shop: str) -> None:
    data = prunella("inspect", f"{shop}:net", *IMAGE, "--json").data
    assert data["params"] == (3 * 9 * 8 + 8) + 2 * 8 + (8 * 9 * 16 + 16) + (16 * 4 + 4)
    assert data["macs"] == 27 * 8 * 36 + 72 * 16 * 16 + 64
    first = next(group for group in data["groups"] if group["name"] == "0")
    assert (first["units"], first["kind"]) == (8, "channel")
    assert first["unit_params"] == 27 + 1 + 2 + 9 * 16
    assert first["unit_macs"] == 27 * 36 + 9 * 16 * 16
    assert any("output" in entry["reason"] for entry in data["frozen"])
    text = prunella("inspect", f"{shop}:net", *IMAGE)
    assert "what cannot be pruned" in text.out and "params/unit" in text.out


def test_plan_show_and_the_file_agree(prunella: Run, shop: str) -> None:
    line = ("plan", f"{shop}:net", *IMAGE, "--target", "macs=0.5", "-o", "half.plan", "--json")
    data = prunella(*line).data
    assert data["after"]["macs"] <= 0.5 * data["before"]["macs"]
    assert prunella("show", "half.plan", "--json").data == data
    assert load_plan(Path("half.plan")).after.macs == data["after"]["macs"]
    assert "macs=0.5" in prunella("show", "half.plan").out


def test_plan_passes_every_option_on(prunella: Run, shop: str) -> None:
    options = ("--recipe", "taylor", "--allocation", "global", "--granularity", "channel", "--skip", "0", "--seed", "3")
    data = ("--data", f"{shop}:loader", "--loss", f"{shop}:loss")
    found = prunella("plan", f"{shop}:net", *IMAGE, "--target", "sparsity=0.25", *options, *data, "--json").data
    assert found["recipe"]["criterion"]["name"] == "taylor" and found["recipe"]["allocation"]["name"] == "global"
    assert found["recipe"]["seed"] == 3
    assert [(row["name"], row["kept"], row["total"]) for row in found["rows"]] == [("3", 12, 16)]
    assert [entry["reason"] for entry in found["frozen"] if entry["entity"] == "0.weight"] == ["skip='0'"]


def test_only(prunella: Run, shop: str) -> None:
    found = prunella("plan", f"{shop}:net", *IMAGE, "--target", "sparsity=0.5", "--only", "0", "--json").data
    assert [(row["name"], row["kept"]) for row in found["rows"]] == [("0", 4)]


def test_pattern_needs_no_target(prunella: Run, shop: str) -> None:
    found = prunella("plan", f"{shop}:net", *IMAGE, "--pattern", "2:4", "--skip", "0", "--json").data
    assert found["masks"] == {
        "3.weight": {"kept": 576, "total": 1152},
        "7.weight": {"kept": 32, "total": 64},
    }


def test_block_pattern(prunella: Run, shop: str) -> None:
    line = ("plan", f"{shop}:net", *IMAGE, "--pattern", "4x4", "--target", "sparsity=0.5", "--only", "7", "--json")
    found = prunella(*line).data
    assert found["masks"] == {"7.weight": {"kept": 32, "total": 64}}


def test_run_then_verify_report_and_load(prunella: Run, shop: str) -> None:
    recovery = (
        "--recover",
        "bn,reconstruct,distill:2,finetune:1",
        "--data",
        f"{shop}:loader",
        "--loss",
        f"{shop}:loss",
    )
    quality = ("--metric", f"{shop}:kept_filters", "--max-drop", "0.9")
    result = prunella("run", f"{shop}:net", *IMAGE, "--target", "macs=0.5", *recovery, *quality, "-o", "half", "--json")
    assert result.code == 0, result.err
    assert [item["by"] for item in result.data["recovered"]] == ["bn", "reconstruct", "distill:2", "finetune:1"]
    small = pr.load("half", factory=f"{shop}:net")
    assert sum(p.numel() for p in small.parameters()) == result.data["params"][1]
    assert result.data["quality"][0] == {"quality": 1.0}
    assert result.data["quality"][2] == {"quality": small[0].out_channels / 8}  # type: ignore[index, operator]
    verified = prunella("verify", "half", f"{shop}:net", "--json").data
    assert verified["rebuilt"] and verified["recovered"][1] == "reconstruct" and verified["equal"] > 0
    page = prunella("report", "half", "--json")
    assert page.code == 0 and Path(page.data["page"]).is_file() and page.data["params"] == result.data["params"]


def test_run_with_data_and_no_method_chooses_the_method(prunella: Run, shop: str) -> None:
    line = ("run", f"{shop}:net", *IMAGE, "--target", "macs=0.5", "--data", f"{shop}:loader", "--json")
    result = prunella(*line, "-o", "auto")
    assert result.code == 0, result.err
    assert [item["by"] for item in result.data["recovered"]] == ["reconstruct", "bn", "distill"]
    asked = prunella(*line, "--recipe", "auto", "-o", "asked")
    assert asked.data["params"] == result.data["params"] and asked.data["outputs"] == result.data["outputs"]
    plain = prunella(*line, "--recipe", "magnitude", "-o", "plain")
    assert plain.data["recovered"] == []
    refused = prunella(*line, "--recipe", "auto", "--granularity", "channel", "-o", "refused")
    assert refused.code == 2 and "--recipe auto does not go with --granularity" in refused.err


def test_a_run_without_recovery_equals_the_masked_model(prunella: Run, shop: str) -> None:
    done = prunella("run", f"{shop}:net", *IMAGE, "--target", "params=0.6", "-o", "out")
    assert done.code == 0 and done.out.splitlines()[1].startswith("NOT RECOVERED")
    assert "NOT RECOVERED" in Path("out/report.html").read_text(encoding="utf-8")
    verified = prunella("verify", "out", f"{shop}:net", "--json").data
    assert verified["rebuilt"] and verified["equal"] < 1e-6
    alone = prunella("verify", "out", "--json").data
    assert not alone["rebuilt"] and alone["files"] == verified["files"]


def test_a_masked_run(prunella: Run, shop: str) -> None:
    line = ("run", f"{shop}:net", *IMAGE, "--granularity", "element", "--target", "sparsity=0.5", "-o", "out", "--json")
    assert prunella(*line).code == 0
    state = pr.load("out", factory=f"{shop}:net").state_dict()
    assert int((state["3.weight"] == 0).sum()) == 576
    assert prunella("verify", "out", f"{shop}:net", "--json").data["equal"] < 1e-6


def test_verify_sees_a_changed_file(prunella: Run, shop: str) -> None:
    prunella("run", f"{shop}:net", *IMAGE, "--target", "macs=0.5", "-o", "out")
    file = Path("out/model.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    result = prunella("verify", "out")
    assert result.code == 3 and "model.safetensors" in result.err


def test_verify_sees_other_weights(prunella: Run, shop: str, tmp_path: Path) -> None:
    prunella("run", f"{shop}:net", *IMAGE, "--target", "macs=0.5", "-o", "out")
    other = tmp_path / f"{shop}.py"
    (tmp_path / f"other_{shop}.py").write_text(other.read_text().replace("manual_seed(0)", "manual_seed(1)"))
    result = prunella("verify", "out", f"other_{shop}:net")
    assert result.code == 1 and "differs" in result.err
    recovery = ("--recover", "bn", "--data", f"{shop}:loader", "--overwrite")
    assert prunella("run", f"{shop}:net", *IMAGE, "--target", "macs=0.5", *recovery, "-o", "out").code == 0
    assert prunella("verify", "out", f"{shop}:net").code == 0
    result = prunella("verify", "out", f"other_{shop}:net")
    assert result.code == 1 and "its weights differ" in result.err


def test_a_metric_that_gives_nan_ends_a_run(prunella: Run, shop: str, tmp_path: Path) -> None:
    (tmp_path / f"nan_{shop}.py").write_text("def quality(model):\n    return float('nan')\n")
    target = ("--target", "macs=0.5", "--metric", f"nan_{shop}:quality", "-o", "out")
    result = prunella("run", f"{shop}:net", *IMAGE, *target)
    assert result.code == 3 and "NaN" in result.err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["small.safetensors", "small.pt2"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_export_of_a_run(prunella: Run, shop: str, name: str) -> None:
    prunella("run", f"{shop}:net", *IMAGE, "--target", "macs=0.5", "-o", "out")
    result = prunella("export", "out", "--factory", f"{shop}:net", "-o", name, "--json")
    assert result.code == 0, result.err
    assert Path(name).stat().st_size > 0


def test_doctor_measures(prunella: Run) -> None:
    found = prunella("doctor", "--seconds", "0.1", "--json")
    assert found.code == 0 and found.data["system"]["torch"] == torch.__version__
    for trial in found.data["trials"]:
        assert 0 < trial["low"] <= trial["ratio"] <= trial["high"]
        assert trial["verdict"] in ("pays", "slower", "no gain", "unclear")


def test_version(prunella: Run) -> None:
    assert prunella("--version").out == f"prunella {pr.__version__}\n"


TYPED = """
import torch
from torch import nn


class Typed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 24), nn.Linear(8, 5)

    def forward(self, x):
        y = self.first(x).view(x.shape[0], 3, 8)
        return self.last(y[:, 0] * y[:, 1] + y[:, 2])


def net():
    torch.manual_seed(0)
    return Typed()
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_typed_sizes_follow_in_a_program(prunella: Run, shop: str, tmp_path: Path) -> None:
    (tmp_path / f"typed_{shop}.py").write_text(TYPED)
    asked = (f"typed_{shop}:net", "--inputs", "2x8", "--target", "params=0.6")
    refused = prunella("run", *asked, "-o", "out")
    assert refused.code == 6 and "typed into the source" in refused.err and "--program" in refused.err
    seen = prunella("inspect", *asked[:3], "--program", "--json")
    assert [(g["name"], g["units"]) for g in seen.data["groups"]] == [("first", 8)]
    assert "--program" in prunella("inspect", *asked[:3]).out
    planned = prunella("plan", *asked, "--program", "--json")
    assert 0 < planned.data["rows"][0]["kept"] < 8
    done = prunella("run", *asked, "--program", "-o", "out", "--json")
    assert done.code == 0, done.err
    proven = prunella("verify", "out", *asked[:3])
    assert proven.code == 0, proven.err
    again = prunella("export", "out", "-o", "small.pt2", "--json")
    assert again.code == 0, again.err
    assert prunella("plan", "small.pt2", "--inputs", "2x8", "--target", "params=0.7", "--json").code == 0


def test_plan_with_an_example_of_another_size(prunella: Run, shop: str) -> None:
    line = ("plan", f"{shop}:net", *IMAGE, "--other-inputs", "2x3x10x10", "--target", "macs=0.5", "-o", "two.plan")
    assert prunella(*line).code == 0
    (other,) = load_plan(Path("two.plan")).others
    assert isinstance(other, torch.Tensor) and other.shape == (2, 3, 10, 10)
    wrong = prunella("plan", f"{shop}:net", *IMAGE, "--other-inputs", "2x5x10x10", "--target", "macs=0.5")
    assert wrong.code == 3 and "fails on the example input 2x5x10x10" in wrong.err


@pytest.mark.parametrize(
    ("words", "typed"),
    [
        ("2:4", "--pattern 2:4"),
        ("FLOPs", "--target macs=0.5"),
        ("wanda", "--recipe wanda"),
        ("erk", "--allocation erk"),
    ],
)
def test_explain_says_what_to_type_on_the_command_line(prunella: Run, words: str, typed: str) -> None:
    assert typed in prunella("explain", words).out


def test_what_is_near_nothing_gets_no_near_names(prunella: Run) -> None:
    told = prunella("explain", "nonsense").err
    assert "did you mean" not in told and "prunella methods" in told


@pytest.mark.parametrize(("shape", "advice"), [("1x5", "--inputs 1x3x224x224"), (None, "--inputs 1x3x224x224")])
def test_advice_on_inputs_is_for_this_model(prunella: Run, shop: str, shape: str | None, advice: str) -> None:
    given = ["--inputs", shape] if shape else []
    assert advice in prunella("inspect", f"{shop}:net", *given).err
