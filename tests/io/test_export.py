"""Each format is read by its own reader, computes the same, and keeps zeros."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import prunella as pr
from prunella.errors import BadInput, CheckFailed, MissingExtra, NotSupported, RequestError
from prunella.io import export as module
from prunella.io.export import export
from prunella.io.exported import load_exported


class Net(nn.Module):
    """A convolution, a normalization, a linear layer; half of the weights are zero."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)
        with torch.no_grad():
            self.conv.weight[:, :, 1] = 0
            self.fc.weight[:, ::2] = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.conv(x)).relu().mean((2, 3)))


class Fixed(Net):
    """Its source fixes the batch size."""

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[0] == 2
        return super().forward(x)


BATCH = torch.linspace(-1, 1, 2 * 3 * 8 * 8).view(2, 3, 8, 8)


def test_safetensors_keeps_every_byte(tmp_path: Path) -> None:
    net = Net()
    made = export(net, tmp_path / "net.safetensors")
    state = load_file(made.path)
    assert state.keys() == net.state_dict().keys()
    for name, value in net.state_dict().items():
        assert state[name].numpy().tobytes() == value.numpy().tobytes(), name
    assert made.zeros == made.zeros_before == int((net.conv.weight == 0).sum() + (net.fc.weight == 0).sum()) + 4
    assert made.difference is None and made.bytes == made.path.stat().st_size


def test_pt2_takes_any_batch_and_holds_no_pickle(tmp_path: Path) -> None:
    net = Net().train()
    made = export(net, tmp_path / "net.pt2", inputs=BATCH[:1])
    assert net.training and made.dynamic and made.difference is not None and made.difference <= 1e-5
    assert made.zeros == made.zeros_before > 0
    again, example = load_exported(made.path)
    assert example is None
    for size in (1, 2, 7):
        batch = torch.randn(size, 3, 8, 8)
        torch.testing.assert_close(again(batch), net.eval()(batch), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dict(again.named_parameters())["fc.weight"], net.fc.weight, rtol=0, atol=0)
    with zipfile.ZipFile(made.path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    assert not [name for name, data in parts.items() if name.endswith(".pt") and data]
    assert b"stack_trace" not in next(data for name, data in parts.items() if name.endswith("models/model.json"))
    assert not any(str(Path(__file__).parent).encode() in data for data in parts.values())
    assert all(json.loads(data) is not None for name, data in parts.items() if name.endswith(".json"))


def test_a_fixed_batch_is_exported_as_it_is(tmp_path: Path) -> None:
    made = export(Fixed(), tmp_path / "net.pt2", inputs=BATCH)
    assert not made.dynamic and made.difference is not None and made.difference <= 1e-5


def test_onnx_is_read_by_its_runtime(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    net = Net().eval()
    made = export(net, tmp_path / "net.onnx", inputs=(BATCH,))
    assert made.reader == "onnxruntime" and made.dynamic and made.zeros == made.zeros_before > 0
    session = onnxruntime.InferenceSession(str(made.path), providers=["CPUExecutionProvider"])
    batch = torch.randn(5, 3, 8, 8)
    (got,) = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), net(batch), rtol=1e-4, atol=1e-5)
    assert [file.name for file in tmp_path.iterdir()] == ["net.onnx"]
    assert not any(
        place in made.path.read_bytes() for place in (bytes(Path(__file__).parent), bytes(Path(torch.__file__).parent))
    )


@pytest.mark.parametrize("suffix", ["safetensors", "pt2"])
def test_what_was_removed_is_in_no_file(tmp_path: Path, suffix: str) -> None:
    net = Fixed()
    small = pr.shrink(net, pr.plan(net, BATCH, pr.Recipe(pr.criteria.group_norm), target=pr.Sparsity(0.5)))
    made = export(small, tmp_path / f"net.{suffix}", inputs=BATCH)
    state = load_file(made.path) if suffix == "safetensors" else load_exported(made.path)[0].state_dict()
    sizes = {name: tuple(value.shape) for name, value in state.items()}
    assert all(sizes[name] == tuple(value.shape) for name, value in small.state_dict().items())
    assert sum(v.numel() for v in small.parameters()) < 0.8 * sum(v.numel() for v in net.parameters())
    assert made.difference is None or made.difference <= 1e-4


def test_a_wrong_reader_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOLERANCE", -1.0)
    with pytest.raises(CheckFailed, match="differs from the model by"):
        export(Fixed(), tmp_path / "net.pt2", inputs=BATCH)
    assert not list(tmp_path.iterdir())


def test_lost_zeros_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "load_file", lambda file: {k: v + 1 for k, v in load_file(file).items()})
    with pytest.raises(CheckFailed, match="only 0 of"):
        export(Net(), tmp_path / "net.safetensors")
    assert not list(tmp_path.iterdir())


def test_requests_that_make_no_sense(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="unknown export format 'tflite'"):
        export(Net(), tmp_path / "net.tflite", inputs=BATCH)
    with pytest.raises(RequestError, match="needs inputs="):
        export(Net(), tmp_path / "net.pt2")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match="onnx and onnxscript"):
        export(Net(), tmp_path / "net.onnx", inputs=BATCH)


@pytest.mark.parametrize("attack", ["guard", "import", "expression"])
def test_a_program_that_could_run_code_is_refused(tmp_path: Path, attack: str) -> None:
    path = export(Fixed(), tmp_path / "net.pt2", inputs=BATCH).path
    evil = tmp_path / "evil.pt2"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(evil, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            if name.endswith("models/model.json"):
                body = json.loads(data)
                if attack == "guard":
                    body["guards_code"] = ["__import__('os').getpid() == 0"]
                elif attack == "import":
                    signature = body["graph_module"]["module_call_graph"][0]["signature"]
                    signature["in_spec"] = json.dumps(
                        [1, {"context": '{"__enum__": true, "fqn": "this:d", "name": "x"}'}]
                    )
                else:
                    body["range_constraints"] = {"s0": {"expr_str": "[].append('x')"}}
                data = json.dumps(body).encode()
            target.writestr(name, data)
    with pytest.raises(BadInput, match="can run code when read"):
        load_exported(evil)


@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_images_of_any_size(tmp_path: Path, suffix: str) -> None:
    if suffix == "onnx":
        pytest.importorskip("onnxscript")
    made = export(Net(), tmp_path / f"net.{suffix}", inputs=BATCH[:1], any_size=True)
    assert made.sizes and made.dynamic and "any batch and image size" in str(made)
    other = torch.randn(3, 3, 11, 17)
    if suffix == "pt2":
        again = load_exported(made.path)[0](other)
    else:
        session = pytest.importorskip("onnxruntime").InferenceSession(made.path)
        again = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: other.numpy()})[0])
    torch.testing.assert_close(again, Net().eval()(other), rtol=1e-4, atol=1e-5)


class Flat(nn.Module):
    """Its last layer fixes the size of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4 * 36, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).flatten(1))


@pytest.mark.parametrize(("net", "example"), [(Flat(), BATCH), (nn.Linear(4, 2), torch.ones(2, 4))])
def test_a_size_that_the_model_fixes_is_refused(tmp_path: Path, net: nn.Module, example: Tensor) -> None:
    with pytest.raises(NotSupported, match="does not take any image size"):
        export(net, tmp_path / "net.pt2", inputs=example, any_size=True)
    assert not (tmp_path / "net.pt2").exists()
    assert export(net, tmp_path / "net.pt2", inputs=example).dynamic


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_size_that_onnx_fixes_is_refused(tmp_path: Path) -> None:
    """torch pools to 2x2 at every size; the translation to ONNX pools by a fixed stride."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 5)).eval()
    assert export(net, tmp_path / "net.pt2", inputs=BATCH, any_size=True).sizes
    with pytest.raises((NotSupported, CheckFailed)):
        export(net, tmp_path / "net.onnx", inputs=BATCH, any_size=True)
    assert not (tmp_path / "net.onnx").exists()
