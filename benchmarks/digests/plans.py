"""Cells of `digests.py` that go over all its models: plans of units and of masks, recoveries, and files."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import safetensors.torch
from cells import Cell
from models import NETS, Net, loss, outputs
from torch import nn

import prunella as pr

RATE = 1e-3


@dataclass(frozen=True)
class Method:
    """A recipe with its target."""

    name: str
    recipe: pr.Recipe
    target: Any = None


def channels() -> Iterator[Method]:
    """Channels by five criteria."""
    unit = pr.Channel()
    yield Method("magnitude uniform MACs", pr.Recipe(pr.magnitude, unit, pr.uniform), pr.MACs(0.8))
    yield Method("magnitude global Params", pr.Recipe(pr.magnitude, unit, pr.global_), pr.Params(0.7))
    yield Method("group_norm global MACs", pr.Recipe(pr.criteria.group_norm, unit, pr.global_), pr.MACs(0.8))
    yield Method("taylor global Params", pr.Recipe(pr.taylor, unit, pr.global_), pr.Params(0.7))
    yield Method("bn_scale uniform Sparsity", pr.Recipe(pr.criteria.bn_scale, unit, pr.uniform), pr.Sparsity(0.3))
    yield Method("random uniform MACs", pr.Recipe(pr.criteria.random, unit, pr.uniform, seed=3), pr.MACs(0.8))
    mean = pr.Channel(pr.granularity.Reduce.MEAN)
    aligned = pr.Recipe(pr.criteria.group_norm, mean, pr.allocation.isomorphic, 0.2, 2)  # by place: names may change
    yield Method("group_norm isomorphic Bytes aligned", aligned, pr.Bytes(0.85))


def heads() -> Iterator[Method]:
    """Heads."""
    yield Method("magnitude uniform", pr.Recipe(pr.magnitude, pr.Head(), pr.uniform), pr.Sparsity(0.5))
    yield Method("group_norm global", pr.Recipe(pr.criteria.group_norm, pr.Head(), pr.global_), pr.Sparsity(0.25))
    yield Method(
        "head_importance global", pr.Recipe(pr.criteria.head_importance, pr.Head(), pr.global_), pr.Sparsity(0.5)
    )
    yield Method("random uniform", pr.Recipe(pr.criteria.random, pr.Head(), pr.uniform), pr.Sparsity(0.5))


def widths() -> Iterator[Method]:
    """Positions of a residual stream."""
    yield Method("magnitude uniform", pr.Recipe(pr.magnitude, pr.Width(), pr.uniform), pr.Sparsity(0.25))
    yield Method("group_norm global", pr.Recipe(pr.criteria.group_norm, pr.Width(), pr.global_), pr.Params(0.7))
    yield Method("taylor global", pr.Recipe(pr.taylor, pr.Width(), pr.global_), pr.Sparsity(0.25))


def depths() -> Iterator[Method]:
    """Residual blocks."""
    mean = pr.Depth(pr.granularity.Reduce.MEAN)
    yield Method("block_influence", pr.Recipe(pr.criteria.block_influence, pr.Depth(), pr.global_), pr.Sparsity(0.34))
    yield Method("magnitude mean", pr.Recipe(pr.magnitude, mean, pr.global_), pr.Sparsity(0.5))
    yield Method("random", pr.Recipe(pr.criteria.random, pr.Depth(), pr.global_, seed=1), pr.Sparsity(0.34))
    units = (pr.Channel(), pr.Head(), pr.Width(), mean)
    yield Method("all kinds of units", pr.Recipe(pr.magnitude, units, pr.global_), pr.Params(0.5))


def experts() -> Iterator[Method]:
    """Experts of a mixture."""
    for name, criterion in (
        ("reap", pr.criteria.reap),
        ("router_frequency", pr.criteria.router_frequency),
        ("router_weight", pr.criteria.router_weight),
        ("magnitude", pr.magnitude),
    ):
        yield Method(name, pr.Recipe(criterion, pr.Expert(), pr.uniform), pr.Sparsity(0.5))


def vocabularies() -> Iterator[Method]:
    """Tokens, alone and with channels."""
    some = pr.granularity.Vocabulary(tuple(range(0, 61, 2)))
    yield Method("alone", pr.Recipe(granularity=some))
    yield Method("with channels", pr.Recipe(pr.criteria.group_norm, (pr.Channel(), some), pr.global_), pr.Params(0.7))


UNITS: dict[str, Callable[[], Iterator[Method]]] = {
    "channel": channels,
    "head": heads,
    "width": widths,
    "depth": depths,
    "expert": experts,
    "vocabulary": vocabularies,
}


def masks() -> Iterator[Method]:
    """Single weights and patterns."""
    one, rows = pr.Element(), pr.Element(per_row=True)
    yield Method("element magnitude uniform", pr.Recipe(pr.magnitude, one, pr.uniform), pr.Sparsity(0.5))
    yield Method("element magnitude global", pr.Recipe(pr.magnitude, one, pr.global_), pr.Sparsity(0.9))
    yield Method("element magnitude erk", pr.Recipe(pr.magnitude, one, pr.allocation.erk), pr.Sparsity(0.8))
    yield Method("element magnitude lamp", pr.Recipe(pr.magnitude, one, pr.allocation.lamp), pr.Sparsity(0.8))
    yield Method("element magnitude global MACs", pr.Recipe(pr.magnitude, one, pr.global_), pr.MACs(0.5))
    yield Method("element random erk", pr.Recipe(pr.criteria.random, one, pr.allocation.erk, seed=5), pr.Sparsity(0.8))
    yield Method("element snip global", pr.Recipe(pr.criteria.snip, one, pr.global_), pr.Sparsity(0.9))
    yield Method("element taylor uniform", pr.Recipe(pr.taylor, one, pr.uniform), pr.Sparsity(0.5))
    yield Method("element taylor_sq lamp", pr.Recipe(pr.criteria.taylor_sq, one, pr.allocation.lamp), pr.Sparsity(0.7))
    yield Method("rows wanda uniform", pr.Recipe(pr.wanda, rows, pr.uniform), pr.Sparsity(0.5))
    yield Method("element wanda owl", pr.Recipe(pr.wanda, one, pr.allocation.owl), pr.Sparsity(0.6))
    yield Method("2:4 magnitude", pr.Recipe(pr.magnitude, pr.NM(2, 4, ragged=True)))
    yield Method("2:4 wanda", pr.Recipe(pr.wanda, pr.NM(2, 4, ragged=True)))
    yield Method("blocks magnitude uniform", pr.Recipe(pr.magnitude, pr.Block(2, 2), pr.uniform), pr.Sparsity(0.5))
    yield Method("blocks snip global", pr.Recipe(pr.criteria.snip, pr.Block(2, 2), pr.global_), pr.Sparsity(0.5))


# -- plans -------------------------------------------------------------------------------------------------------


def planned(net: Net, method: Method) -> pr.Plan:
    """The plan of one method."""
    data = net.batches()
    return pr.plan(net.model(), data[0], method.recipe, target=method.target, data=data, loss=loss)


def shrunk(net: Net, method: Method) -> dict[str, Any]:
    """A plan of units, the smaller model, and what it computes."""
    plan = planned(net, method)
    small = pr.shrink(net.model(), plan)
    return {"plan": plan, "small": small, "outputs": outputs(small, plan.small_inputs)}


def masked(net: Net, method: Method) -> dict[str, Any]:
    """A plan of masks, the masked model, and what it computes."""
    plan = planned(net, method)
    model = pr.apply_(net.model(), plan)
    return {"plan": plan, "model": model, "outputs": outputs(model, net.batches()[0])}


# -- recoveries --------------------------------------------------------------------------------------------------

CUT = Method("cut", pr.Recipe(pr.criteria.group_norm, pr.Channel(), pr.global_), pr.Params(0.8))
SCATTERED = Method("zeros", pr.Recipe(pr.magnitude, pr.Element(), pr.global_), pr.Sparsity(0.7))


@cache
def cut(net: Net) -> pr.Plan:
    """The plan that all recoveries and files of a model start from."""
    return planned(net, CUT)


def small_of(net: Net) -> nn.Module:
    """The model that is to be recovered."""
    return pr.shrink(net.model(), cut(net)).eval()


def recoveries(net: Net) -> Iterator[tuple[str, Callable[[nn.Module, nn.Module], Any]]]:
    """Functions of (small, dense) that change the weights of `small`."""
    data, plan = net.batches(), cut(net)
    yield "reconstruct", lambda small, dense: pr.reconstruct(small, dense, data, plan)
    yield "fold_means", lambda small, dense: pr.recovery.fold_means(small, dense, data, plan)
    yield "recalibrate_bn", lambda small, dense: pr.recalibrate_bn(small, data)
    yield "correct_statistics", lambda small, dense: pr.recovery.correct_statistics(small, dense, data, plan=plan)
    yield "finetune", lambda small, dense: pr.finetune(small, data, loss, steps=2, lr=RATE)
    yield "distill", lambda small, dense: pr.distill(small, dense, data, steps=2, lr=RATE)


def recovered(net: Net, name: str) -> dict[str, Any]:
    """The weights after one recovery, and the outputs."""
    small, dense = small_of(net), net.model()
    dict(recoveries(net))[name](small, dense)
    return {"small": small, "outputs": outputs(small, net.batches()[0])}


def trained_masks(net: Net) -> dict[str, Any]:
    """Weights after two steps under masks, then without them."""
    model = pr.apply_(net.model(), planned(net, SCATTERED))
    pr.finetune(model, net.batches(), loss, steps=2, lr=RATE)
    masks = pr.masks_of(model)
    return {"masks": masks, "model": pr.finalize(model)}


# -- files -------------------------------------------------------------------------------------------------------


def saved(net: Net) -> dict[str, Any]:
    """A folder and a plan file, each as it is read again, and a safetensors file as that library reads it."""
    small, plan = small_of(net), cut(net)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        pr.save(small, folder / "small", plan=plan, factory=net.model, dense=net.model())
        again = pr.load(folder / "small", factory=net.model)
        file = pr.io.save_plan(plan, folder / "cut.plan")
        pr.export(small, folder / "small.safetensors")
        exported = safetensors.torch.load_file(folder / "small.safetensors")
        return {
            "loaded": again,
            "outputs": outputs(again, net.batches()[0]),
            "plan": pr.io.load_plan(file),
            "exported": exported,
        }


def model_cells() -> Iterator[Cell]:
    """All cells of all models."""
    for net in NETS:
        for kind in net.units:
            for method in islice(UNITS[kind](), 0, None, net.every):
                yield Cell(f"{net.name} / {kind} / {method.name}", partial(shrunk, net, method))
        for method in islice(masks(), 0, None, net.every):
            yield Cell(f"{net.name} / masks / {method.name}", partial(masked, net, method))
        yield Cell(f"{net.name} / files", partial(saved, net))
        if net.trainable:
            for name in ("reconstruct", "fold_means", "recalibrate_bn", "correct_statistics", "finetune", "distill"):
                yield Cell(f"{net.name} / recovery / {name}", partial(recovered, net, name))
            yield Cell(f"{net.name} / recovery / training under masks", partial(trained_masks, net))
