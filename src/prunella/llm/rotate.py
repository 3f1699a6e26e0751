"""Rotate the residual stream onto its principal directions, so that whole positions can be sliced off."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunella.criteria import activation_norm
from prunella.errors import CheckFailed, NotSupported
from prunella.granularity import Width
from prunella.graph.cut.changes import Changes
from prunella.graph.data import Graph, Group, Member
from prunella.graph.solve.groups import couple
from prunella.graph.verify import verify
from prunella.model.forward import batches, mode
from prunella.model.reads import Read, Watch, rows
from prunella.model.unwrap import unwrap
from prunella.planning.plan import Plan
from prunella.planning.planner import plan
from prunella.planning.recipe import Recipe
from prunella.registry.method import solver
from prunella.stats import Source
from prunella.targets import Sparsity
from prunella.transform.shrink import shrink
from prunella.types import Inputs, Loss


@dataclass(frozen=True)
class Rotated:
    """A model that computes the same in other coordinates: position k of its stream is the k-th principal direction.

    energy: `(width,)` mean square of each position where layers read it, descending; its sum is the width.
    scales: names of the norms' scales, which are all 1 now: see `rescale_`.
    """

    model: nn.Module
    group: str
    energy: Tensor
    scales: tuple[str, ...] = ()

    def __str__(self) -> str:
        share = self.energy.cumsum(0) / self.energy.sum()
        needed = int((share < 0.95).sum()) + 1
        return f"{self.group}: {needed} of {len(share)} directions carry 95 % of what layers read"


@solver(source="Ashkboos et al. 2024, arXiv:2401.15024 (SliceGPT)")
def rotate(model: nn.Module, inputs: Inputs, data: Iterable[Any], *, loss: Loss | None = None) -> Rotated:
    """The same function with its residual stream turned onto its principal directions, ready to be sliced.

    `RMSNorm(x Q) = RMSNorm(x) Q` for orthogonal Q: scales of the norms go into the layers that read them, then every
    weight that writes the stream becomes `Q^T W`, every one that reads it `W Q`. Q holds the eigenvectors of
    `sum x^T x` over what all layers read, largest first. One Q serves all blocks, so that the architecture stays as it
    is; the paper has one for each block, with products of two in the residual paths.
    Data: batches, no labels. Tied tables are untied, since a norm's scale goes into the head. The result is a copy, and
    equals the model in float64, or it is refused.

    inputs: an example batch, as for `plan`. loss: how to run the model on a batch. Errors: NotSupported where the
    stream is not that of RMS norms (a layer norm takes a mean, which is not rotated).

    Use: before `plan(..., Width())` with `activation_norm`, which then slices the directions of least energy, and
    `rescale_` after `shrink`. Avoid: models with layer norms; and for channels inside a block, which need no rotation.
    """
    root = unwrap(model)
    source = Source(None, loss)
    held = list(batches(data))
    twin = copy.deepcopy(root)
    with mode(root, training=False), mode(twin, training=False), torch.no_grad():
        graph = couple(twin, inputs)
        if _untied(twin, graph, _stream(graph)):
            graph = couple(twin, inputs)
        group = _stream(graph)
        proof = copy.deepcopy(twin).double()
        for scale in _scales(group):
            _fold(twin, scale, fed := _fed(twin, group, scale, held[0], source))
            _fold(proof, scale, fed)
        energy, basis = torch.linalg.eigh(_gram(twin, group, held, source))
        for made in (twin, proof):
            _turn(made, group, basis.flip(1))
        found = verify(root, proof, Changes({}, {}), inputs)  # the twin itself is rounded to its own precision
        if not found.exact:
            raise NotSupported(
                f"the stream {group.name} cannot be rotated",
                f"the rotated model differs by {found.error:.1e}: something along it is no RMS norm, product or sum",
                "prune Width() without rotation",
            )
    return Rotated(twin, group.name, energy.flip(0) * len(energy) / energy.sum(), _scales(group))


def _stream(graph: Graph) -> Group:
    """The width group with the most members."""
    found = max((g for g in graph.groups if g.kind == "width"), key=lambda g: len(g.members), default=None)
    if found is None:
        raise NotSupported("there is no residual stream to rotate", "no norm runs along units", "prune Channel()")
    roles = {member.role for member in found.members} - {"out", "in", "bias", "scale"}
    if roles or any(run.group == found.name and run.name == "layer_norm" for run in graph.runs):
        why = "a layer norm runs along it" if not roles or "shift" in roles else f"it has {', '.join(sorted(roles))}"
        raise NotSupported(f"the stream {found.name} cannot be rotated", why, "RMS norms can: prune Width() as it is")
    if any(len(member.index) != found.size for member in found.members):
        raise NotSupported(f"the stream {found.name} cannot be rotated", "a unit has several positions", "")
    return found


def _untied(model: nn.Module, graph: Graph, group: Group) -> bool:
    """Give layers whose weight stands under several names, as a table and a head, one of their own; whether any had."""
    done = False
    shared = {m.entity for m in group.members if len(graph.entities[m.entity].names) > 1}
    for layer in (layer for layer in graph.layers if layer.entity in shared):
        entity = layer.entity
        names = [name for name in graph.entities[entity].names if name.rpartition(".")[0] == layer.module]
        if not names:
            raise NotSupported(f"{entity} is shared within one module", "it cannot be untied", "")
        owner, leaf = model.get_submodule(layer.module), names[0].rpartition(".")[2]
        old = owner.get_parameter(leaf)
        setattr(owner, leaf, nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad))
        done = True
    config = getattr(model, "config", None)
    if done and getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False  # type: ignore[union-attr]
    return done


def _scales(group: Group) -> tuple[str, ...]:
    return tuple(member.entity for member in group.members if member.role == "scale")


def _fed(model: nn.Module, group: Group, scale: str, batch: Any, source: Source) -> dict[str, int]:
    """The weights that read the output of a norm, and the axis on which they do.

    It shows when the scale is doubled: exactly their inputs double.
    """
    named = dict(model.named_parameters())
    readers = {m.entity: m.axis for m in group.members if m.role == "in"}
    weights = [named[name] for name in readers]
    plain = _inputs(model, weights, batch, source)
    named[scale].mul_(2)
    doubled = _inputs(model, weights, batch, source)
    named[scale].div_(2)
    fed = {
        name: axis
        for name, axis in readers.items()
        if (weight := named[name]) in plain and torch.equal(doubled[weight], 2 * plain[weight])
    }
    if not fed:
        raise NotSupported(f"no layer reads the output of {scale} as it is", "its scale has to stay", "")
    return fed


def _fold(model: nn.Module, scale: str, fed: Mapping[str, int]) -> None:
    """Put the scale of a norm into the weights that read its output."""
    named = dict(model.named_parameters())
    for name, axis in fed.items():
        shape = [-1 if k == axis else 1 for k in range(named[name].dim())]
        named[name].mul_(named[scale].view(shape))
    named[scale].fill_(1)


def _inputs(model: nn.Module, wanted: Sequence[nn.Parameter], batch: Any, source: Source) -> dict[nn.Parameter, Tensor]:
    found: dict[nn.Parameter, Tensor] = {}

    def keep(read: Read) -> None:
        found.setdefault(read.weight, read.x)

    watch = Watch(wanted, keep)
    with watch:
        source.run(model, batch)
    watch.finish()
    return found


def _gram(model: nn.Module, group: Group, data: Sequence[Any], source: Source) -> Tensor:
    named = dict(model.named_parameters())
    total = torch.zeros(group.size, group.size, dtype=torch.float64)

    def add(read: Read) -> None:
        for x, _ in rows(read):
            if x.shape[1] == group.size:
                total.add_((x.T @ x).double().cpu() if x.dtype == torch.float64 else (x.float().T @ x.float()).cpu())

    watch = Watch([named[m.entity] for m in group.members if m.role == "in"], add)
    for batch in data:
        with watch:
            source.run(model, batch)
        watch.finish()
    if not bool(torch.isfinite(total).all()) or not bool(total.any()):
        raise CheckFailed("what the layers read is not finite, or nothing", "on the calibration data", "check the data")
    return total


def _turn(model: nn.Module, group: Group, basis: Tensor) -> None:
    """`T'[.., k, ..] = sum_j T[.., j, ..] Q_jk` along the axis of every member that writes or reads the stream."""
    named = dict(model.named_parameters())
    for member in group.members:
        if member.role != "scale":
            weight = named[member.entity]
            order = _order(member)
            moved = weight.double().movedim(member.axis, -1)
            turned = torch.empty_like(moved)
            turned[..., order] = moved[..., order] @ basis.to(weight.device)
            weight.copy_(turned.movedim(-1, member.axis))


def _order(member: Member) -> Tensor:
    """The position of every unit."""
    found = torch.empty(len(member.index), dtype=torch.int64)
    found[torch.from_numpy(member.unit)] = torch.from_numpy(member.index)
    return found


@dataclass(frozen=True)
class Sliced:
    """A model with a narrower stream: `model`, the plan that sliced it, and the rotated model that it was cut from."""

    model: nn.Module
    plan: Plan
    rotated: Rotated

    def __str__(self) -> str:
        kept = int(self.plan.keep[self.rotated.group].sum())
        share = float(self.rotated.energy[:kept].sum() / self.rotated.energy.sum())
        return f"{self.rotated.group}: {kept} of {len(self.rotated.energy)} directions stay, {share:.2%} of the energy"


@solver(source="Ashkboos et al. 2024, arXiv:2401.15024 (SliceGPT)")
def slice_stream(
    model: nn.Module, inputs: Inputs, data: Iterable[Any], *, sparsity: float, loss: Loss | None = None
) -> Sliced:
    """Turn the residual stream onto its principal directions, slice off those of least energy, and rescale the norms.

    `rotate`, then `plan(..., Width())` by the size of each direction, then `shrink` and `rescale_`. With nothing sliced
    (`rotate` alone) the model computes the same. One rotation for all blocks, so that the model stays of its
    architecture and loads with plain `from_pretrained`; one for each block, as in the paper, would need a product of
    two rotations in every residual path, which no configuration can say. Data: batches, no labels.

    sparsity: fraction of the directions that go, above 0 and below 1. loss: how to run the model on a batch.

    Use: wide language models, before healing. Avoid: small ones, whose stream has no empty directions.
    """
    held = list(batches(data))
    turned = rotate(model, inputs, held, loss=loss)
    recipe = Recipe(activation_norm, Width())
    done = plan(turned.model, inputs, recipe, target=Sparsity(sparsity), data=held, loss=loss, only=[turned.group])
    small = shrink(turned.model, done)
    rescale_(small, turned)
    return Sliced(small, done, turned)


def rescale_(small: nn.Module, rotated: Rotated) -> None:
    """Give the norms of a sliced model the size that they had, in place.

    A norm divides by the mean over the positions that stay, which is larger where those that went carried little: its
    scale becomes `sqrt(width / kept)`, exact where they carried nothing.
    """
    with torch.no_grad():
        for name in rotated.scales:
            scale = small.get_parameter(name)
            scale.fill_(math.sqrt(len(rotated.energy) / len(scale)))
