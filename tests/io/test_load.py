"""MODEL of the command line: every form, and every way it goes wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from prunella.errors import BadInput, NotSupported, RequestError
from prunella.io.examples import check_forward, example_inputs, shape_for
from prunella.io.exported import load_exported
from prunella.io.load import check_finite, load_model, load_object, load_weights
from tests.vision import timm_or_skip, torchvision_or_skip

FACTORY = """
import torch
from torch import nn

def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

def broken():
    raise ValueError("no weights\\nin sight")

def number():
    return 3

def leaves():
    raise SystemExit(4)

ready = net()
"""


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module in the current folder."""
    monkeypatch.chdir(tmp_path)
    name = f"factory_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(FACTORY)
    return name


def tiny_bert(folder: Path) -> Path:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def test_factory_of_the_current_folder(factory: str) -> None:
    model = load_model(f"{factory}:net")
    assert [tuple(p.shape) for p in model.parameters()] == [(8, 4), (8,), (2, 8), (2,)]
    assert not model.training


def test_a_module_that_exists_already_is_a_model_too(factory: str) -> None:
    assert isinstance(load_model(f"{factory}:ready"), nn.Sequential)


@pytest.mark.parametrize(
    ("name", "error", "say"),
    [
        ("broken", BadInput, "ValueError: no weights"),
        ("leaves", BadInput, "SystemExit: 4"),
        ("number", BadInput, "int"),
        ("nett", RequestError, "did you mean net"),
    ],
)
def test_factories_that_fail(factory: str, name: str, error: type[Exception], say: str) -> None:
    with pytest.raises(error, match=say):
        load_model(f"{factory}:{name}")


def test_a_module_that_fails_to_import(factory: str, tmp_path: Path) -> None:
    (tmp_path / "explodes_at_import.py").write_text("1 / 0")
    with pytest.raises(BadInput, match="ZeroDivisionError"):
        load_model("explodes_at_import:net")


def test_a_missing_module_is_named() -> None:
    with pytest.raises(RequestError, match="no_such_module_here"):
        load_model("no_such_module_here:net")


@pytest.mark.parametrize("spec", ["nothing", "no/such/folder", ":net", "module:"])
def test_names_that_mean_nothing(spec: str) -> None:
    with pytest.raises(RequestError):
        load_model(spec)


def test_pickles_are_no_models(tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    torch.save(nn.Linear(2, 2), file)
    with pytest.raises(BadInput, match="pickle"):
        load_model(str(file))


def test_load_object_follows_dots() -> None:
    assert load_object("torch:nn.Linear") is nn.Linear


def test_hugging_face_folder(tmp_path: Path) -> None:
    model = load_model(str(tiny_bert(tmp_path)))
    assert type(model).__name__ == "BertModel"
    inputs = example_inputs(model, str(tmp_path))
    assert isinstance(inputs, dict) and list(inputs) == ["input_ids"]
    check_forward(model, inputs)


def test_hugging_face_folder_with_truncated_weights(tmp_path: Path) -> None:
    file = tiny_bert(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(BadInput, match="truncated or damaged"):
        load_model(str(tmp_path))


def test_hugging_face_folder_with_a_tensor_missing(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    file = tiny_bert(tmp_path) / "model.safetensors"
    state = load_file(file)
    pruned = next(name for name in state if "intermediate" in name)
    del state[pruned]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(BadInput, match=r"1 tensors are missing"):
        load_model(str(tmp_path))


def test_hugging_face_folder_of_pickles_is_refused(tmp_path: Path) -> None:
    model = load_model(str(tiny_bert(tmp_path)))
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(BadInput, match="pickles"):
        load_model(str(tmp_path))
    again = load_model(str(tmp_path), allow_pickle=True)
    assert torch.equal(next(again.parameters()), next(model.parameters()))


def test_code_of_a_folder_is_never_run(tmp_path: Path) -> None:
    config = json.loads((tiny_bert(tmp_path) / "config.json").read_text())
    config |= {"architectures": ["EvilModel"], "auto_map": {"AutoModel": "evil.EvilModel"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(NotSupported, match="never run"):
        load_model(str(tmp_path))


def test_a_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="architecture"):
        load_model(str(tmp_path))


def test_timm_by_name() -> None:
    timm_or_skip()
    model = load_model("timm:resnet10t")
    inputs = example_inputs(model, "timm:resnet10t")
    assert isinstance(inputs, tuple) and tuple(inputs[0].shape) == (1, 3, 176, 176)


def test_timm_did_you_mean() -> None:
    timm_or_skip()
    with pytest.raises(RequestError, match=r"did you mean .*resnet18"):
        load_model("timm:resnett18")


def test_torchvision_by_name() -> None:
    torchvision_or_skip()
    model = load_model("torchvision:squeezenet1_1")
    assert type(model).__name__ == "SqueezeNet"
    with pytest.raises(RequestError, match="did you mean"):
        load_model("torchvision:squeezenet1_11")


def state_file(model: nn.Module, file: Path) -> Path:
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, file)
    return file


def test_weights_are_loaded(factory: str, tmp_path: Path) -> None:
    other = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    model = load_model(f"{factory}:net", weights=str(state_file(other, tmp_path / "w.safetensors")))
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    ("spoil", "say"),
    [
        (lambda s: s.pop("0.bias"), "1 missing: 0.bias"),
        (lambda s: s.update(extra=torch.zeros(1)), "1 unknown: extra"),
        (lambda s: s.update({"2.weight": torch.zeros(2, 7)}), r"2.weight is \(2, 7\) in the file and \(2, 8\)"),
        (lambda s: s["2.bias"].fill_(float("nan")), "2 of 2 numbers in 2.bias are NaN"),
        (lambda s: s["0.bias"].fill_(float("inf")), "8 of 8 numbers in 0.bias"),
    ],
)
def test_weights_that_do_not_fit(factory: str, tmp_path: Path, spoil: object, say: str) -> None:
    state = {name: value.clone() for name, value in load_model(f"{factory}:net").state_dict().items()}
    spoil(state)  # type: ignore[operator]
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(BadInput, match=say):
        load_model(f"{factory}:net", weights=str(tmp_path / "w.safetensors"))


def test_weights_that_do_not_fit_leave_the_model_alone(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    before = model[0].weight.detach().clone()
    save_file(
        {**model.state_dict(), "0.weight": torch.ones(2, 2), "1.weight": torch.ones(3, 2)}, tmp_path / "w.safetensors"
    )
    with pytest.raises(BadInput):
        load_weights(model, tmp_path / "w.safetensors")
    assert torch.equal(model[0].weight, before)


def test_truncated_and_missing_weights(factory: str, tmp_path: Path) -> None:
    file = state_file(load_model(f"{factory}:net"), tmp_path / "w.safetensors")
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(BadInput, match="truncated or damaged"):
        load_model(f"{factory}:net", weights=str(file))
    with pytest.raises(BadInput, match="does not exist"):
        load_model(f"{factory}:net", weights=str(tmp_path / "none.safetensors"))


def test_pickled_weights_only_when_asked(factory: str, tmp_path: Path) -> None:
    model = load_model(f"{factory}:net")
    file = tmp_path / "w.pt"
    torch.save({name: value + 1 for name, value in model.state_dict().items()}, file)
    with pytest.raises(BadInput, match="refused"):
        load_model(f"{factory}:net", weights=str(file))
    assert torch.equal(load_model(f"{factory}:net", weights=str(file), allow_pickle=True)[0].bias, model[0].bias + 1)  # type: ignore[index]


def test_tied_weights_need_only_one_name(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    model["b"].weight = model["a"].weight
    save_file({"a.weight": torch.full((3, 3), 2.0)}, tmp_path / "w.safetensors")
    load_weights(model, tmp_path / "w.safetensors")
    assert model["b"].weight is model["a"].weight
    assert torch.equal(model["b"].weight.detach(), torch.full((3, 3), 2.0))


def test_infinite_masks_are_no_weights() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("causal_mask", torch.full((2, 2), float("-inf")))
    check_finite(model)


def exported(file: Path) -> Path:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    torch.export.save(torch.export.export(model, (torch.randn(1, 3, 8, 8),)), file)
    return file


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_exported_program(tmp_path: Path) -> None:
    file = exported(tmp_path / "net.pt2")
    model = load_model(str(file))
    inputs = example_inputs(model, str(file))
    assert isinstance(inputs, tuple) and tuple(inputs[0].shape) == (1, 3, 8, 8)
    assert tuple(model(*inputs).shape) == (1, 4, 6, 6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_exported_program_with_a_pickle_is_refused(tmp_path: Path) -> None:
    import zipfile

    file = exported(tmp_path / "net.pt2")
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("net/data/constants/custom_obj_0", b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(BadInput, match="custom_obj_0"):
        load_exported(file)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_exported_program_of_transformers(tmp_path: Path) -> None:
    """Its outputs are of a class that the reader must know, also in a fresh process."""
    model = load_model(str(tiny_bert(tmp_path / "bert")))
    program = torch.export.export(model, (), {"input_ids": torch.ones(1, 4, dtype=torch.int64)}, strict=False)
    torch.export.save(program, tmp_path / "bert.pt2")
    code = f"from prunella.io.load import load_model; load_model({str(tmp_path / 'bert.pt2')!r})"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


@pytest.mark.parametrize("expression", ["__import__('os').system('true')", "s0.func", "'a'"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_exported_program_with_code_in_a_shape_is_refused(tmp_path: Path, expression: str) -> None:
    import zipfile

    file = tmp_path / "net.pt2"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("net/models/model.json", json.dumps({"dims": [{"as_expr": {"expr_str": expression}}]}))
    with pytest.raises(BadInput, match="can run code"):
        load_exported(file)


def test_truncated_program(tmp_path: Path) -> None:
    file = tmp_path / "net.pt2"
    file.write_bytes(b"PK\x03\x04 no more")
    with pytest.raises(BadInput, match="truncated or damaged"):
        load_exported(file)


def test_shapes_one_several_named() -> None:
    model = nn.Embedding(5, 2)
    one = example_inputs(model, "m", ["2x3"])
    assert isinstance(one, torch.Tensor) and one.shape == (2, 3) and one.dtype is torch.float32
    several = example_inputs(model, "m", ["2x3", "4:int64"])
    assert isinstance(several, tuple) and several[1].dtype is torch.int64
    assert int(several[1].max()) < 5
    named = example_inputs(model, "m", ["ids=1x64:int64,mask=1x64:bool"])
    assert isinstance(named, dict) and list(named) == ["ids", "mask"] and bool(named["mask"].all())
    assert int(named["ids"].min()) == 0 and int(named["ids"].max()) == 4


def test_the_seed_makes_the_example() -> None:
    first, again, other = (example_inputs(nn.ReLU(), "m", ["8"], seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["1x", "axb", "1x3:float99", "a=1x2,3", "a=1,a=2", "0x3", "1*3"])
def test_shapes_that_cannot_be_read(text: str) -> None:
    with pytest.raises(RequestError):
        example_inputs(nn.ReLU(), "m", [text])


def test_no_shape_and_no_own_example() -> None:
    with pytest.raises(RequestError, match="--inputs"):
        example_inputs(nn.Linear(2, 2), "module:net")


def test_an_example_that_does_not_fit() -> None:
    with pytest.raises(BadInput, match="example input 1x3:float32"):
        check_forward(nn.Linear(2, 2), torch.ones(1, 3))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(7, 2), "1x7"), (nn.Conv2d(3, 4, 3), "1x3x224x224"), (nn.Conv2d(1, 4, 3), "1x1x32x32"),
        (nn.Conv1d(5, 4, 3), "1x5x128"), (nn.Embedding(9, 4), "1x16:int64"), (nn.LSTM(6, 4), "1x16x6"),
    ],
)  # fmt: skip
def test_the_shape_that_is_advised_fits_the_first_layer(layer: nn.Module, shape: str) -> None:
    assert shape_for(nn.Sequential(layer)) == shape
    nn.Sequential(layer)(example_inputs(layer, "", [shape]))
