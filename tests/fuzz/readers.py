"""Every reader of the package, with sound files for it that are small and made here.

A reader gets a folder in which one file was changed, and returns the tensors that it read, or None. What it may raise
are the errors of the package; what it returns must be the tensors of the sound folder, if a digest covers them.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import prune as torch_prune

import prunella as pr
from prunella.io import importers
from prunella.io.artifact import load
from prunella.io.checkpoint_file import load_tensors_only
from prunella.io.exported import load_exported
from prunella.io.files import digest
from prunella.io.identity import Identity
from prunella.io.importers.checkpoint import recipe_sparsities
from prunella.io.importers.reading import read_source
from prunella.io.journal import open_records
from prunella.io.json import read_json
from prunella.io.load import load_model
from prunella.io.nested import load_state, save_state
from prunella.io.plan_file import load_plan, save_plan
from prunella.io.tensor_file import INDEX, open_tensors, read_folder
from prunella.llm.streaming.shards import shard_name, write_shard
from prunella.lottery.folder import open_steps

Tensors = Mapping[str, Tensor] | None
ASKED = Identity({"seed": "0"})


@dataclass(frozen=True)
class Reader:
    """name: of the reader. build: writes sound files. read: what the changed folder is read with.

    covered: whether a digest covers the tensors, so that what is accepted has to be what was written. resign: makes the
    digests of a changed folder right again, as somebody hostile would. slow: takes more than a hundredth of a second.
    """

    name: str
    build: Callable[[Path], object]
    read: Callable[[Path], Tensors]
    covered: bool = False
    resign: Callable[[Path], None] | None = None
    slow: bool = False


def net() -> nn.Module:
    """A model small enough to be built a thousand times."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4)).eval()


def make_plan() -> pr.Plan:
    """A plan that cuts."""
    return pr.plan(net(), torch.ones(2, 8), pr.Recipe(pr.magnitude, pr.Channel()), target=pr.MACs(0.5))


def _state(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.state_dict())


# -- plans and artifacts -----------------------------------------------------------------------------------------------


def _build_plan(folder: Path) -> None:
    save_plan(make_plan(), folder / "x.plan")


def _read_plan(folder: Path) -> Tensors:
    plan = load_plan(folder / "x.plan")
    str(plan)
    if plan.changes:
        pr.shrink(net(), plan)
    else:
        pr.apply_(net(), plan)
    kept = {f"{name} {axis}": places for name, axes in plan.cuts.items() for axis, places in axes.items()}
    return {**plan.keep, **plan.masks, **kept, **plan.weights}


def _resign_plan(folder: Path) -> None:
    from prunella.io.nested import fingerprint

    file = folder / "x.plan"
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    with contextlib.suppress(Exception):
        header = json.loads(data[8 : 8 + size])
        head = json.loads(header["__metadata__"]["prunella.plan"])
        tensors = {name: stored.read() for name, stored in open_tensors(file).tensors.items()}
        head["sha256"] = fingerprint(tensors, head["plan"])
        header["__metadata__"]["prunella.plan"] = json.dumps(head)
        text = json.dumps(header).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def _build_artifact(folder: Path) -> None:
    plan = make_plan()
    shutil.rmtree(folder)
    pr.save(pr.shrink(net(), plan), folder, plan=plan, factory=net)


def _resign_files(folder: Path) -> None:
    """The digests and sizes in the manifest are those of the files."""
    file = folder / "manifest.json"
    with contextlib.suppress(Exception):
        manifest = json.loads(file.read_bytes())
        for name in manifest["files"]:
            manifest["files"][name] = {"sha256": digest(folder / name), "bytes": (folder / name).stat().st_size}
        file.write_text(json.dumps(manifest))


def _build_sparse(folder: Path) -> None:
    from prunella.runtime.artifact import save_sparse
    from prunella.runtime.convert import sparse

    shutil.rmtree(folder)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)).eval()
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.mul_(torch.rand(32, 32) < 0.05)  # type: ignore[union-attr,operator,arg-type]
    save_sparse(sparse(model, torch.ones(1, 32), seconds=0.02, fuse=False), folder, factory=_wide)


def _wide() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)).eval()


def _read_sparse(folder: Path) -> Tensors:
    from prunella.runtime.artifact import load_sparse

    load_sparse(folder, factory=_wide, seconds=0.01)
    return None


def _build_record(folder: Path) -> None:
    from prunella.app.job import Job
    from prunella.app.run import run

    shutil.rmtree(folder)
    run(net(), torch.ones(2, 8), Job(pr.Recipe(pr.magnitude, pr.Channel()), pr.MACs(0.5), factory=None), folder)


def _read_record(folder: Path) -> Tensors:
    from prunella.app.verify import check_folder
    from prunella.cli.artifacts import report

    with contextlib.redirect_stdout(io.StringIO()):
        report(folder, as_json=True)
        report(folder)
    check_folder(folder)
    return None


# -- tensors -----------------------------------------------------------------------------------------------------------

TENSORS = {
    "a": torch.arange(12, dtype=torch.float32).view(3, 4),
    "b": torch.ones(5, 2, dtype=torch.bfloat16),
    "c": torch.tensor([True, False]),
    "d": torch.tensor(7),
    "e": torch.zeros(0, 3, dtype=torch.float16),
}


def _read_like_the_library(folder: Path) -> Tensors:
    """What is accepted is what the library of the format reads, bit for bit."""
    from safetensors.torch import load as their_load

    file = folder / "x.safetensors"
    ours = dict(open_tensors(file).read())
    theirs = their_load(file.read_bytes())
    if ours.keys() != theirs.keys() or any(not _same(ours[name], theirs[name]) for name in ours):
        raise AssertionError("the library of the format reads something else")
    return None


def _same(one: Tensor, other: Tensor) -> bool:
    alike = one.dtype == other.dtype and one.shape == other.shape
    return alike and (not one.numel() or one.reshape(-1).view(torch.uint8).equal(other.reshape(-1).view(torch.uint8)))


def _build_shards(folder: Path) -> None:
    parts = [{"a": TENSORS["a"], "c": TENSORS["c"]}, {"b": TENSORS["b"]}]
    places = {name: shard_name(k, 2) for k, part in enumerate(parts, 1) for name in part}
    for k, part in enumerate(parts, 1):
        write_shard(folder / shard_name(k, 2), part)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 70}, "weight_map": places}))


def _build_bert(folder: Path) -> None:
    from prunella.io.load import import_transformers

    torch.manual_seed(0)
    library = import_transformers()
    sizes = {"vocab_size": 16, "hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8}
    library.BertModel(library.BertConfig(num_attention_heads=2, max_position_embeddings=8, **sizes)).save_pretrained(
        folder
    )


def _build_state(folder: Path) -> None:
    save_state({"a": [1, (2.5, None)], "b": {"w": TENSORS["a"], 3: "x"}}, folder / "x.safetensors")


def _read_state(folder: Path) -> Tensors:
    load_state(folder / "x.safetensors")
    return None


def _build_ticket(folder: Path) -> None:
    with open_steps(folder, lambda: ASKED) as steps:
        steps.once("first", lambda: {"w": TENSORS["a"]})


def _read_ticket(folder: Path) -> Tensors:
    with open_steps(folder, lambda: ASKED) as steps:
        value = steps.once("first", lambda: {"w": TENSORS["a"]})
    return {"w": value["w"]}


def _build_journal(folder: Path) -> None:
    with open_records(folder, lambda: ASKED) as records:
        for k in range(5):
            records.add(f"key {k}", {"value": k / 3, "list": [1, "x" * k]})


def _read_journal(folder: Path) -> Tensors:
    with open_records(folder, lambda: ASKED) as records:
        values = [records.number(f"key {k}", lambda: 0.5) for k in range(5)]
    return {"values": torch.tensor(values)}


# -- what other tools wrote --------------------------------------------------------------------------------------------


def _build_checkpoint(folder: Path) -> None:
    model = net()
    torch_prune.l1_unstructured(model[0], "weight", 0.5)  # type: ignore[index,no-untyped-call]
    torch.save({"epoch": 3, "state_dict": model.state_dict()}, folder / "x.pt")


def _read_checkpoint(folder: Path) -> Tensors:
    load_tensors_only(folder / "x.pt")
    importers.import_plan(net(), torch.ones(2, 8), folder / "x.pt", allow_pickle=True)
    return None


def _build_old_checkpoint(folder: Path) -> None:
    torch.save(net().state_dict(), folder / "x.pt", _use_new_zipfile_serialization=False)


def _build_compressed(folder: Path) -> None:
    weight = torch.tensor([[1.0, 0, 0, 2, 0, 0, 0, 3], [0, 0, 4, 0, 5, 0, 0, 0]])
    bits = torch.tensor([[0b10001001], [0b00010100]], dtype=torch.uint8)
    parts = {"0.shape": torch.tensor([2, 8]), "0.bitmask": bits, "0.compressed": weight[weight != 0],
             "0.row_offsets": torch.tensor([0, 3]), "0.bias": torch.zeros(2)}  # fmt: skip
    write_shard(folder / "model.safetensors", parts)
    config = {
        "quantization_config": {"quant_method": "compressed-tensors", "sparsity_config": {"format": "sparse-bitmask"}}
    }
    (folder / "config.json").write_text(json.dumps(config))


def _read_compressed(folder: Path) -> Tensors:
    importers.import_plan(nn.Sequential(nn.Linear(8, 2)), torch.ones(2, 8), folder)
    return None


RECIPE = """
modifiers:
    - !GlobalMagnitudePruningModifier
        init_sparsity: 0.05
        final_sparsity: 0.85
        params: __ALL_PRUNABLE__
    - !QuantizationModifier {submodules: [a, b], sparsity: 0.5}
"""


def _read_recipe(folder: Path) -> Tensors:
    list(recipe_sparsities((folder / "recipe.yaml").read_text("utf-8", "replace")))
    return None


def _build_program(folder: Path) -> None:
    torch.export.save(torch.export.export(net(), (torch.ones(2, 8),)), folder / "x.pt2")


def _nothing(result: object) -> None:
    return None


READERS: tuple[Reader, ...] = (
    Reader("plan", _build_plan, _read_plan, covered=True, resign=_resign_plan),
    Reader("artifact", _build_artifact, lambda f: _state(load(f, factory=net)), covered=True, resign=_resign_files),
    Reader("sparse artifact", _build_sparse, _read_sparse, resign=_resign_files, slow=True),
    Reader("record", _build_record, _read_record, slow=True),
    Reader("tensors", lambda f: write_shard(f / "x.safetensors", TENSORS), _read_like_the_library),
    Reader("shards", _build_shards, lambda f: _nothing([t.read() for t in read_folder(f).values()])),
    Reader("state", _build_state, _read_state),
    Reader("ticket", _build_ticket, _read_ticket, covered=True),
    Reader("journal", _build_journal, _read_journal, covered=True),
    Reader("json", lambda f: (f / "x.json").write_text('{"a": [1, {"b": null}], "c": "x"}'),
           lambda f: _nothing(read_json(f / "x.json"))),
    Reader("checkpoint", _build_checkpoint, _read_checkpoint),
    Reader("old checkpoint", _build_old_checkpoint, lambda f: _nothing(load_tensors_only(f / "x.pt"))),
    Reader("compressed tensors", _build_compressed, _read_compressed),
    Reader("recipe", lambda f: (f / "recipe.yaml").write_text(RECIPE), _read_recipe),
    Reader("folder of transformers", _build_bert, lambda f: _nothing(load_model(str(f))), slow=True),
    Reader("source of an import", _build_compressed, lambda f: _nothing(read_source(f))),
    Reader("program", _build_program, lambda f: _nothing(load_exported(f / "x.pt2")), slow=True),
)  # fmt: skip

__all__ = ["READERS", "Reader"]
