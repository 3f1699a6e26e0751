"""What other tools pruned becomes a plan: the tools themselves, or files that they wrote, are the references."""

from __future__ import annotations

import copy
import json
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils import prune

import prunella as pr
from prunella.errors import BadInput, NotSupported, RequestError
from prunella.graph.solve.groups import couple
from prunella.io.importers import neural_compressor, sparseml, torch_prune, zeros
from prunella.io.importers.checkpoint import recipe_sparsities
from prunella.io.importers.compressed import decode
from prunella.io.importers.patterns import pattern_of
from tests.graphs import convnet, images, mlp

DATA = Path(__file__).parent / "data"
X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


def masked(model: nn.Module, plan: pr.Plan) -> nn.Module:
    return pr.apply_(copy.deepcopy(model), plan)


# -- torch.nn.utils.prune -----------------------------------------------------------------------------------------


def pruned_mlp() -> nn.Sequential:
    theirs = mlp(seed=1)
    prune.l1_unstructured(theirs[0], "weight", 0.5)
    prune.ln_structured(theirs[2], "weight", 0.4, n=2, dim=0)
    prune.random_unstructured(theirs[2], "bias", 0.4)
    return theirs


@pytest.mark.parametrize("live", [True, False])
def test_torch_prune_gives_the_same_function_and_masks(live: bool, tmp_path: Path) -> None:
    theirs, ours = pruned_mlp(), mlp()
    source: Any = theirs
    if not live:
        source = tmp_path / "theirs.safetensors"
        save_file(theirs.state_dict(), source)
    plan = pr.importers.import_plan(ours, X, source)
    assert torch.equal(masked(ours, plan)(X), theirs(X))
    wanted = {name.removesuffix("_mask"): m.bool() for name, m in theirs.named_buffers()}
    assert plan.masks.keys() == wanted.keys() == {"0.weight", "2.weight", "2.bias"}
    assert all(plan.masks[name].equal(mask) for name, mask in wanted.items())
    assert [(row.name, row.kind, row.kept) for row in plan.rows] == [("0", "element", 12), ("2", "rows", 18)]
    assert plan.got == pytest.approx(1 - 30 / 54) and plan.before.params - plan.after.params == 12 + 12 + 2
    assert plan.before.macs - plan.after.macs == 2 * (12 + 12)


def test_what_is_under_a_mask_may_grow_back() -> None:
    theirs = pruned_mlp()
    plan = pr.importers.import_plan(mlp(), X, theirs)
    assert plan.weights["0.weight"].equal(theirs[0].weight_orig.detach())
    assert int((plan.weights["0.weight"] == 0).sum()) == 0


def test_the_plan_is_saved_applied_and_reported(tmp_path: Path) -> None:
    ours = mlp()
    plan = pr.importers.import_plan(ours, X, pruned_mlp())
    again = pr.io.load_plan(pr.io.save_plan(plan, tmp_path / "p.plan"))
    assert again.rows == plan.rows and all(again.masks[n].equal(m) for n, m in plan.masks.items())
    small = pr.shrink(ours, again)
    assert pr.metrics.count(small).nonzero == 30 + 15
    assert "imported from torch.nn.utils.prune: 3 masks" in str(plan)


def test_masks_without_their_weights_are_named() -> None:
    state = dict(pruned_mlp().state_dict())
    state["0.weight"] = state.pop("0.weight_orig")
    with pytest.raises(BadInput, match=r"0\.weight_mask has no weight"):
        torch_prune(state)
    state = dict(pruned_mlp().state_dict())
    state["2.bias_mask"] = torch.ones(3)
    with pytest.raises(BadInput, match=r"mask of 2\.bias does not fit"):
        torch_prune(state)
    state["2.bias_mask"] = torch.tensor([0, 0.5, 1, 1, 1])
    with pytest.raises(BadInput, match=r"not made of 0 and 1\nit holds 0\.5"):
        torch_prune(state)


# -- torch.ao.pruning ---------------------------------------------------------------------------------------------


def sparsified() -> tuple[nn.Sequential, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.ao.pruning import WeightNormSparsifier

        theirs = mlp(width=8, seed=1)
        sparsifier = WeightNormSparsifier(0.5, sparse_block_shape=(1, 4), zeros_per_block=2)
        sparsifier.prepare(theirs, [{"tensor_fqn": "0.weight"}, {"tensor_fqn": "2.weight"}])
        sparsifier.step()
    return theirs, sparsifier


@pytest.mark.parametrize("form", ["module", "state and sparsifier", "squashed"])
def test_torch_ao_in_all_its_forms(form: str) -> None:
    theirs, sparsifier = sparsified()
    ours, wanted = mlp(width=8), theirs(X)
    masks = {name: entry["mask"].bool() for name, entry in sparsifier.state_dict()["state"].items()}
    if form == "module":
        plan = pr.importers.import_plan(ours, X, theirs)
    elif form == "state and sparsifier":
        plan = pr.importers.import_plan(ours, X, theirs.state_dict(), masks=sparsifier.state_dict())
    else:
        sparsifier.squash_mask()
        plan = pr.importers.import_plan(ours, X, theirs.state_dict())
    assert torch.equal(masked(ours, plan)(X), wanted)
    assert plan.masks.keys() == masks.keys() and all(plan.masks[n].equal(m) for n, m in masks.items())
    assert not masks["0.weight"].all() and bool(masks["0.weight"].any())


def test_a_sparsifier_alone_masks_the_models_own_weights() -> None:
    _, sparsifier = sparsified()
    ours = mlp(width=8)
    with pytest.raises(BadInput, match=r"mask of 0\.weight has another shape"):  # blocks are another tool's
        pr.importers.import_plan(mlp(width=16), X, sparsifier.state_dict())
    plan = pr.importers.import_plan(ours, X, sparsifier.state_dict())
    assert not plan.weights and torch.equal(masked(ours, plan)[0].weight != 0, plan.masks["0.weight"])


def test_masks_that_the_state_dict_left_out_are_asked_for() -> None:
    theirs, _ = sparsified()
    with pytest.raises(BadInput, match=r"masks are not in this checkpoint(.|\n)*masks=sparsifier"):
        pr.importers.import_plan(mlp(width=8), X, theirs.state_dict())


# -- zeros, SparseML, neural-compressor ---------------------------------------------------------------------------


def sparse_state() -> dict[str, Tensor]:
    state = {name: value.clone() for name, value in mlp(seed=1).state_dict().items()}
    for name in ("0.weight", "2.weight"):
        state[name].view(-1)[::3] = 0
    state["0.weight"][0, 1] = -0.0
    state["2.bias"][0] = 0
    return state


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "model.", "module.model."])
def test_zeros_are_the_mask_whatever_stands_before_the_names(prefix: str) -> None:
    state, ours = sparse_state(), mlp()
    plan = pr.importers.import_plan(ours, X, {prefix + name: value for name, value in state.items()})
    assert plan.masks.keys() == {"0.weight", "2.weight"}
    assert all(plan.masks[name].equal(state[name] != 0) for name in plan.masks)
    assert all(value.equal(state[name]) for name, value in masked(ours, plan).state_dict().items())


def test_a_prefix_that_the_model_has_and_the_file_has_not() -> None:
    wrapped = nn.ModuleDict({"model": mlp()})
    wrapped.forward = lambda x: wrapped["model"](x)  # type: ignore[method-assign]
    plan = pr.importers.import_plan(wrapped, X, sparse_state())
    assert plan.masks.keys() == {"model.0.weight", "model.2.weight"}


def test_buffers_come_along() -> None:
    theirs, ours = convnet(seed=1).eval(), convnet().eval()
    with torch.no_grad():
        theirs[0].weight[:, 0] = 0
    plan = pr.importers.import_plan(ours, images()[0], theirs.state_dict())
    assert torch.equal(masked(ours, plan)(images()[0]), theirs(images()[0])) and "1.running_mean" in plan.weights
    assert [(row.name, row.kept, row.total) for row in plan.rows] == [("0", 144, 216)]


def test_a_weight_that_did_not_change_is_not_stored() -> None:
    ours = mlp()
    state = {name: value.clone() for name, value in ours.state_dict().items()}
    state["2.weight"][0] = 0
    assert pr.importers.import_plan(ours, X, state).weights.keys() == {"2.weight"}


def test_few_zeros_can_be_left_alone() -> None:
    state = {"a.weight": torch.ones(4, 5), "b.weight": torch.ones(4, 5)}
    state["a.weight"][0, 0], state["b.weight"][:2] = 0, 0
    assert zeros(state).masks.keys() == {"a.weight", "b.weight"}
    assert zeros(state, min_sparsity=0.05).masks.keys() == {"b.weight"}
    with pytest.raises(RequestError, match="min_sparsity=1 is out of range"):
        zeros(state, min_sparsity=1)


RECIPE = """
modifiers:
  - !EpochRangeModifier
    start_epoch: 0.0
    end_epoch: 50.0
  - !GMPruningModifier
    params: ['0.weight']
    init_sparsity: 0.05
    final_sparsity: 0.85
"""


def test_sparseml_reads_its_recipe_as_data() -> None:
    pytest.importorskip("yaml")
    found = sparseml({"state_dict": sparse_state(), "recipe": RECIPE, "epoch": 3})
    assert found.remarks == ("the recipe asks for final_sparsity=0.85 (GMPruningModifier)",)
    plan = pr.importers.import_plan(mlp(), X, {"state_dict": sparse_state(), "recipe": RECIPE, "epoch": 3})
    assert "final_sparsity=0.85" in str(plan) and "SparseML" in str(plan)
    staged = "pruning_stage:\n  pruning_modifiers:\n    SparseGPTModifier:\n      sparsity: 0.5\n"
    assert list(recipe_sparsities(staged)) == ["the recipe asks for sparsity=0.5 (SparseGPTModifier)"]


@pytest.mark.parametrize(
    "text",
    ["a: [", "!!python/object/apply:os.system ['true']", "? {a: 1}\n: 2", "x" * 1_000_001],
)
def test_a_hostile_recipe_runs_nothing(text: str) -> None:
    pytest.importorskip("yaml")
    with pytest.raises(BadInput, match="recipe"):
        list(recipe_sparsities(text))


def test_a_recipe_that_holds_itself_or_grows_is_read_once() -> None:
    pytest.importorskip("yaml")
    bomb = "a0: &a0 {sparsity: 0.5}\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))
    assert len(list(recipe_sparsities(bomb))) == 1
    assert list(recipe_sparsities("a: &a [*a]")) == []


def test_neural_compressor_masks_of_modules_and_of_blocks() -> None:
    ours = mlp(width=8)
    masks = {"0": torch.rand(8, 4) > 0.5, "2": torch.tensor([[True, False]])}
    masks["0"][0] = torch.tensor([True, False, True, True])
    plan = pr.importers.import_plan(ours, X, masks)
    assert plan.masks["0.weight"].equal(masks["0"])
    assert plan.masks["2.weight"].equal(torch.tensor([True] * 4 + [False] * 4).expand(5, 8))
    assert pr.importers.import_plan(ours, X, ours.state_dict(), masks=masks).masks.keys() == plan.masks.keys()
    assert neural_compressor({"0": torch.ones(2)}).masks["0.weight"].all()


# -- compressed-tensors: files that its release 0.9.4 wrote -----------------------------------------------------------


def small_net(*sizes: int) -> nn.Sequential:
    torch.manual_seed(3)
    layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    return nn.Sequential(*[part for layer in layers for part in (layer, nn.ReLU())][:-1])


@pytest.mark.parametrize(("name", "sizes", "kinds"), [
    ("bitmask", (10, 6, 3), ["element", "element"]), ("two_four", (12, 4), ["2:4"]),
])  # fmt: skip
def test_what_compressed_tensors_wrote(name: str, sizes: tuple[int, ...], kinds: list[str]) -> None:
    dense, ours = load_file(DATA / f"{name}_dense.safetensors"), small_net(*sizes)
    plan = pr.importers.import_plan(ours, torch.randn(2, sizes[0]), DATA / f"{name}.safetensors")
    for key, value in masked(ours, plan).state_dict().items():
        assert value.equal(dense[key].to(value.dtype))
    assert all(plan.masks[key].equal(dense[key] != 0) for key in plan.masks)
    assert [row.kind for row in plan.rows] == kinds


def test_a_folder_with_its_description(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes((DATA / "bitmask.safetensors").read_bytes())
    described = {"format": "sparse-bitmask", "global_sparsity": 0.6, "sparsity_structure": "unstructured"}
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"quantization_config": {"sparsity_config": described}}))
    plan = pr.importers.import_plan(small_net(10, 6, 3), torch.randn(2, 10), tmp_path)
    assert "config.json says sparse-bitmask: global_sparsity=0.6" in str(plan)
    config.write_text(json.dumps({"quantization_config": {"sparsity_config": {"format": "marlin-24"}}}))
    with pytest.raises(NotSupported, match="marlin-24"):
        pr.importers.import_plan(small_net(10, 6, 3), torch.randn(2, 10), tmp_path)
    config.write_text("{")
    with pytest.raises(BadInput, match=r"config\.json cannot be read"):
        pr.importers.import_plan(small_net(10, 6, 3), torch.randn(2, 10), tmp_path)


def bitmask_parts(rows: int = 3, cols: int = 10) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    weight = torch.randn(rows, cols) * (torch.rand(rows, cols) < 0.5)
    weight[0, 0] = 1.5
    lines = [[sum(int(weight[r, c + b] != 0) << b for b in range(8) if c + b < cols) for c in range(0, cols, 8)]
             for r in range(rows)]  # fmt: skip
    counts = [(weight[r] != 0).sum().item() for r in range(rows)]
    starts = [sum(counts[:r]) for r in range(rows)]
    return weight, {
        "shape": torch.tensor([rows, cols]),
        "bitmask": torch.tensor(lines, dtype=torch.uint8),
        "compressed": weight[weight != 0],
        "row_offsets": torch.tensor(starts),
    }


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_a_bitmask_by_hand(dtype: torch.dtype) -> None:
    weight, parts = bitmask_parts()
    parts["compressed"] = parts["compressed"].to(dtype)
    found, mask = decode("w", parts)
    assert found.dtype == dtype and found.float().equal(weight.to(dtype).float()) and mask.equal(weight != 0)


@pytest.mark.parametrize(("part", "value", "words"), [
    ("shape", torch.tensor([3, -10]), r"a shape of \(3, -10\)"),
    ("shape", torch.tensor([3, 0]), r"a shape of \(3, 0\)"),
    ("shape", torch.tensor([2**62, 2**62]), "bytes of"),
    ("shape", torch.tensor([3.0, 10.0]), "not a list of sizes"),
    ("shape", None, "not a list of sizes"),
    ("shape", torch.tensor([3, 17]), "bytes of"),
    ("bitmask", torch.zeros(3, 2, dtype=torch.uint8), "values for 0 bits"),
    ("bitmask", torch.zeros(3, 1, dtype=torch.uint8), "bytes of"),
    ("bitmask", torch.zeros(3, 2), "bytes of"),
    ("bitmask", torch.full((3, 2), 255, dtype=torch.uint8), "beyond the end"),
    ("compressed", torch.randn(2), "2 values for"),
    ("compressed", None, "incomplete"),
    ("row_offsets", torch.tensor([-1, 0, 0]), "a row starts at -1"),
    ("row_offsets", torch.tensor([0, 1, 2**40]), "not those of the bits"),
    ("row_offsets", torch.tensor([0]), "not those of the bits"),
])  # fmt: skip
def test_parts_that_contradict_each_other_are_refused(part: str, value: Tensor | None, words: str) -> None:
    _, parts = bitmask_parts()
    with pytest.raises(BadInput, match=words):
        decode("w", {**parts, part: value})


def test_values_that_are_not_two_of_four_are_refused() -> None:
    bits = torch.tensor([[0b0111_0001]], dtype=torch.uint8)
    parts = {"shape": torch.tensor([[1], [8]]), "bitmask": bits, "compressed": torch.randn(1, 4)}
    with pytest.raises(BadInput, match="not two of every four"):
        decode("w", parts)
    parts["bitmask"][0, 0] = 0b0101_0011
    assert decode("w", parts)[1].tolist() == [[True, True, False, False, True, False, True, False]]


def test_quantized_weights_are_refused() -> None:
    with pytest.raises(NotSupported, match="quantized"):
        pr.importers.import_plan(mlp(), X, {"0.weight_packed": torch.zeros(2), "0.bitmask": torch.zeros(2)})


# -- what does not fit ---------------------------------------------------------------------------------------------


def test_what_is_missing_is_named() -> None:
    state = sparse_state()
    del state["2.weight"]
    with pytest.raises(BadInput, match=r"1 are missing: 2\.weight"):
        pr.importers.import_plan(mlp(), X, state)
    with pytest.raises(BadInput, match=r"are not of this model: 9\.weight(.|\n)*near 9\.weight"):
        pr.importers.import_plan(mlp(), X, {**sparse_state(), "9.weight": torch.zeros(2, 2)})
    with pytest.raises(BadInput, match=r"mask of 0\.weight has another shape\n\(4, 4\) in the checkpoint"):
        pr.importers.import_plan(mlp(), X, {"0": torch.ones(4, 4, dtype=torch.bool)})
    with pytest.raises(BadInput, match=r"0\.weight has another shape"):
        pr.importers.import_plan(mlp(), X, {**sparse_state(), "0.weight": torch.zeros(3, 4)})
    with pytest.raises(BadInput, match="nothing is pruned"):
        pr.importers.import_plan(mlp(), X, mlp(seed=1).state_dict())
    with pytest.raises(BadInput, match="everything is zero"):
        pr.importers.import_plan(mlp(), X, {name: torch.zeros_like(v) for name, v in mlp().state_dict().items()})
    with pytest.raises(BadInput, match=r"2\.bias is not finite"):
        pr.importers.import_plan(mlp(), X, {**sparse_state(), "2.bias": torch.full((5,), torch.nan)})
    with pytest.raises(BadInput, match="no tensors in the checkpoint"):
        pr.importers.import_plan(mlp(), X, {"epoch": 3})
    with pytest.raises(BadInput, match="two names of the checkpoint"):
        pr.importers.import_plan(mlp(), X, {**sparse_state(), **{f"module.{n}": v for n, v in sparse_state().items()}})


def test_sources_that_are_none(tmp_path: Path) -> None:
    model = mlp()
    with pytest.raises(RequestError, match="one module"):
        pr.importers.import_plan(model, X, model)
    with pytest.raises(RequestError, match="a int cannot be imported"):
        pr.importers.import_plan(model, X, 3)  # type: ignore[arg-type]
    with pytest.raises(BadInput, match="no checkpoint at"):
        pr.importers.import_plan(model, X, tmp_path / "none.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((DATA / "bitmask.safetensors").read_bytes()[:200])
    with pytest.raises(BadInput, match="truncated or damaged"):
        pr.importers.import_plan(model, X, tmp_path / "cut.safetensors")
    with pytest.raises(BadInput, match="has no weights"):
        pr.importers.import_plan(model, X, _empty(tmp_path))


def _empty(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("raise SystemExit('ran')",))


def test_pickles_are_read_when_allowed_and_never_run(tmp_path: Path) -> None:
    file = tmp_path / "theirs.pth"
    torch.save({"state_dict": sparse_state(), "epoch": 3}, file)
    with pytest.raises(BadInput, match="pickle can run code"):
        pr.importers.import_plan(mlp(), X, file)
    assert pr.importers.import_plan(mlp(), X, file, allow_pickle=True).masks.keys() == {"0.weight", "2.weight"}
    torch.save({"state_dict": sparse_state(), "evil": Evil()}, file)
    with pytest.raises(BadInput, match="as tensors"):
        pr.importers.import_plan(mlp(), X, file, allow_pickle=True)
    torch.save([torch.ones(2)], file)
    with pytest.raises(NotSupported, match="holds a list"):
        pr.importers.import_plan(mlp(), X, file, allow_pickle=True)


def test_tied_weights_have_one_mask() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b(self.a(x).relu())
            return out

    state = {name: value.clone() for name, value in Tied().state_dict().items()}
    state["a.weight"][0] = state["b.weight"][0] = 0
    plan = pr.importers.import_plan(Tied(), X, state)
    assert len(plan.masks) == 1 and plan.before.params == 16 + 8
    only = {name: value for name, value in state.items() if name != "b.weight"}
    assert pr.importers.import_plan(Tied(), X, only).masks.keys() == plan.masks.keys()
    state["b.weight"] = torch.ones(4, 4).tril()
    with pytest.raises(BadInput, match="ties these weights"):
        pr.importers.import_plan(Tied(), X, state)


# -- patterns ----------------------------------------------------------------------------------------------------------


def test_patterns_are_recognized() -> None:
    layer = couple(model := nn.Sequential(nn.Linear(32, 32)), torch.randn(1, 32)).layers[0]
    ones, some = torch.ones(32, 32, dtype=torch.bool), torch.rand(32, 32) > 0.5
    rows, columns, tiles = ones.clone(), ones.clone(), torch.kron(torch.rand(8, 8) > 0.5, torch.ones(4, 4)).bool()
    rows[3:9], columns[:, 3:9] = False, False
    two_four = pr.NM(2, 4).mask(torch.rand(32, 32))
    one_four = pr.NM(1, 4).mask(torch.rand(32, 32))
    found = {name: pattern_of(mask, layer) for name, mask in {
        "dense": ones, "rows": rows, "columns": columns, "block 4x4": tiles, "2:4": two_four, "1:4": one_four,
        "element": some}.items()}  # fmt: skip
    assert all(name == kind for name, kind in found.items()), found
    two_four[0, :4] = torch.tensor([True, False, False, False])
    assert pattern_of(two_four, layer) == "element" and isinstance(model[0], nn.Linear)


def test_a_pattern_along_the_channels_of_a_convolution() -> None:
    layer = couple(nn.Sequential(nn.Conv2d(8, 8, 3)), torch.randn(1, 8, 5, 5)).layers[0]
    along = pr.NM(2, 4).mask(torch.rand(8 * 9, 8)).reshape(8, 3, 3, 8).permute(0, 3, 1, 2)
    assert pattern_of(along, layer) == "2:4 by channels"
