"""A sparse model comes back from its folder; a hostile or broken one is told in one line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import prunella as pr
from prunella.errors import BadInput, RequestError
from prunella.measure.timing import Ratio
from prunella.runtime import artifact, convert
from prunella.runtime.fx.fuse import Fused
from prunella.runtime.kernels import library
from prunella.runtime.kernels.config import Activation, Config, Kind
from prunella.runtime.layers import FastLinear, SparseConv2d, SparseLinear
from prunella.runtime.restore import restored
from prunella.runtime.tuning import acceptance
from prunella.runtime.tuning.choice import Problem, Route
from prunella.runtime.tuning.fingerprint import fingerprint
from tests.runtime.standin import Calls
from tests.runtime.test_sparse import IMAGE, X, mlp, net, stem, with_zeros
from tests.sealed import edit

pytestmark = pytest.mark.usefixtures("eager_to_skip")


@pytest.fixture
def folder(tmp_path: Path, kernels: Calls) -> Path:
    return pr.runtime.save_sparse(pr.sparse(net(), IMAGE), tmp_path / "small", factory=net).path


@pytest.mark.parametrize(("make", "x"), [(net, IMAGE), (mlp, X), (stem, IMAGE)])
@pytest.mark.parametrize("fuse", [True, False])
def test_a_sparse_model_comes_back(
    tmp_path: Path, kernels: Calls, make: Callable[[], nn.Module], x: Tensor, fuse: bool
) -> None:
    made = pr.sparse(make(), x, fuse=fuse)
    saved = pr.runtime.save_sparse(made, tmp_path / "small", factory=make)
    assert saved.files == ("manifest.json", "model.safetensors") and saved.reader == "prunella.runtime.load_sparse"
    again = pr.runtime.load_sparse(saved.path, factory=make)
    assert torch.equal(again(x), made(x)) and not again.training and type(again).__name__ == type(made).__name__
    before, after = pr.runtime.sparsified(made), pr.runtime.sparsified(again)
    assert after.replaced == before.replaced and after.traced == before.traced
    kept = [layer.table for layer in before.layers if not layer.why]
    assert [layer.table for layer in after.layers] == kept
    assert {n: t.tolist() for n, t in again.state_dict().items()} == {
        n: t.tolist() for n, t in made.state_dict().items()
    }
    pr.runtime.save_sparse(again, tmp_path / "again", factory=make)


def test_the_layout_of_images_comes_back(tmp_path: Path, kernels: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(acceptance, "speedup", lambda a, b, x: Ratio(2.0, 1.9, 2.1))
    made = pr.sparse(net(), IMAGE)
    saved = pr.runtime.save_sparse(made, tmp_path / "small", factory=net)
    again = pr.runtime.load_sparse(saved.path, factory=net)
    assert pr.runtime.sparsified(made).channels_last and pr.runtime.sparsified(again).channels_last
    torch.testing.assert_close(again(IMAGE), made(IMAGE))
    edit(saved.path, lambda manifest: manifest["sparse"].pop("last"))  # as an older version wrote it
    assert not pr.runtime.sparsified(pr.runtime.load_sparse(saved.path, factory=net)).channels_last


def test_zeros_take_a_bit(tmp_path: Path, kernels: Calls) -> None:
    def big() -> nn.Module:
        torch.manual_seed(0)
        return with_zeros(nn.Sequential(nn.Linear(200, 300, bias=False)), 0.9)

    saved = pr.runtime.save_sparse(pr.sparse(big(), torch.randn(4, 200)), tmp_path / "small", factory=big)
    values = int(torch.count_nonzero(big().get_parameter("0.weight")))
    size = (saved.path / "model.safetensors").stat().st_size
    assert 4 * values + 200 * 300 // 8 <= size < 4 * values + 200 * 300 // 8 + 500


def test_a_fresh_process_reads_it(folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys, torch, prunella as pr\nfrom tests.runtime.test_sparse import IMAGE, net\n"
        "made = pr.runtime.load_sparse(sys.argv[1], factory=net, seconds=0.02)\n"
        "torch.testing.assert_close(made(IMAGE), net()(IMAGE), rtol=1e-4, atol=1e-5)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, cwd=Path(__file__).parents[2])


def test_elsewhere_it_is_measured_again(folder: Path, kernels: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Problem] = []
    fusions: set[Fused] = set()
    real = artifact.Tuner.conv

    def conv(self: Any, weight: Any, bias: Any, geometry: Any, problems: tuple[Problem, ...], fused: Fused) -> Any:
        asked.extend(problems)
        fusions.add(fused)
        return real(self, weight, bias, geometry, problems, fused)

    monkeypatch.setattr(artifact.Tuner, "conv", conv)
    pr.runtime.load_sparse(folder, factory=net)
    assert asked == []
    monkeypatch.setattr(artifact, "fingerprint", lambda: {**fingerprint(), "cpu": "another"})
    again = pr.runtime.load_sparse(folder, factory=net)
    assert len(asked) == 3 and {p.image for p in asked} == {tuple(IMAGE.shape)}
    assert sum(isinstance(m, SparseConv2d) for m in again.modules()) == 3
    assert {fused.activation for fused in fusions} == {Activation.RELU, Activation.NONE}  # with what is fused


def test_a_choice_that_this_library_would_not_make_is_measured_again(folder: Path, kernels: Calls) -> None:
    def wild(manifest: dict[str, Any]) -> None:
        for rows in manifest["sparse"]["layers"].values():
            for row in rows:
                row[2] = {"kind": "rows", "precision": "fp32", "rows": 1000, "tile": 9, "depth": 7}

    edit(folder, wild)
    kernels.clear()
    record = pr.runtime.sparsified(pr.runtime.load_sparse(folder, factory=net))
    assert {getattr(v.choice, "rows", 4) for layer in record.layers for v in layer.verdicts} == {4}


@pytest.mark.parametrize("cache", [1 << 40, 0])
def test_a_hugging_face_model_needs_no_factory(
    tmp_path: Path, kernels: Calls, cache: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "last_cache", lambda: cache)
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    torch.manual_seed(0)
    model = with_zeros(transformers.GPT2LMHeadModel(config), 0.5)
    ids = torch.arange(7)[None]
    made = pr.sparse(model, {"input_ids": ids, "use_cache": False})
    saved = pr.runtime.save_sparse(made, tmp_path / "small")
    assert "config.json" not in saved.files  # from_pretrained would make up the weights that it does not find
    again = pr.runtime.load_sparse(saved.path)
    assert torch.equal(again(ids).logits, made(ids).logits)
    assert sum(isinstance(m, SparseLinear) for m in again.modules()) == 4
    assert again.lm_head.weight is again.transformer.wte.weight
    head = again.lm_head
    assert type(head) is (nn.Linear if cache else FastLinear)
    assert cache or head.cache.choice(1) == made.lm_head.cache.choice(1) == Config(Kind.DECODE)


def test_fused_activations_come_back(tmp_path: Path, kernels: Calls) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=32,
    )  # fmt: skip
    torch.manual_seed(0)
    model = with_zeros(transformers.BertModel(config), 0.5)
    ids = torch.arange(7)[None]
    made = pr.sparse(model, {"input_ids": ids})
    fused = [m.activation.value for m in made.modules() if isinstance(m, SparseLinear) and m.activation_path]
    assert fused == ["gelu", "gelu"]
    torch.testing.assert_close(made(ids).last_hidden_state, model(ids).last_hidden_state)
    again = pr.runtime.load_sparse(pr.runtime.save_sparse(made, tmp_path / "small").path)
    assert torch.equal(again(ids).last_hidden_state, made(ids).last_hidden_state)
    assert [m.activation_path for m in again.modules() if isinstance(m, SparseLinear)] == [
        m.activation_path for m in made.modules() if isinstance(m, SparseLinear)
    ]
    dense = restored(again)
    assert torch.equal(dense(ids).last_hidden_state, model(ids).last_hidden_state)


def test_a_dense_result_is_stored_dense(tmp_path: Path, kernels: Calls) -> None:
    def full() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 3)).eval()

    made = pr.sparse(full(), torch.ones(2, 3))
    again = pr.runtime.load_sparse(pr.runtime.save_sparse(made, tmp_path / "small", factory=full).path, factory=full)
    assert (
        torch.equal(again(torch.ones(2, 3)), made(torch.ones(2, 3))) and not pr.runtime.sparsified(again).outcome.kept
    )


def test_each_reader_names_the_other(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="load_sparse"):
        pr.load(folder, factory=net)
    dense = pr.save(net(), tmp_path / "dense", factory=net)
    with pytest.raises(RequestError, match=r"prunella\.load"):
        pr.runtime.load_sparse(dense.path, factory=net)


def test_what_cannot_be_saved(tmp_path: Path, kernels: Calls) -> None:
    with pytest.raises(RequestError, match="has no record"):
        pr.runtime.save_sparse(net(), tmp_path / "a", factory=net)
    with pytest.raises(RequestError, match="needs its factory"):
        pr.runtime.save_sparse(pr.sparse(net(), IMAGE), tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_a_sparse_model_does_not_replace_its_source(folder: Path) -> None:
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    for output in (folder, folder / "out"):
        with pytest.raises(RequestError, match=f"^cannot write {output}\n.*which is read"):
            pr.runtime.save_sparse(pr.sparse(net(), IMAGE), output, factory=net, source=folder, overwrite=True)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


SPARSE = [
    (lambda s: s.update(layers=[]), "cannot be read"),
    (lambda s: s.update(layers={"0.one": [[1, [2, 8, 5, 5]]]}), "cannot be read"),
    (lambda s: s.update(layers={"0.one": [[50, [2, 8, 5, 5], "exec"]]}), "kernel that does not exist"),
    (lambda s: s.update(layers={"0.one": [[50, [2, 8, 5, 5], {"kind": "rows"}]]}), "kernel that does not exist"),
    (lambda s: s.update(layers={"0.one": [[50, [2, 8, 5, 5], {**ROW, "depth": 1 << 40}]]}), "that does not exist"),
    (lambda s: s.update(layers={"0.one": [[True, [2, 8, 5, 5], "torch"]]}), "not a whole number from 1"),
    (lambda s: s.update(layers={"0.one": [[1 << 40, [2, 8, 5, 5], "torch"]]}), "not a whole number from 1"),
    (lambda s: s.update(layers={"0.one": [[50, [1 << 20, 1 << 20], "torch"]]}), "not a shape of at most"),
    (lambda s: s.update(layers={"0.one": [[50, [2, 7, 5, 5], "torch"]]}), "does not accept"),
    (lambda s: s.update(layers={"0.one": [[49, [2, 8, 5, 5], "torch"]]}), "does not accept"),
    (lambda s: s.update(layers={"3": [[1 << 27, [], "torch"]]}), "does not accept"),
    (lambda s: s.update(layers={"0.first": [[1, [], "torch"]]}), "no such layer"),
    (lambda s: s.update(layers={"../x": [[1, [], "torch"]]}), "no such layer"),
    (lambda s: s.update(layers={"0.one": []}), "no such layer"),
    (lambda s: s.update(weights={"0.one.weight": [8, 8, 3]}), "BITMASK|bitmask|fit|shape"),
    (lambda s: s.update(weights={"nowhere": [8]}), "are missing"),
    (lambda s: s.update(weights={"0.one.weight": [-8]}), "not a whole number from 1"),
    (lambda s: s.update(precision="fp4"), "cannot be read"),
    (lambda s: s.update(traced=[[[2, 8, 5, 5], "system"]]), "is not a dtype"),
    (lambda s: s.pop("machine"), "cannot be read"),
    (lambda s: s.update(joined={"0.one": "0.first"}), "no activation at"),
    (lambda s: s.update(joined=[1]), "cannot be read"),
]
ROW = {"kind": "rows", "precision": "fp32", "rows": 4, "tile": 4, "depth": 256}


@pytest.mark.parametrize(("change", "why"), SPARSE)
def test_a_hostile_manifest_is_refused(folder: Path, change: Callable[[dict[str, Any]], object], why: str) -> None:
    edit(folder, lambda manifest: change(manifest["sparse"]))
    with pytest.raises(BadInput, match=why):
        pr.runtime.load_sparse(folder, factory=net)


def test_a_damaged_file_is_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-5])
    with pytest.raises(BadInput, match="damaged"):
        pr.runtime.load_sparse(folder, factory=net)
    file.write_bytes(data[:-5] + b"12345")
    with pytest.raises(BadInput, match="digest"):
        pr.runtime.load_sparse(folder, factory=net)
    file.unlink()
    with pytest.raises(BadInput, match="missing"):
        pr.runtime.load_sparse(folder, factory=net)


def test_routes_of_torch_need_no_library(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "available", lambda: False)
    again = pr.runtime.load_sparse(folder, factory=net)
    torch.testing.assert_close(again(IMAGE), net()(IMAGE), rtol=1e-4, atol=1e-5)
    choices = {v.choice for layer in pr.runtime.sparsified(again).layers for v in layer.verdicts}
    assert choices <= set(Route)
