"""What is saved comes back exactly, without the original weights; what is broken is told in one line."""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunella.errors import BadInput, NotSupported, RequestError
from prunella.graph.cut.changes import Changes
from prunella.graph.cut.surgery import cut_
from prunella.io import files, manifest
from prunella.io.artifact import load, save
from prunella.io.cuts import decode_cuts, encode_cuts
from prunella.io.files import check_free, new_folder, plain_name, write_atomic
from prunella.io.json import Fields
from prunella.io.plan_file import load_plan
from prunella.planning.accounting import Amount, Row
from prunella.planning.plan import Plan
from prunella.targets import Params
from prunella.types import Inputs
from tests.sealed import edit, to_format_1

Cuts = Mapping[str, Mapping[int, Tensor]]


class Net(nn.Module):
    """A tied weight, a buffer outside the state dict, a size kept as an integer."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.width = width
        self.up, self.norm, self.down = nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, 4)
        self.head = nn.Linear(4, 4)
        self.head.weight = nn.Parameter(torch.randn(4, 4))
        self.tail = nn.Linear(4, 4, bias=False)
        self.tail.weight = self.head.weight
        self.register_buffer("ramp", torch.arange(float(width)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.up(x)).view(-1, self.width) + self.get_buffer("ramp")
        out: Tensor = self.tail(self.head(self.down(hidden)))
        return out


KEPT = torch.tensor([0, 2, 3])
CUTS: Cuts = {
    **{name: {0: KEPT} for name in ("up.weight", "up.bias", "norm.weight", "norm.bias", "ramp")},
    **{name: {0: KEPT} for name in ("norm.running_mean", "norm.running_var")},
    "down.weight": {1: KEPT},
}
X = torch.linspace(-1, 1, 20).view(5, 4)


def make_plan(cuts: Cuts, attributes: Mapping[tuple[str, str], int], inputs: Inputs | None, rows: Any = ()) -> Plan:
    amount = Amount(2.0, 2.0, 2.0, 2.0)
    return Plan(
        recipe={"criterion": "l1"},
        target=Params(0.5),
        before=amount,
        after=amount,
        changes=Changes(cuts, attributes),
        rows=rows,
        inputs=inputs,
    )


def pruned(seed: int = 0) -> tuple[nn.Module, Plan]:
    torch.manual_seed(seed)
    model, plan = Net().eval(), make_plan(CUTS, {("", "width"): 3}, X)
    model.norm.running_mean += torch.randn(6)
    cut_(model, plan.cuts, plan.attributes)
    return model, plan


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model, plan = pruned()
    return save(model, tmp_path / "small", plan=plan, factory=Net).path


def test_a_cut_model_comes_back(tmp_path: Path) -> None:
    model, plan = pruned()
    saved = save(model, tmp_path / "small", plan=plan, factory=Net)
    assert saved.reader == "prunella.load" and "small: 4 files" in str(saved)
    again = load(saved.path, factory=Net)
    assert torch.equal(again(X), model(X)) and not again.training
    assert again.tail.weight is again.head.weight and again.width == 3
    assert torch.equal(again.get_buffer("ramp"), torch.tensor([0.0, 2.0, 3.0]))
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]
    assert load_plan(saved.path / "plan.safetensors").cuts.keys() == plan.cuts.keys()


def test_a_loaded_model_does_not_live_in_its_file(folder: Path) -> None:
    again = load(folder, factory=Net)
    before = again(X)
    file = next(folder.glob("model*.safetensors"))
    with file.open("r+b") as stream:
        stream.seek(-8, os.SEEK_END)
        stream.write(b"\xff" * 8)
    assert torch.equal(again(X), before)
    assert all(tensor.data_ptr() % 64 == 0 for tensor in again.state_dict().values())


class Versioned(Net):
    """Refuses a state without a version, as MNASNet does."""

    _version = 2

    def _load_from_state_dict(self, state: Any, prefix: str, metadata: dict[str, Any], *rest: Any) -> None:
        if metadata.get("version") != 2:
            raise ValueError("a version is needed")
        super()._load_from_state_dict(state, prefix, metadata, *rest)


def test_modules_that_insist_on_a_version_find_it(tmp_path: Path) -> None:
    model = Versioned().eval()
    cut_(model, CUTS, {("", "width"): 3})
    saved = save(model, tmp_path / "small", plan=make_plan(CUTS, {("", "width"): 3}, X), factory=Versioned)
    assert torch.equal(load(saved.path, factory=Versioned)(X), model(X))


def test_tied_weights_are_stored_once_and_there_is_no_pickle(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["ties"] == {"tail.weight": "head.weight"} and "tail.weight" not in manifest["tensors"]
    assert all(file.suffix in (".json", ".safetensors") for file in folder.iterdir())
    assert manifest["origin"]["name"].endswith("test_artifact:Net") and manifest["target"]["asked"] == "params=0.5"


def test_the_random_state_is_left_alone(folder: Path) -> None:
    state = torch.get_rng_state()
    load(folder, factory=Net)
    assert torch.equal(state, torch.get_rng_state())


class Odd(nn.Module):
    """Types that safetensors has no name for, an empty one, and a tensor that no state dict reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.low = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        self.register_buffer("wave", torch.full((2, 2), 1 + 2j, dtype=torch.complex128))
        self.register_buffer("none", torch.zeros(0, 3))
        self.register_buffer("mask", torch.full((2,), -torch.inf))
        self.part = nn.Parameter(torch.arange(8.0)[2:4])
        self.plain = torch.tensor([5.0])

    def forward(self, x: Tensor) -> Tensor:
        return x * self.plain * self.part.sum()


def test_odd_types_and_plain_tensor_attributes(tmp_path: Path) -> None:
    model = Odd()
    again = load(save(model, tmp_path / "odd", factory=Odd).path, factory=Odd)
    for name, value in model.state_dict().items():
        assert again.state_dict()[name].dtype == value.dtype and torch.equal(again.state_dict()[name], value), name
    assert torch.equal(again(X), model(X))


def test_kwargs_are_data(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="kwargs= cannot be written"):
        save(Net(7), tmp_path / "a", factory=Net, kwargs={"width": object()})
    path = save(Net(7), tmp_path / "b", factory=Net, kwargs={"width": 7}).path
    assert load(path, factory=Net).width == 7


def test_a_library_name_needs_no_factory(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet10t", num_classes=3).eval()
    path = save(model, tmp_path / "c", factory="timm:resnet10t", kwargs={"num_classes": 3}).path
    again, image = load(path), torch.randn(1, 3, 32, 32)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    # the same weights at another place in memory are summed in another order
    torch.testing.assert_close(again(image), model(image), rtol=0, atol=1e-6)


def test_code_named_in_a_manifest_is_not_imported(folder: Path) -> None:
    for name in ("antigravity:geohash", "this:d"):
        edit(folder, lambda m, name=name: m["origin"].update(name=name))
        with pytest.raises(BadInput, match="is never imported"):
            load(folder)
    edit(folder, lambda m: m.update(origin={"kind": "transformers", "name": "pipeline", "config_class": "BertConfig"}))
    pytest.importorskip("transformers")
    with pytest.raises(BadInput, match="cannot rebuild the class 'pipeline'"):
        load(folder)
    assert "antigravity" not in sys.modules and "this" not in sys.modules


@pytest.mark.parametrize("file", ["model.safetensors", "buffers.safetensors"])
def test_missing_truncated_and_changed_weights(folder: Path, file: str) -> None:
    data = (folder / file).read_bytes()
    (folder / file).write_bytes(data[:-1])
    with pytest.raises(BadInput, match="cut short or changed"):
        load(folder, factory=Net)
    (folder / file).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(BadInput, match="does not have the recorded digest"):
        load(folder, factory=Net)
    (folder / file).unlink()
    with pytest.raises(BadInput, match=f"{file} is missing"):
        load(folder, factory=Net)


def test_broken_and_newer_manifests(folder: Path, tmp_path: Path) -> None:
    manifest = (folder / "manifest.json").read_text()
    edit(folder, lambda m: m.update(format=99))
    with pytest.raises(BadInput, match="written by a newer prunella"):
        load(folder, factory=Net)
    (folder / "manifest.json").write_text(manifest[: len(manifest) // 2])
    with pytest.raises(BadInput, match="broken or cut short"):
        load(folder, factory=Net)
    (folder / "manifest.json").unlink()
    with pytest.raises(BadInput, match="not a finished artifact"):
        load(folder, factory=Net)
    with pytest.raises(BadInput, match="there is no such folder"):
        load(tmp_path / "absent")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["files"].update({"../x": {}}), "never paths"),
        (lambda m: m["files"].pop("model.safetensors"), "does not list"),
        (lambda m: m["cuts"]["positions"].__setitem__(0, [[0, 99]]), "cannot be cut as recorded"),
        (lambda m: m["cuts"]["axes"].update(absent={"0": 0}), "cannot be cut as recorded"),
        (lambda m: m["cuts"].pop("positions"), "its cuts cannot be read"),
        (lambda m: m["cuts"]["positions"].__setitem__(0, [[0, 1 << 60]]), "its cuts cannot be read"),
        (lambda m: m["cuts"]["positions"].__setitem__(0, [[0, 2], [1, 3]]), "not runs of positions in order"),
        (lambda m: m["cuts"]["axes"].update({"up.weight": {"0": 99}}), "not a whole number from 0 to"),
        (lambda m: m["cuts"]["axes"].update({"up.weight": {"first": 0}}), "its cuts cannot be read"),
        (lambda m: m.update(attributes=[["up", 3]]), "not a list of 3"),
        (lambda m: m.update(dropped={"": [1]}), "not text"),
        (lambda m: m.update(lists=[["up", "x", ["1"]]]), "not a whole number"),
        (lambda m: m["files"]["model.safetensors"].update(bytes="9"), "bytes is '9', not a whole number"),
        (lambda m: m["files"]["model.safetensors"].pop("sha256"), r"files\.model\.safetensors\.sha256 is missing"),
        (lambda m: m["tensors"]["up.bias"].update(shape=[-1]), "of at least 0"),
        (lambda m: m["tensors"].update({"up.bias": []}), "not an object"),
        (lambda m: m.update(attributes=[["up", "__class__", 3]]), "keeps no such integer"),
        (lambda m: m.update(attributes=[["up", "forward", 3]]), "keeps no such integer"),
        (lambda m: m.update(attributes=[["nowhere", "x", 3]]), "keeps no such integer"),
        (lambda m: m["tensors"]["up.bias"].update(dtype="float64"), "does not fit its manifest"),
        (lambda m: m["tensors"].pop("up.bias"), "unknown tensor"),
        (lambda m: m.pop("ties"), "manifest .* is broken"),
        (lambda m: m["ties"].update({"tail.weight": "absent"}), "tied tensor is missing"),
    ],
)
def test_a_manifest_is_only_data(folder: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    edit(folder, change)
    with pytest.raises(BadInput, match=message):
        load(folder, factory=Net)


def test_another_factory_does_not_fit(folder: Path) -> None:
    with pytest.raises(BadInput, match="cannot be cut as recorded"):
        load(folder, factory=lambda: nn.Linear(2, 2))
    with pytest.raises(BadInput, match="ZeroDivisionError"):
        load(folder, factory=lambda: 1 // 0)  # type: ignore[arg-type, return-value]
    with pytest.raises(BadInput, match="returned int"):
        load(folder, factory=lambda: 1)  # type: ignore[arg-type, return-value]


def test_what_cannot_be_rebuilt_is_not_saved(tmp_path: Path) -> None:
    model, _ = pruned()
    with pytest.raises(RequestError, match="cannot be rebuilt"):
        save(model, tmp_path / "x", factory=Net)
    with torch.no_grad():
        model.down.bias[1] = torch.nan
    with pytest.raises(BadInput, match=r"down\.bias holds NaN"):
        save(model, tmp_path / "x", factory=Net)
    with pytest.raises(NotSupported, match="meta device"):
        save(nn.Linear(2, 2, device="meta"), tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_safe(folder: Path) -> None:
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    model, plan = pruned(seed=1)
    with pytest.raises(RequestError, match="exists"):
        save(model, folder, plan=plan, factory=Net)
    with pytest.raises(RequestError, match="cannot be rebuilt"):
        save(model, folder, factory=Net, overwrite=True)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    save(model, folder, plan=plan, factory=Net, overwrite=True)
    assert torch.equal(load(folder, factory=Net)(X), model(X))
    assert [entry.name for entry in folder.parent.iterdir()] == ["small"]


def test_cuts_are_stored_as_runs() -> None:
    cuts = {"a": {0: torch.tensor([0, 1, 2, 7]), 1: torch.tensor([5])}, "b": {2: torch.tensor([0, 1, 2, 7])}}
    data = encode_cuts(cuts)
    assert data == {"positions": [[[0, 3], [7, 8]], [[5, 6]]], "axes": {"a": {"0": 0, "1": 1}, "b": {"2": 0}}}
    back = decode_cuts(Fields(json.loads(json.dumps(data)), "the manifest"))
    assert all(torch.equal(back[n][a], kept) for n, axes in cuts.items() for a, kept in axes.items())


# --- Hugging Face -----------------------------------------------------------------------------------------------------

IDS = {"input_ids": torch.arange(10).view(2, 5)}


def tiny(name: str) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if name == "bert":
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
        model = transformers.BertModel(transformers.BertConfig(vocab_size=20, **sizes))
    else:
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(vocab_size=20, intermediate_size=12, bos_token_id=0, eos_token_id=1, **sizes)
        )
    assert isinstance(model, nn.Module)
    return model.eval()


def bert_cuts(widths: tuple[int, ...]) -> Cuts:
    cuts: dict[str, dict[int, Tensor]] = {}
    for layer, width in enumerate(widths):
        path, kept = f"encoder.layer.{layer}", torch.arange(12 - width, 12)
        cuts |= {f"{path}.intermediate.dense.weight": {0: kept}, f"{path}.intermediate.dense.bias": {0: kept}}
        cuts[f"{path}.output.dense.weight"] = {1: kept}
    return cuts


def llama_cuts() -> Cuts:
    cuts: dict[str, dict[int, Tensor]] = {}
    for layer in range(2):
        path = f"model.layers.{layer}.self_attn."
        queries, keys = torch.arange(8) + 8 * layer, torch.arange(4) + 4 * layer
        cuts |= {path + "q_proj.weight": {0: queries}, path + "o_proj.weight": {1: queries}}
        cuts |= {path + "k_proj.weight": {0: keys}, path + "v_proj.weight": {0: keys}}
    return cuts


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        first = model(**IDS)[0]
    assert isinstance(first, Tensor)
    return first


@pytest.mark.parametrize(("name", "cuts"), [("bert", bert_cuts((5, 5))), ("llama", llama_cuts())])
def test_a_uniform_cut_is_read_by_from_pretrained(tmp_path: Path, name: str, cuts: Cuts) -> None:
    dense = tiny(name)
    small = copy.deepcopy(dense)
    cut_(small, cuts, {})
    saved = save(small, tmp_path / "hf", plan=make_plan(cuts, {}, IDS))
    assert saved.reader == "from_pretrained" and not saved.note
    kind: Any = type(dense)
    again = kind.from_pretrained(str(saved.path)).eval()
    assert output(again).shape == output(dense).shape
    torch.testing.assert_close(output(again), output(small), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(output(load(saved.path)), output(small), rtol=0, atol=0)
    if name == "llama":  # fewer heads, not narrower ones
        assert (again.config.num_attention_heads, again.config.num_key_value_heads, again.config.head_dim) == (2, 1, 4)


def test_a_ragged_cut_needs_prunella(tmp_path: Path) -> None:
    source = tmp_path / "dense"
    source.mkdir()
    (source / "tokenizer.json").write_text("{}")
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    small = tiny("bert")
    cuts = bert_cuts((5, 7))
    cut_(small, cuts, {})
    saved = save(small, tmp_path / "hf", plan=make_plan(cuts, {}, IDS), source=source)
    assert saved.reader == "prunella.load" and "differ from layer to layer" in saved.note
    assert sorted(saved.files) == [
        *("buffers.safetensors", "manifest.json", "model.safetensors", "plan.safetensors", "tokenizer.json"),
    ]
    torch.testing.assert_close(output(load(saved.path)), output(small), rtol=0, atol=0)


def test_a_size_in_the_configuration_comes_from_the_dense_model(tmp_path: Path) -> None:
    dense = tiny("bert")
    small = copy.deepcopy(dense)
    cuts, attributes = bert_cuts((5, 7)), {("", "config"): 0}
    del attributes[("", "config")]
    attributes[(":config", "intermediate_size")] = 7
    cut_(small, cuts, attributes)
    plan = make_plan(cuts, attributes, IDS, (Row("x", "channel", 5, 12, 0, 0, 0.0, 0.0),))
    with pytest.raises(RequestError, match="cannot be rebuilt") as caught:
        save(small, tmp_path / "hf", plan=plan)
    assert "dense=" in str(caught.value)
    again = load(save(small, tmp_path / "hf", plan=plan, dense=dense).path)
    torch.testing.assert_close(output(again), output(small), rtol=0, atol=0)
    assert again.config.intermediate_size == 7 and dense.config.intermediate_size == 12


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../x", "a/b", "/etc/passwd", "a\\b", "c:x", "", ".hidden", 3, None])
def test_paths_are_no_names(name: object) -> None:
    with pytest.raises(BadInput, match="never paths"):
        plain_name(name)
    assert plain_name("model.safetensors") == "model.safetensors"


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = write_atomic(tmp_path / "f", b"old")

    def broken(file: Path) -> None:
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, broken)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(RequestError, match="a folder of that name exists"):
        write_atomic(tmp_path, b"")


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    final = tmp_path / "deep" / "out"
    with pytest.raises(ZeroDivisionError), new_folder(final) as folder:
        (folder / "half").write_text("x")
        assert not final.exists()
        raise ZeroDivisionError
    assert not final.exists() and not list(final.parent.iterdir())
    with new_folder(final) as folder:
        (folder / "manifest.json").write_text("{}")
    assert (final / "manifest.json").read_text() == "{}"


@pytest.mark.parametrize("swap", [True, False])
def test_only_an_artifact_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swap: bool) -> None:
    if not swap:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    final = tmp_path / "out"
    final.mkdir()
    (final / "thesis.tex").write_text("years")
    with pytest.raises(RequestError, match="prunella did not write it"):
        check_free(final, overwrite=True)
    (final / "manifest.json").write_text("old")
    with new_folder(final, overwrite=True) as folder:
        (folder / "manifest.json").write_text("new")
    assert [file.name for file in final.iterdir()] == ["manifest.json"]
    assert (final / "manifest.json").read_text() == "new" and list(tmp_path.iterdir()) == [final]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RequestError, match="cannot write"):
        save(nn.Linear(1, 1), tmp_path / "file" / "out")
    with pytest.raises(RequestError, match="a file of that name exists"):
        save(nn.Linear(1, 1), tmp_path / "file")
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
        with pytest.raises(RequestError, match="Permission denied"):
            save(nn.Linear(1, 1), tmp_path / "out")
        tmp_path.chmod(0o700)


def test_the_marker_reaches_the_disk_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[str] = []
    monkeypatch.setattr(files, "flush", lambda path: flushed.append(path.name))
    save(nn.Linear(2, 2), tmp_path / "out")
    assert flushed.index("manifest.json") > flushed.index("model.safetensors")
    assert manifest.read_manifest(tmp_path / "out").mapping("origin") == {"kind": "unknown"}


def test_every_flipped_bit_of_a_manifest_is_refused(folder: Path) -> None:
    file = folder / "manifest.json"
    sound = file.read_bytes()
    for place in range(0, len(sound), 7):
        content = bytearray(sound)
        content[place] ^= 1 << place % 8
        file.write_bytes(content)
        with pytest.raises(BadInput):
            manifest.read_manifest(folder)
    file.write_bytes(sound.replace(b" ", b"  ", 1))  # the same data in other words is another file
    with pytest.raises(BadInput, match="does not have the recorded digest"):
        manifest.read_manifest(folder)


def test_a_manifest_of_format_1_is_read(folder: Path) -> None:
    to_format_1(folder)
    assert isinstance(load(folder, factory=Net), Net)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_not_saved(tmp_path: Path, bad: float) -> None:
    model = nn.Linear(4, 4)
    with torch.no_grad():
        model.weight[1, 2] = bad
    with pytest.raises(BadInput, match="weight holds"):
        save(model, tmp_path / "out", factory=lambda: nn.Linear(4, 4))
    assert not list(tmp_path.iterdir())
