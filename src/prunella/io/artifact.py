"""Save a pruned model as a folder, and build it again from the folder: safetensors, JSON, digests; no pickle.

    model.safetensors    the tensors, tied ones once           manifest.json   everything else, written last
    buffers.safetensors  buffers that are not in the state dict, if any        plan.safetensors   the plan, if given
    program.pt2          only for a program: it has no source to be rebuilt from
    config.json          only where plain `from_pretrained` reads the folder   tokenizer files, from `source`

The model is rebuilt as the dense architecture without weights, cut along the recorded positions, and filled.
"""

from __future__ import annotations

import fnmatch
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from prunella._version import __version__
from prunella.compress.low_rank import ranks_of, rebuild_
from prunella.errors import BadInput, PruningError, RequestError
from prunella.graph.solve.tokens import names_token
from prunella.graph.trace.tracked_int import size_of
from prunella.io import huggingface as pretrained
from prunella.io import origin as origins
from prunella.io.cuts import encode_cuts
from prunella.io.export import export
from prunella.io.exported import load_exported
from prunella.io.files import copy_file, new_folder
from prunella.io.json import Fields, plain, read_config
from prunella.io.manifest import check_files, read_manifest, write_manifest
from prunella.io.origin import Factory
from prunella.io.per_layer import per_layer_config
from prunella.io.plan_file import save_plan
from prunella.io.recorded_cut import attribute, cut_as_recorded_
from prunella.io.space import check_apart, check_space
from prunella.io.state import State, fill_, read_state, read_tensors, write_tensors
from prunella.io.tensor_writer import size_of as bytes_of
from prunella.io.untrusted import check_links
from prunella.measure.text import byte_size
from prunella.model.torch_masks import with_plain_weights
from prunella.planning.config_search import (
    Shapes,
    Sizes,
    changed_sizes,
    shallower,
    shapes_of,
    steady,
    uniform_configs,
    with_tokens,
)
from prunella.planning.plan import Plan
from prunella.transform.configuration import configuration_before

WEIGHTS, BUFFERS, PLAN = "model.safetensors", "buffers.safetensors", "plan.safetensors"
PROGRAM = "program.pt2"


@dataclass(frozen=True)
class Saved:
    """The written files. `reader`: `from_pretrained` or `prunella.load`; `note`: why not `from_pretrained`."""

    path: Path
    bytes: int
    files: tuple[str, ...]
    reader: str
    note: str = ""

    def __str__(self) -> str:
        lines = [f"{self.path}: {len(self.files)} files, {byte_size(self.bytes)}, read it with {self.reader}"]
        return "\n".join([*lines, self.note] if self.note else lines)


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    plan: Plan | None = None,
    factory: Factory | None = None,
    kwargs: Mapping[str, Any] | None = None,
    source: str | os.PathLike[str] | None = None,
    dense: nn.Module | None = None,
    overwrite: bool = False,
) -> Saved:
    """Write `model` to the folder `path`, atomically, and check that it can be rebuilt from the folder.

    plan: the plan of the cut; needed if the model is smaller than the one its factory builds. factory: makes the dense
    model; a function, `package.module:function`, `timm:NAME` or `torchvision:NAME`, with JSON `kwargs`. Models of
    transformers need none. source: the Hugging Face folder of the model; its tokenizer is copied, unless tokens were
    pruned. dense: the dense Hugging Face model, if pruning changed its configuration. A program is stored as a program.
    Errors: RequestError if the folder exists (unless `overwrite`) or the model cannot be rebuilt; BadInput for NaN.

    Example:

        >>> import tempfile, torch, prunella as pr
        >>> dense = lambda: torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> plan = pr.plan(dense(), torch.randn(2, 8), target=pr.Params(0.5))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     pr.save(pr.shrink(dense(), plan), f"{folder}/half", plan=plan, factory=dense).reader
        'prunella.load'
    """
    with drafted(
        model, path, plan=plan, factory=factory, kwargs=kwargs, source=source, dense=dense, overwrite=overwrite
    ) as draft:
        pass
    return draft.saved


@dataclass
class Draft:
    """An artifact in a temporary folder, to which files may be added. `saved` says what is written so far."""

    folder: Path
    saved: Saved


@contextmanager
def drafted(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    plan: Plan | None = None,
    factory: Factory | None = None,
    kwargs: Mapping[str, Any] | None = None,
    source: str | os.PathLike[str] | None = None,
    dense: nn.Module | None = None,
    overwrite: bool = False,
) -> Iterator[Draft]:
    """Like `save`, but the folder gets its final name at the end of the block, with the files that the block added."""
    model = with_plain_weights(model)
    check_apart(path, source)
    state = read_state(model)
    origin = _origin(model, factory, kwargs or {}, source, dense)
    check_space(path, bytes_of(state.tensors))
    with new_folder(path, overwrite=overwrite) as folder:
        _write_data(state, plan, folder)
        _copy_extras(source, folder, renumbered=bool(plan and plan.renumbered))
        if plan and plan.renumbered and hasattr(model, "generation_config"):
            pretrained.write_generation(model, folder)
        _write_program(model, origin, plan, folder)
        manifest = _manifest(state, origin, plan)
        if ranks := ranks_of(model):
            manifest["low_rank"] = ranks
            note = "plain from_pretrained cannot read it: layers of low rank are two layers"
        else:
            note = _make_pretrained(manifest, model, plan, folder) if origin["kind"] == "transformers" else ""
        draft = Draft(folder, saved_in(folder, path, note=note))
        yield draft
        write_manifest(folder, manifest)
        _check_rebuilds(folder, state, origin, factory)
        draft.saved = saved_in(folder, path, note=note)


def saved_in(folder: Path, path: str | os.PathLike[str], *, reader: str = "", note: str = "") -> Saved:
    """The record of an artifact in the temporary folder `folder`, which will be renamed to `path`."""
    total, names = sum(f.stat().st_size for f in folder.iterdir()), sorted(f.name for f in folder.iterdir())
    reader = reader or ("from_pretrained" if (folder / "config.json").is_file() else "prunella.load")
    return Saved(Path(path), total, tuple(names), reader, note)


def load(
    path: str | os.PathLike[str], *, factory: Factory | None = None, device: str | torch.device = "cpu"
) -> nn.Module:
    """Build the model in the folder `path` again, in eval mode; the original weights are not needed.

    Models of transformers, and those saved with a timm or torchvision name, need nothing else. For others, pass the
    `factory`: a manifest is data, and code named in it is never imported. Errors: BadInput if a file is missing, cut
    short, changed, of a newer format, or does not fit the model of the factory.
    device: the device of the loaded model.

    Example:

        >>> import tempfile, torch, prunella as pr
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     at = pr.save(torch.nn.Linear(8, 4), f"{folder}/model", factory=lambda: torch.nn.Linear(8, 4)).path
        ...     pr.load(at, factory=lambda: torch.nn.Linear(8, 4))
        Linear(in_features=8, out_features=4, bias=True)
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    if "sparse" in manifest:
        todo = "read it with prunella.runtime.load_sparse"
        raise RequestError(f"{folder} holds a model with sparse kernels", "its weights are packed", todo)
    check_weights(folder, manifest, (WEIGHTS, BUFFERS, PROGRAM))
    return rebuild(folder, manifest, read_data(folder, manifest), factory).to(device).eval()


def rebuild(folder: Path, manifest: Fields, state: State, factory: Factory | None) -> nn.Module:
    """The model that a manifest describes, cut as it says, with these tensors. Errors: BadInput if they do not fit."""
    origin = manifest.mapping("origin")
    captured = origin.get("kind") == "program"  # stored as it was cut, so no factory can make it
    model = load_exported(folder / PROGRAM)[0] if captured else _rebuilt(origin, factory, folder)
    try:
        if not captured:
            cut_as_recorded_(model, manifest)
            rebuild_(model, manifest.mapping("low_rank", optional=True))
        fill_(model, state)
    except PruningError as error:
        raise BadInput(f"cannot rebuild the model in {folder}", f"{error.what}: {error.why}", error.todo) from error
    return model


def _rebuilt(origin: Mapping[str, Any], factory: Factory | None, folder: Path) -> nn.Module:
    return origins.build_empty(origins.builder(origin, factory, str(folder)))


def check_weights(folder: Path, manifest: Fields, names: tuple[str, ...] | None = None) -> None:
    """`check_files`, and `BadInput` unless the weights are among the files."""
    check_files(folder, manifest, names)
    _require(WEIGHTS in manifest.section("files"), folder, f"its manifest does not list {WEIGHTS}")


def _origin(
    model: nn.Module, factory: Factory | None, kwargs: Mapping[str, Any], source: Any, dense: nn.Module | None
) -> dict[str, Any]:
    if isinstance(model, GraphModule) and factory is None:
        return {"kind": "program"}
    origin = origins.describe(model, factory, kwargs, model if dense is None else dense)
    if origin["kind"] == "transformers" and dense is None and (before := configuration_before(model)) is not None:
        origin["config"] = {**origin["config"], **before}  # what is cut when the model is built again
    config = Path(source) / "config.json" if source is not None else None
    if origin["kind"] == "transformers" and dense is None and config is not None and config.is_file():
        changes = origins.passed_on(read_config(config, todo="give the folder of the dense model").data)
        # The folder has only what differs from the defaults; sizes that pruning changed are all among the rest.
        origin["config"] = {**origin["config"], **changes}
    return origin


def _write_data(state: State, plan: Plan | None, folder: Path) -> None:
    stored = {name: value for name, value in state.tensors.items() if name not in state.transient}
    extra = {name: value for name, value in state.tensors.items() if name in state.transient}
    write_tensors(stored, folder / WEIGHTS)
    if extra:
        write_tensors(extra, folder / BUFFERS)
    if plan is not None:
        save_plan(plan, folder / PLAN)


def _write_program(model: nn.Module, origin: Mapping[str, Any], plan: Plan | None, folder: Path) -> None:
    if origin["kind"] != "program":
        return
    if plan is None or plan.inputs is None:
        raise RequestError("a program is saved with its plan", "it is written with the plan's example", "pass plan=")
    export(model, folder / PROGRAM, inputs=plan.inputs)


def read_data(folder: Path, manifest: Fields) -> State:
    """The tensors of a folder. Errors: BadInput unless they are what the manifest lists."""
    described = {name: value.fields() for name, value in manifest.section("tensors").values()}
    ties = {name: value.text() for name, value in manifest.section("ties").values()}
    transient = manifest.value("transient").texts()
    names = [name for name in (WEIGHTS, BUFFERS) if name in manifest.section("files")]
    tensors = {k: v for name in names for k, v in read_tensors(folder / name, described).items()}
    _require(tensors.keys() == described.keys(), folder, "tensors are missing from its files")
    _require(all(name in tensors for name in ties.values()), folder, "a tied tensor is missing")
    return State(tensors, ties, transient)


def _manifest(state: State, origin: Mapping[str, Any], plan: Plan | None) -> dict[str, Any]:
    head = {
        "prunella": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "origin": dict(origin),
        "tensors": state.described(),
        "ties": dict(state.ties),
        "transient": list(state.transient),
    }
    return {**head, **_describe_plan(plan)} if plan is not None else head


def _describe_plan(plan: Plan) -> dict[str, Any]:
    return {
        "cuts": encode_cuts(plan.cuts),
        "attributes": [[owner, name, value] for (owner, name), value in plan.attributes.items()],
        "dropped": {path: list(names) for path, names in plan.dropped.items()},
        "lists": [[owner, name, list(removed)] for (owner, name), removed in plan.changes.lists.items()],
        "masks": {name: {"kept": int(mask.sum()), "total": mask.numel()} for name, mask in plan.masks.items()},
        "target": {
            "asked": str(plan.target) if plan.target else None,
            "before": asdict(plan.before),
            "after": asdict(plan.after),
        },
        "recipe": plain(plan.recipe),
        "rows": [asdict(row) for row in plan.rows],
    }


def _make_pretrained(manifest: dict[str, Any], model: nn.Module, plan: Plan | None, folder: Path) -> str:
    """Write config.json if a configuration can describe the model, and prove it; else say why not."""
    inputs = plan.small_inputs if plan is not None and plan.inputs is not None else getattr(model, "dummy_inputs", None)
    failed = "no configuration describes these widths, which differ from layer to layer"
    origin, small, sizes = _described(manifest["origin"], model, plan)
    kept = frozenset() if inputs is None else steady(model, origin["config"], inputs)
    build = partial(pretrained.built_shapes, origin)
    for config in uniform_configs(build, origin["config"], small, sizes, kept):
        pretrained.write_config(model, config, folder)
        if inputs is not None and pretrained.reads_back(type(model), folder, model, inputs):
            manifest["origin"]["config"] = config
            manifest["cuts"], manifest["attributes"] = encode_cuts({}), []
            manifest["dropped"], manifest["lists"] = {}, []
            return ""
        (folder / "config.json").unlink()
        failed = "its model does not give the same output"
    manifest["per_layer_config"] = per_layer_config(origin, model, small, sizes, kept)
    return f"plain from_pretrained cannot read it: {failed}"


def _described(
    origin: Mapping[str, Any], model: nn.Module, plan: Plan | None
) -> tuple[Mapping[str, Any], Shapes, Sizes]:
    """The origin with the present tokens and depth, the shapes of the model, and the changed sizes."""
    origin = {**origin, "config": with_tokens(origin["config"], model.config)}
    if plan is not None and plan.dropped:
        origin = {**origin, "config": shallower(origin["config"], plan.attributes, plan.changes.lists)}
    dense, small = origins.build_empty(origins.hugging_face_builder(origin)), shapes_of(model)
    return origin, small, changed_sizes(shapes_of(dense), small, _pairs(dense, plan))


def _pairs(dense: nn.Module, plan: Plan | None) -> Iterator[tuple[int, int]]:
    if plan is None:
        return
    for (owner, name), new in plan.attributes.items():
        old = size_of(attribute(dense, owner, name))
        if old is not None and isinstance(new, int) and not names_token(name):
            yield old, new
    for row in plan.rows:
        if row.kind != "block":
            yield row.total, row.kept


def _copy_extras(source: str | os.PathLike[str] | None, folder: Path, *, renumbered: bool) -> None:
    """Copy files that remain valid for the smaller model; the tokenizer does not if tokens were renumbered."""
    if source is None:
        return
    if not Path(source).is_dir():
        raise RequestError(f"source {source} is not a folder", "tokenizer files are copied from there", "leave it out")
    check_links(Path(source))
    for file in Path(source).iterdir():
        patterns = pretrained.WITHOUT_TOKENS if renumbered else pretrained.COMPANIONS
        wanted = any(fnmatch.fnmatch(file.name, pattern) for pattern in patterns)
        if wanted and file.is_file() and file.suffix in (".json", ".txt", ".model", ".jinja"):
            copy_file(file, folder / file.name)


def _check_rebuilds(folder: Path, state: State, origin: Mapping[str, Any], factory: Factory | None) -> None:
    if origin["kind"] == "unknown":
        return
    try:
        again = read_state(load(folder, factory=factory))
    except BadInput as error:
        todo = "pass plan= and the factory of the dense model (for transformers: dense= or source=)"
        raise RequestError(
            "the model cannot be rebuilt from what was given, so nothing is saved", error.why, todo
        ) from error
    wrong = [n for n, t in state.tensors.items() if n not in again.tensors or not _same(t, again.tensors[n])]
    if wrong or again.ties != state.ties:
        raise RequestError("the rebuilt model differs, so nothing is saved", f"in {(wrong or ['its ties'])[0]}")


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one.cpu(), other)


def _require(condition: bool, folder: Path, why: str) -> None:
    if not condition:
        raise BadInput(f"{folder} is not complete", why, "write it again with prunella.save")
