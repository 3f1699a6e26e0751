"""`--device`: on every verb that runs a model, refused before any work where it is not there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import typer

from prunella.cli import device
from prunella.cli.app import app
from prunella.errors import NotSupported, RequestError
from tests.cli.conftest import Run

COMMANDS: Any = typer.main.get_command(app)
WITHOUT = {"doctor", "methods", "explain", "show", "report"}
LINES = {
    "pareto": ("--metric", "nowhere:x", "--inputs", "nowhere:x"),
    "compare": ("--data", "nowhere", "--text", "nowhere"),
    "eval": ("--data", "nowhere"),
    "import": ("nowhere",),
    "export": ("-o", "x.pt2"),
}


def test_every_verb_that_runs_a_model_has_it() -> None:
    having = {name for name, verb in COMMANDS.commands.items() if any("--device" in p.opts for p in verb.params)}
    assert set(COMMANDS.commands) - having == WITHOUT


@pytest.mark.parametrize("verb", sorted(set(COMMANDS.commands) - WITHOUT))
@pytest.mark.parametrize("name", ["meta", "cuda:99"])
def test_a_device_that_is_not_there_is_refused_first(prunella: Run, verb: str, name: str) -> None:
    model = () if verb == "demo" else ("nowhere",)
    done = prunella(verb, *model, *LINES.get(verb, ()), "--device", name)
    assert done.code == 6 and f"the device {name} cannot be used here" in done.err and done.out == ""


def test_what_is_no_device_is_misuse(prunella: Run) -> None:
    done = prunella("plan", "nowhere", "--device", "gpu")
    assert done.code == 2 and "there is no device 'gpu'" in done.err


def test_the_cpu_is_always_there(prunella: Run, shop: str) -> None:
    done = prunella("plan", f"{shop}:net", "--inputs", "1x3x8x8", "--target", "macs=0.5", "--device", "cpu", "--json")
    assert done.code == 0 and device.chosen() == "cpu"


def test_models_and_data_are_put_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "check_device", lambda name: None)
    batches = [{"x": torch.ones(2), "labels": (torch.zeros(1), 3)}]
    loader = torch.utils.data.DataLoader(torch.arange(6.0).split(1), batch_size=2)
    assert device.moved_batches(batches) is batches
    with device.on("meta"):
        model = device.placed(torch.nn.Linear(2, 2))
        (batch,) = device.moved_batches(batches)
        read: Any = device.moved_batches(loader)
        with pytest.raises(NotSupported, match="an export does not run on meta"):
            device.only_on_cpu("an export")
    assert model.weight.is_meta and batch["x"].is_meta and batch["labels"][0].is_meta and batch["labels"][1] == 3
    assert len(read) == 3 and read.dataset is loader.dataset and all(part.is_meta for part in read)
    assert device.chosen() == "cpu"
    device.only_on_cpu("an export")


def test_errors_of_a_check_have_types() -> None:
    with pytest.raises(RequestError):
        device.check_device("cuda:x")
    with pytest.raises(NotSupported, match=r"torch .* says"):
        device.check_device("xla")
