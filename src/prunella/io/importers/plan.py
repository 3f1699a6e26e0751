"""From another tool's checkpoint to a plan: detect the tool, match its names with the model's, check its masks."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from prunella.errors import BadInput, RequestError
from prunella.graph.data import Graph
from prunella.graph.solve.groups import couple
from prunella.io.checkpoint import Names
from prunella.io.importers.checkpoint import neural_compressor, repeated, sparseml, zeros
from prunella.io.importers.compressed import PARTS, compressed_tensors
from prunella.io.importers.imported import Imported, State, tensors_of
from prunella.io.importers.patterns import pattern_of
from prunella.io.importers.reading import Source, read_source
from prunella.io.importers.torch_masks import needs_masks, torch_ao, torch_prune
from prunella.model.copying import copied
from prunella.model.state import untouched
from prunella.model.torch_masks import with_plain_weights
from prunella.planning.plan import Plan
from prunella.planning.zeros import plan_zeros
from prunella.transform.apply import apply_
from prunella.types import Inputs, Mask

Importer = Callable[[State], Imported]


def import_plan(
    model: nn.Module,
    inputs: Inputs,
    source: Source,
    *,
    masks: Source | None = None,
    importer: Importer | None = None,
    key: str = "",
    units: bool = False,
    allow_pickle: bool = False,
) -> Plan:
    """A plan that turns `model` into another tool's pruned model, by masks and changed weights.

    source: the other tool's module, its state dict, a file (safetensors; torch's only with `allow_pickle`, and then
        tensors and plain data only) or a folder of safetensors. `model` is a new model of the same shapes.
    masks: separate masks: the `state_dict()` of a sparsifier of torch.ao, or a mapping of masks.
    importer: a function of `prunella.io.importers`, to skip the detection of the tool.
    key: the entry of the source with the weights, if it has several (`model` and `model_ema`).
    units: also plan the removal of units that are zero in the imported weights, as `plan_zeros` does. Otherwise only
        masks are imported, and shapes do not change.
    A prefix that all names share, such as `module.` or `model.`, and segments of torch's wrappers are removed from the
    names; a remark says so.
    Errors: BadInput names tensors that are missing, of another shape, or contradictory; also if nothing is pruned.
    """
    model = with_plain_weights(model)
    if source is model:
        todo = "build a new model and pass the pruned one as the source"
        raise RequestError("the model and the source are one module", "a plan is made for a plain model", todo)
    state = read_source(source, key=key, allow_pickle=allow_pickle)
    imported = (importer or importer_of(state, apart=masks is not None))(state)
    if masks is not None:
        imported = _joined(imported, read_source(masks, allow_pickle=allow_pickle))
    with untouched(model, 0):
        plan = _Fit(model, couple(model, inputs), imported).plan(inputs)
    return _without_units(model, plan, inputs) if units else plan


def _without_units(model: nn.Module, plan: Plan, inputs: Inputs) -> Plan:
    """The plan that also removes units that are zero by its masks and weights."""
    cut = plan_zeros(apply_(copied(model), plan), inputs)
    return replace(
        cut, masks=plan.masks, weights={**plan.weights, **cut.weights}, remarks=(*plan.remarks, *cut.remarks)
    )


def importer_of(state: State, *, apart: bool = False) -> Importer:
    """The importer for a checkpoint, from its names. `apart`: its masks are given separately."""
    if isinstance(state.get("state"), Mapping) and "groups" in state:
        return torch_ao
    if isinstance(state.get("recipe"), str):
        return sparseml
    tensors = tensors_of(state)
    if needs_masks(tensors) and not apart:
        why = "torch.ao keeps them in the sparsifier, and leaves them out of the model's state dict"
        raise BadInput("the masks are not in this checkpoint", why, "pass masks=sparsifier.state_dict() as well")
    if any(".parametrizations." in f".{name}" for name in tensors):
        return torch_ao
    if any(f"{name.removesuffix('_orig')}_mask" in tensors for name in tensors if name.endswith("_orig")):
        return torch_prune
    if any(name.rpartition(".")[2] in PARTS[1:] for name in tensors) or _compressed(state.get("config")):
        return compressed_tensors
    if all(value.dtype is torch.bool for value in tensors.values()):
        return neural_compressor
    return zeros


def _compressed(config: object) -> bool:
    inner = config.get("quantization_config", config.get("compression_config")) if isinstance(config, Mapping) else None
    return isinstance(inner, Mapping) and inner.get("quant_method", "compressed-tensors") == "compressed-tensors"


def _joined(imported: Imported, state: State) -> Imported:
    """Weights of one source with the masks of another."""
    apart = torch_ao(state) if isinstance(state.get("state"), Mapping) else neural_compressor(_flat(state))
    origin = apart.origin if imported.implied else f"{imported.origin} and {apart.origin}"
    both = apart.masks if imported.implied else {**imported.masks, **apart.masks}
    return replace(imported, origin=origin, masks=both, implied=False)


def _flat(state: State) -> dict[str, Tensor]:
    return {name.removesuffix("_mask"): value for name, value in tensors_of(state).items()}


@dataclass(frozen=True)
class _Fit:
    """An imported checkpoint and the model with which it is matched."""

    model: nn.Module
    graph: Graph
    imported: Imported

    def plan(self, inputs: Inputs) -> Plan:
        """The plan, if everything fits."""
        own = self._own()
        names = Names.of([*self.imported.weights, *self.imported.masks], frozenset(own))
        weights = self._weights(own, names)
        masks = self._masks(own, names)
        plan = Plan.of_masks(self.graph, masks, pattern=pattern_of, inputs=inputs, frozen=())
        total, kept = sum(row.total for row in plan.rows), sum(row.kept for row in plan.rows)
        if total and not kept:
            raise BadInput("everything is zero", f"all {total} weights are pruned", "give a checkpoint with weights")
        origin = f"imported from {self.imported.origin}: {len(masks)} masks"
        read = (f"the checkpoint: {names.said}",) if names.said else ()
        return replace(plan, weights=weights, remarks=(origin, *read, *self.imported.remarks))

    def _own(self) -> dict[str, Tensor]:
        """Parameters and buffers of the model under all their names."""
        named = dict(self.model.named_buffers(remove_duplicate=False))
        return named | dict(self.model.named_parameters(remove_duplicate=False))

    def _weights(self, own: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
        given = names.renamed(self.imported.weights, "the checkpoint")
        if not given:
            return {}
        aliases = {alias: e.names for e in self.graph.entities.values() for alias in e.names}
        state = self.model.state_dict(keep_vars=True)
        missing = [n for n in state if n in own and not any(a in given for a in aliases.get(n, (n,)))]
        extra = [name for name in given if name not in own]
        if missing or extra:
            raise _unfit(missing, extra, own)
        for name, value in given.items():
            _check_shape(name, value.shape, own[name].shape, "weight")
            if value.is_floating_point() and not bool(torch.isfinite(value.float()).all()):
                raise BadInput(f"{name} is not finite", "it holds NaN or infinity", "give a checkpoint that is sound")
        return {n: v.detach().cpu() for n, v in given.items() if not _equal(v, own[n])}

    def _masks(self, own: Mapping[str, Tensor], names: Names) -> dict[str, Mask]:
        entity = {alias: e.name for e in self.graph.entities.values() for alias in e.names}
        layers = {layer.entity for layer in self.graph.layers}
        masks: dict[str, Mask] = {}
        for name, given in self.imported.masks.items():
            here = names.read(name)
            if here not in own:
                raise _unfit([], [here], own)
            blocks, owner = "neural-compressor" in self.imported.origin, entity.get(here, here)
            mask = repeated(given, tuple(own[here].shape)) if blocks else given
            _check_shape(here, mask.shape, own[here].shape, "mask")
            if self.imported.implied and owner not in layers:
                continue  # zeros of a table or of a buffer are not pruning
            if owner in masks and not masks[owner].equal(mask):
                raise BadInput(f"the masks of {here} and {owner} differ", "the model ties these weights")
            if not bool(mask.all()):
                masks[owner] = mask.contiguous()
        if not masks:
            raise BadInput("nothing is pruned in this checkpoint", "no mask and no zero in a weight", "give another")
        return masks


def _equal(new: Tensor, old: Tensor) -> bool:
    return new.dtype == old.dtype and new.detach().cpu().equal(old.detach().cpu())


def _check_shape(name: str, shape: tuple[int, ...], wanted: tuple[int, ...], what: str) -> None:
    if tuple(shape) != tuple(wanted):
        why = f"{tuple(shape)} in the checkpoint, {tuple(wanted)} in the model"
        raise BadInput(f"the {what} of {name} has another shape", why, "give the model that was pruned")


def _unfit(missing: list[str], extra: list[str], own: Mapping[str, Tensor]) -> BadInput:
    parts = [f"{len(missing)} are missing: {', '.join(missing[:3])}"] if missing else []
    if extra:
        near = difflib.get_close_matches(extra[0], list(own), 1, 0.6)
        parts.append(f"{len(extra)} are not of this model: {', '.join(extra[:3])}")
        parts += [f"near {extra[0]} is {near[0]}"] if near else []
    return BadInput("the checkpoint does not fit the model", "; ".join(parts), "give the model that was pruned")
