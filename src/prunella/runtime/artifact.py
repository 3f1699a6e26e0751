"""A sparse model as a folder: weights in safetensors, measured choices in the manifest; no pickle.

The folder is that of `prunella.save`, with each replaced weight as `NAME.values` and `NAME.bits`. The manifest says on
which machine the choices were measured; on another machine they are measured again when the folder is loaded.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from prunella.compress.storage import StorageFormat, Stored, decode, encode
from prunella.errors import BadInput, RequestError
from prunella.io.artifact import (
    BUFFERS,
    PROGRAM,
    WEIGHTS,
    Saved,
    check_weights,
    read_data,
    rebuild,
    save,
    saved_in,
)
from prunella.io.files import MARKER, new_folder
from prunella.io.json import Fields, Value
from prunella.io.manifest import read_manifest, write_manifest
from prunella.io.origin import Factory
from prunella.io.space import check_apart
from prunella.io.state import State, read_tensors, write_tensors
from prunella.model.copying import frozen_copy
from prunella.model.unwrap import unwrap
from prunella.planning.plan import Plan
from prunella.runtime.accelerated import AcceleratedLinear
from prunella.runtime.assemble import assembled, why_kept_dense
from prunella.runtime.convert import convolution_context, tuner_for
from prunella.runtime.fx.fuse import Fused, activation_of, channels_last_
from prunella.runtime.kernels.config import Precision
from prunella.runtime.layers import SparseLinear
from prunella.runtime.record import LayerRecord, Shapes, Sparsified, sparsified, with_record
from prunella.runtime.restore import restored, sparse_layers
from prunella.runtime.tuning.acceptance import Acceptance
from prunella.runtime.tuning.choice import Choice, Problem, Route, from_json, to_json
from prunella.runtime.tuning.eligible import LayerForm, bias_of, candidates, form_of, weight_of
from prunella.runtime.tuning.fingerprint import fingerprint
from prunella.runtime.tuning.tune import Tuner, Verdict, configs_for, conv_configs_for, density, keep_dense_configs
from prunella.types import Inputs

_LARGEST = 1 << 28
"""The most elements of an input that a manifest may ask to measure with."""


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
    """Write a model of `prunella.sparse` to the folder `path`, atomically; `load_sparse` reads it.

    plan, factory, kwargs, source, overwrite: as in `prunella.save`. A traced model needs its factory, since the trace
    does not say how the model was built. Errors: RequestError as `prunella.save`, and for a model without a record.
    """
    check_apart(path, source)
    bare = unwrap(model)
    record = sparsified(bare)
    if any(isinstance(module, AcceleratedLinear) for module in bare.modules()):
        why = "its operations were chosen on an accelerator, for that device and version of torch"
        raise RequestError("this model is not saved", why, "save the pruned model, and call sparse where it runs")
    if isinstance(bare, GraphModule) and factory is None:
        why = "its layers were fused, so it is a traced program"
        raise RequestError("this model needs its factory to be saved", why, "pass factory=, or sparse(..., fuse=False)")
    with new_folder(path, overwrite=overwrite) as folder:
        dense_folder = folder / "dense"
        save(restored(bare), dense_folder, plan=plan, factory=factory, kwargs=kwargs, source=source)
        names = _packed(dense_folder, folder, tuple(sparse_layers(bare)))
        manifest = dict(read_manifest(dense_folder).data)
        shutil.rmtree(dense_folder)
        manifest["tensors"] = names.described
        fused = {name: m.activation_path for name, m in sparse_layers(bare).items() if isinstance(m, SparseLinear)}
        fused = {name: path for name, path in fused.items() if path}
        manifest["sparse"] = {"weights": names.shapes, "joined": fused, **_measured(record)}
        write_manifest(folder, manifest)
        saved = saved_in(folder, path, reader="prunella.runtime.load_sparse")
    return saved


def load_sparse(
    path: str | os.PathLike[str], *, factory: Factory | None = None, seconds: float = 1.0, seed: int = 0
) -> nn.Module:
    """The model of a folder of `save_sparse`, in eval mode.

    On the machine where the choices were measured they are used again. On another machine, with another number of
    threads or other versions, each kind of layer is measured for `seconds`. Errors: BadInput for a folder that is
    damaged, incomplete or inconsistent; RequestError for a folder of `prunella.save`.
    """
    folder = Path(path)
    manifest = read_manifest(folder)
    if "sparse" not in manifest:
        raise RequestError(
            f"{folder} holds a dense model", "save_sparse did not write it", "read it with prunella.load"
        )
    check_weights(folder, manifest, (WEIGHTS, BUFFERS, PROGRAM))
    entry = _read(manifest.section("sparse"))
    state = _unpacked(folder, manifest, entry)
    model = frozen_copy(rebuild(folder, manifest, state, factory))
    tuner, example, fused = tuner_for(model, entry.precision, seconds, seed), _example(entry), dict[str, Fused]()
    forms = _forms(model, entry)
    if example is not None and not entry.same_machine:
        tuner.channels_last, fused = entry.channels_last, convolution_context(model, forms, example, fuse=True)[1]
    with torch.inference_mode(False), torch.no_grad():
        layers = tuple(_layer(model, name, forms[name], entry, tuner, fused.get(name, Fused())) for name in forms)
        tables = {layer.name: layer.table for layer in layers if layer.table.replaces}
        sparse = assembled(model, forms, tables, example, _fused_activations(model, entry)) if tables else model
        channels_last = entry.channels_last and isinstance(sparse, GraphModule) and channels_last_(sparse)
    record = Sparsified(
        layers,
        Acceptance("" if tables else "no layer is faster without its zeros here"),
        precision=entry.precision,
        traced=entry.traced if isinstance(sparse, GraphModule) else (),
        channels_last=channels_last,
    )
    return with_record(sparse.eval(), record)


# -- writing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Names:
    described: Mapping[str, Any]
    shapes: Mapping[str, list[int]]


def _packed(inner: Path, folder: Path, layers: Sequence[str]) -> _Names:
    """Copy a dense folder, with the weights of these layers as bits and values."""
    manifest = read_manifest(inner)
    entries = {name: value.fields() for name, value in manifest.section("tensors").values()}
    tensors, shapes = read_tensors(inner / WEIGHTS, entries), dict[str, list[int]]()
    described = {name: entry.data for name, entry in entries.items()}
    for name in layers:
        full = f"{name}.weight" if name else "weight"
        weight = tensors.pop(full)
        parts, entry = encode(weight, StorageFormat.BITMASK).parts, described.pop(full)
        shapes[full] = list(entry["shape"])
        for part, value in parts.items():
            tensors[f"{full}.{part}"] = value
            described[f"{full}.{part}"] = {"dtype": str(value.dtype)[6:], "shape": list(value.shape)}
    write_tensors(tensors, folder / WEIGHTS)
    # With a config.json, from_pretrained would read the folder, and fill the weights that it misses with noise.
    for file in inner.iterdir():
        if file.name not in (WEIGHTS, MARKER, "config.json"):
            shutil.copyfile(file, folder / file.name)
    return _Names(described, shapes)


def _measured(record: Sparsified) -> dict[str, Any]:
    replaced = {layer.name: layer.verdicts for layer in record.layers if layer.name in record.replaced}
    return {
        "machine": fingerprint(),
        "precision": record.precision.value,
        "last": record.channels_last,
        "traced": [[list(shape), dtype] for shape, dtype in record.traced],
        "layers": {
            name: [[v.problem.size, list(v.problem.image), to_json(v.choice)] for v in verdicts]
            for name, verdicts in replaced.items()
        },
    }


# -- reading: the manifest is not trusted -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Entry:
    """The part of a manifest about sparse layers, with its types checked. same_machine: choices are valid here."""

    same_machine: bool
    precision: Precision
    traced: Shapes
    layers: Mapping[str, tuple[tuple[Problem, Choice], ...]]
    weights: Mapping[str, tuple[int, ...]]
    fused: Mapping[str, str]
    channels_last: bool


def _read(sparse: Fields) -> _Entry:
    layers = {name: tuple(_problem(row) for row in rows.items()) for name, rows in sparse.section("layers").values()}
    rows = [row.items(2) for row in sparse.list_of("traced")]
    precision = sparse.text("precision")
    if precision not in {kind.value for kind in Precision}:
        raise sparse.value("precision").refused(f"one of {', '.join(kind.value for kind in Precision)}")
    return _Entry(
        same_machine=sparse.value("machine").data == fingerprint(),
        precision=Precision(precision),
        traced=tuple((_shape(shape), dtype.text()) for shape, dtype in rows),
        layers=layers,
        weights={name: _shape(shape) for name, shape in sparse.section("weights").values()},
        fused={name: path.text() for name, path in sparse.section("joined").values()},
        channels_last=sparse.flag("last", default=False),
    )


def _problem(row: Value) -> tuple[Problem, Choice]:
    size, image, choice = row.items(3)
    return Problem(size.integer(low=1, high=_LARGEST), _shape(image)), from_json(choice.data)


def _shape(value: Value) -> tuple[int, ...]:
    shape = value.integers(low=1, high=_LARGEST)
    if len(shape) > 8 or math.prod(shape) > _LARGEST:
        raise value.refused(f"a shape of at most 8 axes and {_LARGEST} elements")
    return shape


def _unpacked(folder: Path, manifest: Fields, entry: _Entry) -> State:
    state = read_data(folder, manifest)
    tensors = dict(state.tensors)
    for name, shape in entry.weights.items():
        values, bits = tensors.pop(f"{name}.values", None), tensors.pop(f"{name}.bits", None)
        if values is None or bits is None or name in tensors:
            raise BadInput(f"{folder} is not complete", f"values or bits of {name!r} are missing", "write it again")
        tensors[name] = decode(Stored(StorageFormat.BITMASK, shape, values.dtype, {"values": values, "bits": bits}))
    return State(tensors, state.ties, state.transient)


def _forms(model: nn.Module, entry: _Entry) -> dict[str, LayerForm]:
    """How the layers of the manifest read their weights, in the order of the model."""
    modules, forms = candidates(model), dict[str, LayerForm]()
    known = [name for name in modules if name in entry.layers]
    for name in [*known, *sorted(entry.layers.keys() - modules.keys())]:
        problems = tuple(problem for problem, _ in entry.layers[name])
        form = _form(name, modules[name], problems[0]) if name in modules and problems else None
        if not isinstance(form, LayerForm):
            why = form or "the rebuilt model has no such layer"
            raise BadInput(f"the manifest says that {name!r} skips zeros", why, "write it again")
        _check_problems(name, form, weight_of(modules[name]), problems)
        forms[name] = form
    return forms


def _form(name: str, module: nn.Module, problem: Problem) -> LayerForm | str:
    """How a layer reads its weight, or why it is not taken: the axis of its inputs is not known before a run."""
    shape, image = weight_of(module).shape, problem.image
    if len(image) not in (0, 4) or len(shape) != (4 if image else 2) or (image and image[1] != shape[1]):
        raise _not_accepted(name, problem)
    forms = [form_of(module, probe) for probe in ([image] if image else [(2, shape[1]), (2, shape[0])])]
    return next((form for form in forms if isinstance(form, LayerForm)), forms[0])


def _layer(model: nn.Module, name: str, form: LayerForm, entry: _Entry, tuner: Tuner, fused: Fused) -> LayerRecord:
    """The choices of a layer: those of the manifest if they are valid here, otherwise measured now."""
    module, rows = model.get_submodule(name), entry.layers[name]
    weight, sizes = form.matrix(module), tuple(problem for problem, _ in rows)
    matrix = weight.reshape(len(weight), -1)
    zeros = 1 - density(matrix)
    keep_dense = bool(why_kept_dense(model, module))
    valid = keep_dense_configs if keep_dense else configs_for if form.geometry is None else conv_configs_for
    if entry.same_machine and all(isinstance(c, Route) or c in valid(matrix, p.size, entry.precision) for p, c in rows):
        return LayerRecord(name, zeros, tuple(Verdict(problem, choice) for problem, choice in rows))
    if keep_dense:
        return LayerRecord(name, zeros, tuner.keep_dense(weight, bias_of(module), sizes))
    if form.geometry is not None:
        return LayerRecord(name, zeros, tuner.conv(weight, bias_of(module), form.geometry, sizes, fused))
    return LayerRecord(name, zeros, tuner.linear(weight, bias_of(module), sizes))


def _check_problems(name: str, form: LayerForm, weight: Tensor, sizes: tuple[Problem, ...]) -> None:
    for problem in sizes:
        image = problem.image
        if form.geometry is not None:
            fits = len(image) == 4 and image[1] == weight.shape[1]
            fits = fits and image[0] * math.prod(form.geometry.positions((image[2], image[3]))) == problem.size
        else:
            fits = not image and problem.size * weight.shape[0 if form.transposed else 1] <= _LARGEST
        if not fits:
            raise _not_accepted(name, problem)


def _not_accepted(name: str, problem: Problem) -> BadInput:
    return BadInput(f"the manifest names an input that {name!r} does not accept", f"{problem}", "write it again")


def _fused_activations(model: nn.Module, entry: _Entry) -> Mapping[str, str]:
    modules = dict(model.named_modules())
    for name, path in entry.fused.items():
        if name not in entry.layers or path not in modules or activation_of(modules[path]) is None:
            why = f"the rebuilt model has no activation at {path!r}"
            raise BadInput(
                f"the manifest says that an activation is fused with {name!r}", why, "write the folder again"
            )
    return entry.fused


def _example(entry: _Entry) -> Inputs | None:
    """Zeros of the shapes that the model was traced with; None if it was not traced."""
    inputs = list[Tensor]()
    for shape, name in entry.traced:
        dtype = getattr(torch, name, None)
        if not isinstance(dtype, torch.dtype):
            raise BadInput("the manifest is broken", f"{name!r} is not a dtype", "write the folder again")
        inputs.append(torch.zeros(shape, dtype=dtype, device="cpu"))
    return None if not inputs else inputs[0] if len(inputs) == 1 else tuple(inputs)
