"""A model that skips zeros as a folder: bits and values in safetensors, what was measured in the manifest; no pickle.

The folder is that of `prunella.save`, with each replaced weight as `NAME.values` and `NAME.bits`. Choices are kept with
the machine that they were measured on; on another one they are measured again when the folder is read.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from prunella.compress.storage import Format, Stored, decode, encode
from prunella.errors import BadInput, RequestError
from prunella.io.artifact import (
    BUFFERS,
    PROGRAM,
    WEIGHTS,
    Saved,
    check_files,
    read_data,
    read_manifest,
    rebuild,
    save,
)
from prunella.io.files import MARKER, digest, new_folder
from prunella.io.json import Fields, Value, write_json
from prunella.io.origin import Factory
from prunella.io.state import State, read_tensors, write_tensors
from prunella.measure.machine import cpu_name
from prunella.model.unwrap import unwrap
from prunella.planning.plan import Plan
from prunella.runtime.convert import (
    Layer,
    Sparsified,
    around_convolutions,
    assembled,
    kernels,
    noted,
    sparsified,
    stays_whole,
    tuner_for,
)
from prunella.runtime.fx.fuse import Fused, activation_of, channels_last_, copied
from prunella.runtime.kernels.library import Precision
from prunella.runtime.layers import SparseLinear
from prunella.runtime.restore import restored, sparse_layers
from prunella.runtime.tuning.choice import Choice, Problem, Route, from_json, to_json
from prunella.runtime.tuning.eligible import bias_of, geometry_of, matrix_of, targets
from prunella.runtime.tuning.fingerprint import fingerprint
from prunella.runtime.tuning.tune import Tuner, Verdict, configs, density, whole_configs
from prunella.types import Inputs

_LARGEST = 1 << 28
"""Elements of an input that a manifest may ask to be measured with."""


def save_sparse(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    plan: Plan | None = None,
    factory: Factory | None = None,
    kwargs: Mapping[str, Any] | None = None,
    source: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> Saved:
    """Write what `prunella.sparse` returned to the folder `path`, atomically; `load_sparse` reads it.

    plan, factory, kwargs, source, overwrite: as in `prunella.save`. A model that was fused needs its factory, since a
    trace does not say what it was made from. Errors: RequestError as `prunella.save`, and for a model without a record.
    """
    bare = unwrap(model)
    record = sparsified(bare)
    if isinstance(bare, GraphModule) and factory is None:
        why = "its layers were fused, so it is a traced program"
        raise RequestError("this model needs its factory to be saved", why, "pass factory=, or sparse(..., fuse=False)")
    with new_folder(path, overwrite=overwrite) as folder:
        inner = folder / "dense"
        save(restored(bare), inner, plan=plan, factory=factory, kwargs=kwargs, source=source)
        names = _packed(inner, folder, tuple(sparse_layers(bare)))
        manifest = dict(read_manifest(inner).data)
        shutil.rmtree(inner)
        manifest["tensors"] = names.described
        joined = {name: m.activation_path for name, m in sparse_layers(bare).items() if isinstance(m, SparseLinear)}
        joined = {name: path for name, path in joined.items() if path}
        manifest["sparse"] = {"weights": names.shapes, "joined": joined, **_measured(record)}
        manifest["files"] = {f.name: {"sha256": digest(f), "bytes": f.stat().st_size} for f in sorted(folder.iterdir())}
        write_json(folder / MARKER, manifest, allow_nan=True)
        total, files = sum(f.stat().st_size for f in folder.iterdir()), sorted(f.name for f in folder.iterdir())
    return Saved(Path(path), total, tuple(files), "prunella.runtime.load_sparse")


def load_sparse(
    path: str | os.PathLike[str], *, factory: Factory | None = None, seconds: float = 1.0, seed: int = 0
) -> nn.Module:
    """The model of a folder of `save_sparse`, in eval mode.

    On the machine that it was measured on its choices are taken over; elsewhere, or with another number of threads or
    other versions, each kind of layer is measured again for `seconds`. Errors: BadInput for a folder that is damaged,
    cut short, or says what cannot be; RequestError for one of `prunella.save`.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    if "sparse" not in manifest:
        raise RequestError(
            f"{folder} holds a dense model", "save_sparse did not write it", "read it with prunella.load"
        )
    check_files(folder, manifest, (WEIGHTS, BUFFERS, PROGRAM))
    told = _read(manifest.section("sparse"))
    state = _unpacked(folder, manifest, told)
    model = copied(rebuild(folder, manifest, state, factory))
    tuner, traced = tuner_for(model, told.precision, seconds, seed), _example(told)
    if traced is not None and not told.here:
        tuner.last, joined = told.last, around_convolutions(model, traced, fuse=True)[1]
    else:
        joined = {}
    with torch.inference_mode(False), torch.no_grad():
        order = [
            *(name for name in targets(model) if name in told.layers),
            *sorted(told.layers.keys() - targets(model).keys()),
        ]
        layers = tuple(_layer(model, name, told, tuner, joined.get(name, Fused())) for name in order)
        tables = {layer.name: layer.table for layer in layers if layer.table.sparse}
        made = assembled(model, tables, traced, _joined(model, told)) if tables else model
        last = told.last and isinstance(made, GraphModule) and channels_last_(made)
    why = "" if tables else "no layer is faster without its zeros here"
    threads = torch.get_num_threads()
    record = Sparsified(layers, not why, why, None, 0.0, threads, cpu_name(), kernels(), 0.0, told.precision)
    shapes = told.traced if isinstance(made, GraphModule) else ()
    return noted(made.eval(), replace(record, traced=shapes, last=last))


# -- writing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Names:
    described: Mapping[str, Any]
    shapes: Mapping[str, list[int]]


def _packed(inner: Path, folder: Path, layers: Sequence[str]) -> _Names:
    """Write the tensors of a dense folder again, those of the layers as bits and values, and copy its other files."""
    manifest = read_manifest(inner)
    entries = {name: value.fields() for name, value in manifest.section("tensors").values()}
    tensors, shapes = read_tensors(inner / WEIGHTS, entries), dict[str, list[int]]()
    described = {name: entry.data for name, entry in entries.items()}
    for name in layers:
        full = f"{name}.weight" if name else "weight"
        weight = tensors.pop(full)
        parts, entry = encode(weight, Format.BITMASK).parts, described.pop(full)
        shapes[full] = list(entry["shape"])
        for part, value in parts.items():
            tensors[f"{full}.{part}"] = value
            described[f"{full}.{part}"] = {"dtype": str(value.dtype)[6:], "shape": list(value.shape)}
    write_tensors(tensors, folder / WEIGHTS)
    # A config.json would let from_pretrained read the folder, and make up the weights that it does not find.
    for file in inner.iterdir():
        if file.name not in (WEIGHTS, MARKER, "config.json"):
            shutil.copyfile(file, folder / file.name)
    return _Names(described, shapes)


def _measured(record: Sparsified) -> dict[str, Any]:
    kept = {layer.name: layer.verdicts for layer in record.layers if layer.name in record.replaced}
    return {
        "machine": fingerprint(),
        "precision": record.precision.value,
        "last": record.last,
        "traced": [[list(shape), dtype] for shape, dtype in record.traced],
        "layers": {
            name: [[v.problem.size, list(v.problem.image), to_json(v.choice)] for v in verdicts]
            for name, verdicts in kept.items()
        },
    }


# -- reading: a manifest is only data ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Told:
    """What a manifest says, its types checked."""

    here: bool
    precision: Precision
    traced: tuple[tuple[tuple[int, ...], str], ...]
    layers: Mapping[str, tuple[tuple[Problem, Choice], ...]]
    weights: Mapping[str, tuple[int, ...]]
    joined: Mapping[str, str]
    last: bool


def _read(sparse: Fields) -> _Told:
    layers = {name: tuple(_problem(row) for row in rows.items()) for name, rows in sparse.section("layers").values()}
    rows = [row.items(2) for row in sparse.list_of("traced")]
    precision = sparse.text("precision")
    if precision not in {kind.value for kind in Precision}:
        raise sparse.value("precision").refused(f"one of {', '.join(kind.value for kind in Precision)}")
    return _Told(
        here=sparse.value("machine").data == fingerprint(),
        precision=Precision(precision),
        traced=tuple((_shape(shape), dtype.text()) for shape, dtype in rows),
        layers=layers,
        weights={name: _shape(shape) for name, shape in sparse.section("weights").values()},
        joined={name: path.text() for name, path in sparse.section("joined").values()},
        last=sparse.flag("last", default=False),
    )


def _problem(row: Value) -> tuple[Problem, Choice]:
    size, image, choice = row.items(3)
    return Problem(size.integer(low=1, high=_LARGEST), _shape(image)), from_json(choice.data)


def _shape(value: Value) -> tuple[int, ...]:
    shape = value.integers(low=1, high=_LARGEST)
    if len(shape) > 8 or math.prod(shape) > _LARGEST:
        raise value.refused(f"a shape of at most 8 axes and {_LARGEST} elements")
    return shape


def _unpacked(folder: Path, manifest: Fields, told: _Told) -> State:
    state = read_data(folder, manifest)
    tensors = dict(state.tensors)
    for name, shape in told.weights.items():
        values, bits = tensors.pop(f"{name}.values", None), tensors.pop(f"{name}.bits", None)
        if values is None or bits is None or name in tensors:
            raise BadInput(f"{folder} is not complete", f"values or bits of {name!r} are missing", "write it again")
        tensors[name] = decode(Stored(Format.BITMASK, shape, values.dtype, {"values": values, "bits": bits}))
    return State(tensors, state.ties, state.transient)


def _layer(model: nn.Module, name: str, told: _Told, tuner: Tuner, joined: Fused) -> Layer:
    """The choices of a layer: as recorded if they were measured here, else measured now."""
    module, rows = targets(model).get(name), told.layers[name]
    if module is None or not rows:
        raise BadInput(f"the manifest says that {name!r} skips zeros", "the rebuilt model has no such layer")
    weight, asked = matrix_of(module), tuple(problem for problem, _ in rows)
    _check_problems(name, module, asked)
    matrix = weight.reshape(len(weight), -1)
    zeros = 1 - density(matrix)
    whole = bool(stays_whole(model, module))
    known = whole_configs if whole else configs
    if told.here and all(isinstance(c, Route) or c in known(matrix, p.size, told.precision) for p, c in rows):
        return Layer(name, zeros, tuple(Verdict(problem, choice) for problem, choice in rows))
    if whole:
        return Layer(name, zeros, tuner.whole(weight, bias_of(module), asked))
    if isinstance(module, nn.Conv2d):
        return Layer(name, zeros, tuner.conv(weight, bias_of(module), geometry_of(module), asked, joined))
    return Layer(name, zeros, tuner.linear(weight, bias_of(module), asked))


def _check_problems(name: str, module: nn.Module, asked: tuple[Problem, ...]) -> None:
    for problem in asked:
        if isinstance(module, nn.Conv2d):
            image = problem.image
            fits = len(image) == 4 and image[1] == module.in_channels
            fits = fits and image[0] * math.prod(geometry_of(module).positions(image[2:])) == problem.size  # type: ignore[arg-type]
        else:
            fits = not problem.image and problem.size * matrix_of(module).shape[1] <= _LARGEST
        if not fits:
            raise BadInput(f"the manifest names an input that {name!r} does not take", f"{problem}", "write it again")


def _joined(model: nn.Module, told: _Told) -> Mapping[str, str]:
    modules = dict(model.named_modules())
    for name, path in told.joined.items():
        if name not in told.layers or path not in modules or activation_of(modules[path]) is None:
            why = f"the rebuilt model has no activation at {path!r}"
            raise BadInput(f"the manifest says that {name!r} takes over an activation", why, "write the folder again")
    return told.joined


def _example(told: _Told) -> Inputs | None:
    """Noise of the shapes that the trace was made with."""
    made = list[Tensor]()
    for shape, dtype in told.traced:
        kind = getattr(torch, dtype, None)
        if not isinstance(kind, torch.dtype):
            raise BadInput("the manifest is broken", f"{dtype!r} is no type of numbers", "write the folder again")
        made.append(torch.zeros(shape, dtype=kind))
    return None if not made else made[0] if len(made) == 1 else tuple(made)
