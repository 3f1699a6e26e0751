"""SliceGPT: rotate the residual stream onto its principal directions, and slice off those of least energy."""

from __future__ import annotations

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
from prunella.model.batches import listed
from prunella.model.copying import copied
from prunella.model.observed_reads import Read
from prunella.model.state import mode
from prunella.model.unwrap import unwrap
from prunella.model.watch import Watch
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
    """An equivalent model whose residual stream is rotated: its k-th unit is the k-th principal direction.

    energy: `(width,)` mean square of each direction in the inputs of layers, descending; its sum is the width.
    scales: names of the scales of the norms, which are all 1: see `rescale_`.
    """

    model: nn.Module
    group: str
    energy: Tensor
    scales: tuple[str, ...] = ()

    def __str__(self) -> str:
        share = self.energy.cumsum(0) / self.energy.sum()
        needed = int((share < 0.95).sum()) + 1
        return f"{self.group}: {needed} of {len(share)} directions carry 95 % of the energy"


@solver(source="Ashkboos et al. 2024, arXiv:2401.15024 (SliceGPT)")
def rotate(model: nn.Module, inputs: Inputs, data: Iterable[Any], *, loss: Loss | None = None) -> Rotated:
    """An equivalent model whose residual stream is rotated onto its principal directions, ready to be sliced.

    `RMSNorm(x Q) = RMSNorm(x) Q` for orthogonal Q: the scales of the norms are folded into the layers that read them,
    then each weight that writes the stream becomes `Q^T W`, and each that reads it `W Q`. Q holds the eigenvectors of
    `sum x^T x` over the inputs of all layers, largest first. All blocks share one Q, so that the architecture does not
    change; the paper has one Q per block, and products of two in the residual connections.
    Data: batches, no labels. Tied embeddings are untied, since the scale of a norm is folded into the head. The result
    is a copy, checked to equal the model in float64.

    inputs: an example batch, as for `plan`. loss: how to run the model on a batch. Errors: NotSupported if the residual
    stream has other norms than RMS norms (a layer norm subtracts a mean, which does not commute with a rotation).

    Use: before `plan(..., Width())` with `activation_norm`, which then slices the directions of least energy, and
    `rescale_` after `shrink`. Avoid: models with layer norms; and for channels inside a block, which need no rotation.
    """
    root = unwrap(model)
    source = Source(None, loss)
    samples = listed(data)
    rotated = copied(root)
    with mode(root, training=False), mode(rotated, training=False), torch.no_grad():
        graph = couple(rotated, inputs)
        if _untie_(rotated, graph, _stream(graph)):
            graph = couple(rotated, inputs)
        group = _stream(graph)
        exact = copied(rotated).double()
        for scale in _scales(group):
            readers = _readers(rotated, group, scale, samples[0], source)
            _fold_(rotated, scale, readers)
            _fold_(exact, scale, readers)
        energy, basis = torch.linalg.eigh(_gram(rotated, group, samples, source))
        for model_ in (rotated, exact):
            _rotate_(model_, group, basis.flip(1))
        verified = verify(root, exact, Changes({}, {}), inputs)  # the result itself is rounded to its own precision
        if not verified.exact:
            raise NotSupported(
                f"the residual stream {group.name} cannot be rotated",
                f"the rotated model differs by {verified.error:.1e}: an operation is neither RMS norm, product nor sum",
                "prune Width() without rotation",
            )
    return Rotated(rotated, group.name, energy.flip(0) * len(energy) / energy.sum(), _scales(group))


def _stream(graph: Graph) -> Group:
    """The width group with the most members."""
    stream = max((g for g in graph.groups if g.kind == "width"), key=lambda g: len(g.members), default=None)
    if stream is None:
        raise NotSupported("there is no residual stream to rotate", "no norm runs along units", "prune Channel()")
    what = f"the residual stream {stream.name} cannot be rotated"
    roles = {member.role for member in stream.members} - {"out", "in", "bias", "scale"}
    if roles or any(run.group == stream.name and run.name == "layer_norm" for run in graph.runs):
        why = "a layer norm runs along it" if not roles or "shift" in roles else f"it has {', '.join(sorted(roles))}"
        raise NotSupported(what, why, "only RMS norms can be rotated: prune Width() without rotation")
    if any(len(member.index) != stream.size for member in stream.members):
        raise NotSupported(what, "a unit has several positions", "")
    return stream


def _untie_(model: nn.Module, graph: Graph, group: Group) -> bool:
    """Untie layers that share a weight, such as embedding and head; whether there were any."""
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


def _readers(model: nn.Module, group: Group, scale: str, batch: Any, source: Source) -> dict[str, int]:
    """The weights that read the output of a norm, with their input axis.

    They are identified by doubling the scale: only their inputs double.
    """
    named = dict(model.named_parameters())
    candidates = {m.entity: m.axis for m in group.members if m.role == "in"}
    weights = [named[name] for name in candidates]
    single = _inputs(model, weights, batch, source)
    named[scale].mul_(2)
    doubled = _inputs(model, weights, batch, source)
    named[scale].div_(2)
    readers = {
        name: axis
        for name, axis in candidates.items()
        if (weight := named[name]) in single and torch.equal(doubled[weight], 2 * single[weight])
    }
    if not readers:
        raise NotSupported(f"no layer reads the output of {scale} directly", "its scale cannot be folded", "")
    return readers


def _fold_(model: nn.Module, scale: str, readers: Mapping[str, int]) -> None:
    """Fold the scale of a norm into the weights that read its output."""
    named = dict(model.named_parameters())
    for name, axis in readers.items():
        shape = [-1 if k == axis else 1 for k in range(named[name].dim())]
        named[name].mul_(named[scale].view(shape))
    named[scale].fill_(1)


def _inputs(
    model: nn.Module, weights: Sequence[nn.Parameter], batch: Any, source: Source
) -> dict[nn.Parameter, Tensor]:
    """The input of the first call of each weight."""
    inputs: dict[nn.Parameter, Tensor] = {}

    def keep(read: Read) -> None:
        inputs.setdefault(read.weight, read.x)

    watch = Watch(weights, keep)
    with watch:
        source.run(model, batch)
    watch.finish()
    return inputs


def _gram(model: nn.Module, group: Group, data: Sequence[Any], source: Source) -> Tensor:
    """`sum x^T x` over the inputs of all layers that read the residual stream."""
    named = dict(model.named_parameters())
    total = torch.zeros(group.size, group.size, dtype=torch.float64, device="cpu")

    def add(read: Read) -> None:
        for x, _ in (chunk for number in range(read.groups) for chunk in read.columns(number)):
            if x.shape[1] == group.size:
                total.add_((x.T @ x).double().cpu() if x.dtype == torch.float64 else (x.float().T @ x.float()).cpu())

    watch = Watch([named[m.entity] for m in group.members if m.role == "in"], add)
    for batch in data:
        with watch:
            source.run(model, batch)
        watch.finish()
    if not bool(torch.isfinite(total).all()) or not bool(total.any()):
        what = "the inputs of the layers are zero or not finite"
        raise CheckFailed(what, "on the calibration data", "check the data")
    return total


def _rotate_(model: nn.Module, group: Group, basis: Tensor) -> None:
    """`T'[.., k, ..] = sum_j T[.., j, ..] Q_jk` along the axis of every member that writes or reads the stream."""
    named = dict(model.named_parameters())
    for member in group.members:
        if member.role != "scale":
            weight = named[member.entity]
            order = _order(member)
            moved = weight.double().movedim(member.axis, -1)
            rotated = torch.empty_like(moved)
            rotated[..., order] = moved[..., order] @ basis.to(weight.device)
            weight.copy_(rotated.movedim(-1, member.axis))


def _order(member: Member) -> Tensor:
    """The position of every unit."""
    positions = torch.empty(len(member.index), dtype=torch.int64, device="cpu")
    positions[torch.from_numpy(member.unit)] = torch.from_numpy(member.index)
    return positions


@dataclass(frozen=True)
class Sliced:
    """A model with a narrower residual stream, the plan that sliced it, and the rotated model before slicing."""

    model: nn.Module
    plan: Plan
    rotated: Rotated

    def __str__(self) -> str:
        kept = int(self.plan.keep[self.rotated.group].sum())
        share = float(self.rotated.energy[:kept].sum() / self.rotated.energy.sum())
        return f"{self.rotated.group}: {kept} of {len(self.rotated.energy)} directions kept, {share:.2%} of the energy"


@solver(source="Ashkboos et al. 2024, arXiv:2401.15024 (SliceGPT)")
def slice_stream(
    model: nn.Module, inputs: Inputs, data: Iterable[Any], *, sparsity: float, loss: Loss | None = None
) -> Sliced:
    """Rotate the residual stream onto its principal directions, slice off those of least energy, and rescale the norms.

    `rotate`, then `plan(..., Width())` by the norm of each direction, then `shrink` and `rescale_`. With nothing sliced
    (`rotate` alone) the model is equivalent. All blocks share one rotation, so that the architecture does not change
    and the model loads with plain `from_pretrained`; one rotation per block, as in the paper, needs a product of two
    rotations in every residual connection, which no configuration has. Data: batches, no labels.

    sparsity: pruned fraction of the directions, above 0 and below 1. loss: how to run the model on a batch.

    Use: wide language models, before distillation. Avoid: small ones, whose residual stream has no empty directions.
    """
    samples = listed(data)
    rotated = rotate(model, inputs, samples, loss=loss)
    recipe = Recipe(activation_norm, Width())
    sliced = plan(
        rotated.model, inputs, recipe, target=Sparsity(sparsity), data=samples, loss=loss, only=[rotated.group]
    )
    small = shrink(rotated.model, sliced)
    rescale_(small, rotated)
    return Sliced(small, sliced, rotated)


def rescale_(small: nn.Module, rotated: Rotated) -> None:
    """Correct the scales of the norms of a sliced model, in place.

    A norm divides by the root mean square over the kept directions, which is larger if the sliced ones had little
    energy: its scale becomes `sqrt(width / kept)`, exact if they had none.
    small: the result of `shrink`. rotated: the result of `rotate`.
    """
    small = unwrap(small)
    with torch.no_grad():
        for name in rotated.scales:
            scale = small.get_parameter(name)
            scale.fill_(math.sqrt(len(rotated.energy) / len(scale)))
