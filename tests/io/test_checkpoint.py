"""Checkpoints as training loops write them: the right weights are taken and it is said how, or they are refused."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import prunella as pr
from prunella.errors import BadInput, NotSupported, RequestError
from prunella.io.load import load_model, load_weights
from tests.cli.conftest import Run, prunella, shop
from tests.graphs import convnet, images

__all__ = ["prunella", "shop"]

State = dict[str, Tensor]


def trained() -> nn.Module:
    model = convnet(seed=1)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(1)
    return model


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: value for name, value in state.items()}


def of_training(model: nn.Module) -> dict[str, Any]:
    """What an optimizer adds, with tensors in its own mappings."""
    optimizer = torch.optim.AdamW(model.parameters())
    model(images()[0]).sum().backward()
    optimizer.step()
    return {"optimizer": optimizer.state_dict(), "epoch": 3, "rng": torch.get_rng_state(), "args": Namespace(lr=0.1)}


FILES: dict[str, tuple[Callable[[State], Any], str]] = {
    "plain": (lambda s: s, ""),
    "entry": (lambda s: {"state_dict": s, "epoch": 3}, "'state_dict'"),
    "training": (lambda s: {"model": s, **of_training(convnet())}, "'model'"),
    "ema": (lambda s: {"ema": s, "epoch": torch.tensor(3)}, "'ema'"),
    "odd name": (lambda s: {"net_weights": s}, "'net_weights'"),
    "module": (lambda s: prefixed("module.", s), "'module.'"),
    "nested": (lambda s: prefixed("module.model.", s), "'module.model.'"),
    "compiled": (lambda s: prefixed("_orig_mod.", s), "wrappers"),
    "compiled in part": (lambda s: {f"0._orig_mod.{n[2:]}" if n[0] == "0" else n: v for n, v in s.items()}, "wrappers"),
    "both": (lambda s: prefixed("module._orig_mod.net.", s), "'module._orig_mod.net.'"),
    "Lightning": (lambda s: {"state_dict": prefixed("model.", s), "hyper_parameters": {"lr": 1e-3}}, "'model.'"),
    "teacher of another width": (lambda s: {"student": s, "teacher": convnet_of(9)}, "'student'"),
}  # fmt: skip


def convnet_of(width: int) -> State:
    model = convnet()
    model[0], model[1] = nn.Conv2d(3, width, 3, bias=False), nn.BatchNorm2d(width)
    return model.state_dict()


@pytest.mark.parametrize("kind", FILES)
def test_the_weights_are_found_and_it_is_said_where(kind: str, tmp_path: Path) -> None:
    source, lines = trained(), list[str]()
    make, say = FILES[kind]
    torch.save(make(source.state_dict()), tmp_path / "c.pth")
    model = convnet()
    load_weights(model, tmp_path / "c.pth", allow_pickle=True, tell=lines.append)
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in model.state_dict().items())
    assert say in "; ".join(lines) and bool(lines) == bool(say)


def test_an_averaged_model_and_safetensors_have_a_prefix_too(tmp_path: Path) -> None:
    averaged, lines = AveragedModel(trained()), list[str]()
    save_file({n: v.contiguous().clone() for n, v in averaged.state_dict().items()}, tmp_path / "c.safetensors")
    model = convnet()
    load_weights(model, tmp_path / "c.safetensors", tell=lines.append)
    assert torch.equal(model[0].weight, averaged.module[0].weight) and "'module.'" in lines[0]


def test_a_model_with_a_prefix_takes_bare_names(tmp_path: Path) -> None:
    source, lines = trained(), list[str]()
    torch.save(source.state_dict(), tmp_path / "c.pth")
    model = nn.ModuleDict({"backbone": convnet()})
    load_weights(model, tmp_path / "c.pth", allow_pickle=True, tell=lines.append)
    assert torch.equal(model["backbone"].get_parameter("0.weight"), source[0].weight)  # type: ignore[index]
    assert "put the prefix 'backbone.'" in lines[0]


def test_two_sets_that_fit_are_refused_until_one_is_named(tmp_path: Path) -> None:
    source = trained()
    content = {"model": convnet().state_dict(), "model_ema": source.state_dict(), "deep": {"er": source.state_dict()}}
    torch.save(content, tmp_path / "c.pth")
    with pytest.raises(RequestError, match="several sets of weights") as caught:
        load_weights(convnet(), tmp_path / "c.pth", allow_pickle=True)
    assert "'model' and 'model_ema'" in caught.value.why and "--weights-key model" in caught.value.todo
    for key in ("model_ema", "deep.er"):
        model = convnet()
        load_weights(model, tmp_path / "c.pth", key=key, allow_pickle=True)
        assert torch.equal(model[0].weight, source[0].weight)
    with pytest.raises(RequestError, match="no entry 'emma'") as caught:
        load_weights(convnet(), tmp_path / "c.pth", key="emma", allow_pickle=True)
    assert "'model_ema'" in caught.value.why


@pytest.mark.parametrize(
    ("spoil", "say"),
    [
        (lambda s: {**prefixed("model.", s), "criterion.weight": torch.ones(4)}, "criterion.weight"),
        (lambda s: {**prefixed("module.", s), "0.weight": s["0.weight"]}, "mean one weight"),
        (lambda s: {"epoch": 3, "lr": 0.1}, "no tensors"),
        (lambda s: [1, 2], "no tensors"),
        (lambda s: {"state_dict": {"x.weight": torch.ones(2)}}, "missing"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_left_out(spoil: Any, say: str, tmp_path: Path) -> None:
    torch.save(spoil(trained().state_dict()), tmp_path / "c.pth")
    model = convnet()
    with pytest.raises(BadInput, match=say):
        load_weights(model, tmp_path / "c.pth", allow_pickle=True)
    assert torch.equal(model[0].weight, convnet()[0].weight)


class Odd:
    """A class of the user."""


def test_other_classes_in_a_checkpoint_are_never_built(tmp_path: Path) -> None:
    torch.save({"model": trained().state_dict(), "config": Odd()}, tmp_path / "c.pth")
    with pytest.raises(BadInput, match="tensors and plain data") as caught:
        load_weights(convnet(), tmp_path / "c.pth", allow_pickle=True)
    assert "Odd" in caught.value.why and "state_dict() alone" in caught.value.todo


def test_an_importer_reads_such_checkpoints_too(tmp_path: Path) -> None:
    x, pruned = images()[0], convnet().eval()
    with torch.no_grad():
        pruned[0].weight[:, :, 0] = 0
    state = prefixed("net.", pruned.state_dict())
    plan = pr.importers.import_plan(convnet().eval(), x, {"weights": state, "epoch": 3})
    assert not bool(plan.masks["0.weight"][:, :, 0].any()) and any("'net.'" in remark for remark in plan.remarks)
    both = {"model": convnet().state_dict(), "model_ema": state}
    with pytest.raises(RequestError, match="several sets"):
        pr.importers.import_plan(convnet().eval(), x, both)
    again = pr.importers.import_plan(convnet().eval(), x, both, key="model_ema")
    assert torch.equal(again.masks["0.weight"], plan.masks["0.weight"])


def test_an_adapter_is_named_with_its_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "a/b"}))
    save_file({"lora_A.weight": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(NotSupported, match="LORA adapter") as caught:
        load_model(str(tmp_path))
    assert "'a/b'" in caught.value.why and "merge_and_unload" in caught.value.todo
    with pytest.raises(NotSupported, match="LORA adapter"):
        pr.importers.import_plan(convnet().eval(), images()[0], tmp_path)


def test_every_verb_with_weights_takes_a_key(prunella: Run, shop: str) -> None:
    for verb in ("inspect", "scan", "plan", "import", "run", "bench", "export", "verify"):
        assert "--weights-key" in prunella(verb, "--help").out


def test_the_command_line_says_what_it_took(prunella: Run, shop: str) -> None:
    torch.save({"model": load_model(f"{shop}:net").state_dict(), "model_ema": {}, "epoch": 1}, "c.ckpt")
    words = ("plan", f"{shop}:net", "--inputs", "1x3x8x8", "--target", "macs=0.5", "--weights", "c.ckpt")
    result = prunella(*words, "--allow-pickle")
    assert result.code == 0 and "prunella: c.ckpt: the weights are those of its entry 'model'" in result.err
    assert prunella(*words, "--allow-pickle", "--weights-key", "epoch").code == 3
    assert prunella(*words[:-2], "--weights-key", "model").code == 2


def test_weights_two_levels_down_and_counters_that_old_files_lack(tmp_path: Path) -> None:
    state, said = trained().state_dict(), list[str]()
    old = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    for content, word in (
        ({"run": {"net": state, "optimizer": of_training(convnet())["optimizer"]}}, "'run.net'"),
        (old, "no counters"),
    ):
        torch.save(content, tmp_path / "x.pt")
        model = convnet()
        load_weights(model, tmp_path / "x.pt", allow_pickle=True, tell=said.append)
        assert all(torch.equal(value, state[name]) for name, value in model.named_parameters())
        assert word in said[-1]
    with pytest.raises(BadInput, match="no tensors"):
        torch.save({"optimizer": of_training(convnet())["optimizer"]}, tmp_path / "x.pt")
        load_weights(convnet(), tmp_path / "x.pt", allow_pickle=True)


def sharded(state: dict[str, Tensor], folder: Path) -> Path:
    """Two files of safetensors and their index."""
    folder.mkdir()
    names = sorted(state)
    files = {name: f"model-0000{1 + k % 2}-of-00002.safetensors" for k, name in enumerate(names)}
    for file in {*files.values()}:
        save_file({name: state[name] for name in names if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
@pytest.mark.parametrize("index", [False, True])
def test_sharded_weights_are_given_as_their_folder_or_their_index(prefix: str, index: bool, tmp_path: Path) -> None:
    source = trained()
    folder = sharded(prefixed(prefix, source.state_dict()), tmp_path / "weights")
    model = convnet()
    load_weights(model, folder / "model.safetensors.index.json" if index else folder)
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in model.state_dict().items())
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(BadInput, match="model-00002-of-00002"):
        load_weights(convnet(), folder)


def test_weights_that_are_an_adapter_are_named_with_its_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "a/b"}))
    file = tmp_path / "adapter_model.safetensors"
    save_file({"lora_A.weight": torch.ones(2)}, file)
    for given in (tmp_path, file):
        with pytest.raises(NotSupported, match="LORA adapter") as caught:
            load_weights(convnet(), given)
        assert "'a/b'" in caught.value.why
    save_file(trained().state_dict(), tmp_path / "merged.safetensors")
    load_weights(convnet(), tmp_path / "merged.safetensors")


def test_a_misspelt_name_is_told_with_the_near_one_and_a_cut_file_is_no_matter_of_its_content(tmp_path: Path) -> None:
    state = trained().state_dict()
    state["0.weigth"] = state.pop("0.weight")
    torch.save(state, tmp_path / "c.pth")
    with pytest.raises(BadInput, match="does not fit") as caught:
        load_weights(convnet(), tmp_path / "c.pth", allow_pickle=True)
    assert "0.weight: did you mean 0.weigth?" in caught.value.todo
    (tmp_path / "half.pth").write_bytes((tmp_path / "c.pth").read_bytes()[:900])
    with pytest.raises(BadInput, match="truncated or damaged") as caught:
        load_weights(convnet(), tmp_path / "half.pth", allow_pickle=True)
    assert caught.value.todo == "fetch or write it again"


def test_weights_of_a_model_under_torchs_pruning(tmp_path: Path) -> None:
    def pruned(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        torch.nn.utils.prune.random_unstructured(model[0], "weight", 0.5)
        return model

    source, model, x = pruned(1), pruned(2), torch.randn(3, 4)
    torch.save(source.state_dict(), tmp_path / "c.pth")
    load_weights(model, tmp_path / "c.pth", allow_pickle=True)
    assert torch.equal(model(x), source(x))
