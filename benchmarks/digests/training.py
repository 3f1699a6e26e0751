"""Cells of `digests.py` that train: pruning before and during training, gates, penalties, lottery tickets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from cells import cell, cells
from models import NETS, loss
from torch import Tensor, nn
from torch.optim import Optimizer
from value import digest

import prunella as pr

NET = NETS[0]
DATA = NET.batches(3)
ERK = pr.Recipe(pr.magnitude, pr.Element(), pr.allocation.erk)


def descend(model: nn.Module, after: Callable[[], Any], *, steps: int = 6, optimizer: Optimizer | None = None) -> None:
    """Plain training, with something after each step."""
    optimizer = optimizer or sgd(model)
    model.train()
    for step in range(steps):
        optimizer.zero_grad()
        loss(model, DATA[step % len(DATA)]).backward()
        optimizer.step()
        after()
    model.eval()


def sgd(model: nn.Module) -> Optimizer:
    """With momentum."""
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def masked(sparsity: float = 0.7) -> nn.Module:
    """The network under masks."""
    model = NET.model()
    return pr.apply_(model, pr.plan(model, DATA[0], ERK, target=pr.Sparsity(sparsity)))


# -- before training ---------------------------------------------------------------------------------------------


@cell("at initialization / synflow_rounds")
def synflow() -> pr.Plan:
    return pr.planning.synflow_rounds(NET.model(), DATA[0], target=pr.Sparsity(0.95), count=8)


@cell("at initialization / iterative_snip")
def snip() -> pr.Plan:
    return pr.planning.iterative_snip(NET.model(), DATA[0], target=pr.Sparsity(0.9), data=DATA, loss=loss, count=4)


@cell("at initialization / force")
def force() -> pr.Plan:
    return pr.planning.force(NET.model(), DATA[0], target=pr.Sparsity(0.9), data=DATA, loss=loss, count=4)


@cell("at initialization / iterate")
def rounds() -> dict[str, pr.Plan]:
    recipe = pr.Recipe(pr.criteria.grasp, pr.Element(), pr.global_, 0.0, 1, 0, False, 0)  # the last 0: layers may empty
    blocks = pr.Recipe(pr.criteria.taylor_sq, pr.Block(2, 2), pr.global_)
    how = pr.planning.Rounds(3, schedule=pr.schedules.linear, nested=False)
    return {
        "grasp": pr.planning.iterate(
            NET.model(), DATA[0], recipe, target=pr.Sparsity(0.8), rounds=pr.planning.Rounds(3), data=DATA, loss=loss
        ),
        "blocks": pr.planning.iterate(
            NET.model(), DATA[0], blocks, target=pr.Sparsity(0.6), rounds=how, data=DATA, loss=loss
        ),
    }


# -- during training ---------------------------------------------------------------------------------------------

RULES: dict[str, Callable[[], pr.train.Rule]] = {
    "set": lambda: pr.train.set_(zeta=0.3),
    "rigl": lambda: pr.train.rigl(alpha=0.3),
    "sparse_momentum": lambda: pr.train.sparse_momentum(alpha=0.5, memory=0.5),
    "granet": lambda: pr.train.granet(final=0.9, alpha=0.5),
}


@cells("dynamic training", RULES)
def dynamic(rule: Callable[[], pr.train.Rule]) -> dict[str, Any]:
    model = masked()
    optimizer, seen = sgd(model), [pr.masks_of(model)]
    loop = pr.train.DropGrow(model, optimizer, rule=rule(), steps=8, every=2, seed=1)

    def step() -> None:
        loop.step()
        seen.append(pr.masks_of(model))

    descend(model, step, steps=8, optimizer=optimizer)
    return {"model": model, "masks": pr.masks_of(model), "explored": [loop.explored, pr.train.itop(seen)],
            "state": loop.state_dict()}  # fmt: skip


@cell("gradual pruning")
def gradual() -> dict[str, Any]:
    model = NET.model()
    optimizer = sgd(model)
    with pr.Pruner(
        model,
        optimizer,
        recipe=ERK,
        target=pr.Sparsity(0.8),
        inputs=DATA[0],
        schedule=pr.schedules.cubic,
        steps=6,
        every=2,
    ) as pruner:
        descend(model, pruner.step, optimizer=optimizer)
    return {"masks": pr.masks_of(model), "model": pr.finalize(model)}


@cell("cycles that end sparse")
def cycles() -> dict[str, Any]:
    model = NET.model()
    optimizer = sgd(model)
    pruner = pr.Pruner(model, optimizer, recipe=ERK, target=pr.Sparsity(0.75), inputs=DATA[0],
                       schedule=lambda at: pr.schedules.acdc(at, cycles=2, warmup=0.2, last=0.2), steps=8,
                       nested=False)  # fmt: skip
    descend(model, pruner.step, steps=8, optimizer=optimizer)
    return {"masks": pr.masks_of(model), "model": model}


@cell("soft filters")
def soft() -> dict[str, Any]:
    model = NET.model()
    pruner = pr.train.SoftFilterPruner(
        model, DATA[0], recipe=pr.Recipe(pr.criteria.group_norm), target=pr.Sparsity(0.3)
    )
    descend(model, pruner.step)
    return {"plan": pruner.finish(), "model": model}


@cell("network surgery")
def surgery() -> dict[str, Any]:
    model = NET.model()
    optimizer = sgd(model)
    pruner = pr.train.NetworkSurgery(model, optimizer, recipe=ERK, target=pr.Sparsity(0.6), inputs=DATA[0], every=2)
    descend(model, pruner.step, optimizer=optimizer)
    return {"plan": pruner.finish(), "model": model}


@cell("top-kast")
def top_kast() -> dict[str, Any]:
    model = NET.model()
    loop = pr.train.top_kast_(model, pr.plan(model, DATA[0], ERK, target=pr.Sparsity(0.8)), extra=0.1, every=2)
    descend(model, loop.step, optimizer=torch.optim.SGD(model.parameters(), lr=0.05))
    return {"penalty": loop.penalty(), "model": loop.finalize()}


@cell("admm training")
def admm() -> dict[str, Any]:
    model = NET.model()
    recipe = pr.Recipe(granularity=pr.NM(2, 4))
    admm = pr.train.AdmmTraining(model, lambda m: pr.plan(m, DATA[0], recipe, skip=["0"]), rho=0.1)
    for _ in range(2):
        pr.finetune(model, DATA, pr.train.penalized(loss, admm), steps=2, lr=1e-3)
        admm.update()
    return {"distance": admm.distance, "plan": admm.plan, "model": model}


# -- penalties and proximal steps --------------------------------------------------------------------------------


def units(model: nn.Module) -> pr.train.CoupledUnits:
    """What goes together in the network."""
    return pr.train.coupled_units(model, DATA[0])


@cells(
    "penalty",
    {"group_lasso": pr.train.group_lasso, "group_sparsity": pr.train.group_sparsity, "slimming": pr.train.slimming},
)
def penalty(make: Callable[[pr.train.CoupledUnits], Any]) -> dict[str, Any]:
    model = NET.model()
    term = make(units(model))
    value = term(model)
    pr.finetune(model, DATA, pr.train.penalized(loss, term, 1e-2), steps=3, lr=1e-2)
    return {"value": value, "model": model}


@cell("growing penalty")
def growing() -> dict[str, Any]:
    model = NET.model()
    cut = pr.plan(model, DATA[0], pr.Recipe(pr.criteria.group_norm), target=pr.Sparsity(0.3))
    term = pr.train.GReg(model, cut, delta=0.1, every=2)
    pr.finetune(model, DATA, pr.train.penalized(loss, term), steps=4, lr=1e-2, on_step=lambda *_: term.step())
    return {"value": term(model), "model": model}


@cell("proximal steps")
def proximal() -> dict[str, Any]:
    group, single = NET.model(), NET.model()
    for model, strength in ((group, {"group": 2.0}), (single, {"l1": 0.5})):
        optimizer = sgd(model)
        with pr.train.Proximal(model, optimizer, units(model), **strength):
            descend(model, lambda: None, optimizer=optimizer)
    weight = NET.model().get_parameter("8.weight")
    return {
        "group": group,
        "single": single,
        "units": pr.planning.plan_zeros(group, DATA[0]),
        "weights": pr.planning.plan_zeros(single, DATA[0], granularity=pr.Element()),
        "operators": [
            pr.train.soft_threshold(weight, 0.05),
            pr.train.group_soft_threshold(weight, 0.3),
            pr.train.sparse_group_soft_threshold(weight, 0.02, 0.2),
        ],
    }


@cell("half-space steps")
def halfspace() -> dict[str, Any]:
    model = NET.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with pr.train.HalfSpace(model, optimizer, units(model), strength=3.0, start=2):
        descend(model, lambda: None, steps=8, optimizer=optimizer)
    return {"model": model, "plan": pr.planning.plan_zeros(model, DATA[0])}


# -- gates -------------------------------------------------------------------------------------------------------

GATES: dict[str, Callable[[nn.Module, pr.train.CoupledUnits], Any]] = {
    "l0": lambda model, some: pr.train.l0_gates_(model, some, start=0.0),
    "l0 of weights": lambda model, some: pr.train.l0_gates_(model, some, per_weight=True, start=0.0),
    "top movement": lambda model, some: pr.train.top_movement_(model, some, sparsity=0.5),
    "soft movement": lambda model, some: pr.train.soft_movement_(model, some, threshold=0.49),
    "threshold": lambda model, some: pr.train.learned_threshold_(model, some, start=-3.0),
    "variational": lambda model, some: pr.train.variational_dropout_(model, some, start=1.0),
}


@cells("gates", GATES)
def gates(put: Callable[[nn.Module, pr.train.CoupledUnits], Any]) -> dict[str, Any]:
    model = NET.model()
    put(model, units(model))
    training = pr.recovery.Training(
        optimizer=lambda some, lr: torch.optim.Adam(some, lr=lr), lr_schedule=pr.recovery.constant_lr
    )
    pr.finetune(model, DATA, pr.train.penalized(loss, pr.train.gate_penalty, 1e-2), steps=4, lr=0.1, training=training,
                on_step=lambda step, *_: pr.train.step_gates_(model, (step + 1) / 4))  # fmt: skip
    gated = {"penalty": pr.train.gate_penalty(model), "tensors": sorted(map(digest, model.state_dict().values()))}
    return {**gated, "baked": pr.train.merge_gates_(model.eval())}


@cell("target shape")
def shaped() -> dict[str, Any]:
    model = NET.model()
    some = units(model)
    pr.train.l0_gates_(model, some)
    shape = pr.train.TargetShape(some, {"0": 9, "3": 12}, rate=0.3)
    gaps: list[Any] = []
    pr.finetune(model, DATA, pr.train.penalized(loss, shape.penalty), steps=4, lr=0.05,
                on_step=lambda *_: gaps.append(shape.step(model)))  # fmt: skip
    shape.close_(model)
    return {"gaps": gaps, "model": pr.train.merge_gates_(model), "plan": pr.planning.plan_zeros(model, DATA[0])}


# -- lottery tickets ---------------------------------------------------------------------------------------------


def mlp() -> nn.Sequential:
    """With batch normalization and dropout."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(10, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 12), nn.ReLU(),
        nn.Linear(12, 2),
    )  # fmt: skip


def points() -> list[tuple[Tensor, Tensor]]:
    """Points with labels."""
    x = torch.randn(48, 10, generator=torch.Generator().manual_seed(7))
    return list(zip(x.split(8), (x[:, :3].sum(1) > 0).long().split(8), strict=True))


def error(model: nn.Module, batch: Any = None) -> Tensor:
    """Cross entropy, of everything or of a batch."""
    pairs = points() if batch is None else [batch]
    return torch.stack([nn.functional.cross_entropy(model(x), y) for x, y in pairs]).mean()


def spec() -> pr.lottery.TrainingSpec:
    """A training of ten steps."""
    return pr.lottery.TrainingSpec(
        pr.lottery.descent(points(), error, lr=0.05), 10, lambda model: -float(error(model)), seed=3
    )


REWINDS = {
    "weights": pr.lottery.WeightRewind(0),
    "weights of step 4": pr.lottery.WeightRewind(4),
    "rates": pr.lottery.RateRewind(3),
}


@cells("ticket", REWINDS)
def ticket(rewind: Any) -> dict[str, Any]:
    found = pr.lottery.find_ticket(
        mlp(),
        spec(),
        prune=pr.lottery.imp(points()[0][0], rate=0.3),
        rounds=2,
        rewind=rewind,
        controls=pr.lottery.Controls((pr.lottery.Control.REINIT, pr.lottery.Control.SHUFFLE)),
    )
    scores = [[one.kept, one.total, one.score, sorted(map(float, one.controls.values()))] for one in found.rounds]
    return {"ticket": found.ticket, "trained": found.trained, "rounds": scores}


@cell("ticket / instability and barrier")
def connected() -> dict[str, Any]:
    one, other = mlp(), pr.transform.reinitialized(mlp(), seed=4)
    judge = lambda model: float(error(model))  # noqa: E731
    return {
        "instability": pr.lottery.instability(mlp(), spec(), judge, step=2, points=3),
        "barrier": pr.lottery.barrier(mlp(), one.state_dict(), other.state_dict(), judge, points=3),
    }


@cell("ticket / early bird")
def early() -> dict[str, Any]:
    model = NET.model()
    recipe = pr.Recipe(pr.criteria.bn_scale, pr.Channel(), pr.global_)
    bird = pr.lottery.EarlyBird(lambda m: pr.plan(m, DATA[0], recipe, target=pr.Sparsity(0.4)), window=2, eps=0.3)
    drawn: list[Any] = []
    descend(model, lambda: drawn.append(bird.step(model)), steps=4)
    return {"drawn": drawn, "distances": bird.distances}


@cell("ticket / supermask")
def supermask() -> dict[str, Any]:
    model = NET.model()
    scores = pr.lottery.supermask_(model, 0.4, seed=2)
    descend(model, lambda: None, optimizer=torch.optim.SGD(scores, lr=0.5, momentum=0.9))
    return {"scores": scores, "model": pr.lottery.finalize_supermask(model)}
