"""Put sparse layers in place of dense ones: in the traced program of a model, or in the model as it is."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.fx import GraphModule

from prunella.runtime.fx.chain import chain_
from prunella.runtime.fx.eager_fuse import eager_fusions
from prunella.runtime.fx.fuse import Fused, activation_of, called_modules, fold_, fuse_, traced
from prunella.runtime.kernels.config import Activation
from prunella.runtime.layers import FastLinear, SparseConv2d, SparseLinear, without_values
from prunella.runtime.tuning.choice import Table
from prunella.runtime.tuning.eligible import LayerForm, bias_of, weight_of
from prunella.runtime.tuning.tune import density
from prunella.types import Inputs

MIN_SPARSITY = 0.1
"""A layer with a smaller fraction of zeros keeps its dense weight."""
Forms = Mapping[str, LayerForm]


def why_kept_dense(model: nn.Module, module: nn.Module) -> str:
    """Why a layer keeps its dense weight; empty if the zeros may be removed."""
    weight = weight_of(module)
    if not weight.numel() or 1 - density(weight) < MIN_SPARSITY:
        return "it has hardly any zeros"
    if sum(p is module.weight for _, p in model.named_parameters(remove_duplicate=False)) > 1:
        return "its weight is tied to another layer's"
    return ""


def assembled(
    model: nn.Module,
    forms: Forms,
    tables: Mapping[str, Table],
    example: Inputs | None,
    fused: Mapping[str, str] | None = None,
) -> nn.Module:
    """`model`, changed in place, with these layers replaced; with an example, steps are fused where that is exact.

    forms: how each layer reads its weight. fused: layer -> the activation module that is fused with it, where that is
    known from an earlier call.
    """
    layers = {name: model.get_submodule(name) for name in tables}
    kept_dense = {name: layer for name, layer in layers.items() if why_kept_dense(model, layer)}
    for name, layer in kept_dense.items():
        fast = FastLinear(layer.weight, bias_of(layer), table=tables[name]).eval()  # type: ignore[arg-type]
        if not name:
            return fast
        put(model, name, fast)
        kept_dense[name] = fast
    layers = {name: layer for name, layer in layers.items() if name not in kept_dense}
    program = None if example is None else traced(model, {**layers, **kept_dense}, example)
    if program is None:
        fused = fused if fused is not None else {} if example is None else eager_fusions(model, layers, example)
        return _replace_in_place(model, layers, forms, tables, fused)
    return _replace_in_program(program, layers, forms, tables)


def _replace_in_program(
    program: GraphModule, layers: Mapping[str, nn.Module], forms: Forms, tables: Mapping[str, Table]
) -> nn.Module:
    modules = dict(program.named_modules())

    def make(name: str, fused: Fused) -> nn.Module:
        norm = modules[fused.norm] if fused.norm is not None else None
        return sparse_layer(layers[name], forms[name], tables[name], fused, norm)

    fuse_(program, make, layers)
    for name in layers.keys() - called_modules(program):  # inside a module that could not be traced
        put(program, name, sparse_layer(layers[name], forms[name], tables[name], Fused()))
    fold_(program)
    chain_(program)
    return program.eval()


def _replace_in_place(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    forms: Forms,
    tables: Mapping[str, Table],
    fused: Mapping[str, str],
) -> nn.Module:
    for name, layer in layers.items():
        path = "" if forms[name].geometry is not None else fused.get(name, "")
        activation = activation_of(model.get_submodule(path)) if path else None
        new = sparse_layer(layer, forms[name], tables[name], Fused(None, activation or Activation.NONE))
        if isinstance(new, SparseLinear) and activation is not None:
            new.activation_path = path
            put(model, path, nn.Identity())
        if not name:
            return new
        put(model, name, new)
    return model


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Set the submodule at a path."""
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def sparse_layer(
    layer: nn.Module, form: LayerForm, table: Table, fused: Fused, norm: nn.Module | None = None
) -> nn.Module:
    """The layer that skips its zeros in place of a dense one."""
    weight, bias = form.matrix(layer), bias_of(layer)
    if form.geometry is None:
        dense = () if type(layer) is nn.Linear else (without_values(layer),)
        return SparseLinear(
            weight, bias, table=table, activation=fused.activation, transposed=form.transposed, dense=dense
        ).eval()
    return SparseConv2d(
        weight,
        bias,
        geometry=form.geometry,
        table=table,
        norm=norm if isinstance(norm, nn.BatchNorm2d) else None,
        norm_path=fused.norm or "",
        activation=fused.activation,
    ).eval()
