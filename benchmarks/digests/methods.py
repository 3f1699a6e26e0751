"""Cells of `digests.py` on one small convolutional network: criteria, allocations, searches, compression, metrics."""

from __future__ import annotations

import copy
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.utils.prune as torch_prune
from cells import cell, cells
from models import NETS, loss, outputs
from torch import Tensor, nn

import prunella as pr

NET = NETS[0]
DATA = NET.batches(3)
HALF = pr.Recipe(pr.magnitude, pr.Element(), pr.global_)


def scattered(sparsity: float = 0.7) -> pr.Plan:
    """A plan of scattered zeros."""
    return pr.plan(NET.model(), DATA[0], HALF, target=pr.Sparsity(sparsity))


def sparse_model() -> nn.Module:
    """The network with scattered zeros."""
    return pr.apply_(NET.model(), scattered())


def answers(model: nn.Module) -> Tensor:
    """What the model says to all of the data."""
    return torch.cat([outputs(model, batch)[0] for batch in DATA])


# -- parts of a recipe -------------------------------------------------------------------------------------------

CRITERIA = {
    "activation_norm": pr.criteria.activation_norm,
    "activation_variance": pr.criteria.activation_variance,
    "apoz": pr.criteria.apoz,
    "bn_scale": pr.criteria.bn_scale,
    "fisher": pr.criteria.fisher,
    "fluctuation": pr.criteria.fluctuation,
    "geometric_median": pr.criteria.geometric_median,
    "grasp": pr.criteria.grasp,
    "group_norm": pr.criteria.group_norm,
    "head_importance": pr.criteria.head_importance,
    "hrank": pr.criteria.hrank,
    "inverted magnitude": pr.criteria.inverted(pr.magnitude),
    "magnitude": pr.magnitude,
    "magnitude squared": partial(pr.magnitude, p=2),
    "mfac_saliency": pr.criteria.mfac_saliency,
    "movement": pr.criteria.movement,
    "obd": pr.criteria.obd,
    "obert": partial(pr.criteria.obert, group=2, block=8),
    "obs_saliency": partial(pr.criteria.obs_saliency, block=8),
    "random": pr.criteria.random,
    "ria": pr.criteria.ria,
    "shuffled magnitude": pr.criteria.shuffled(pr.magnitude),
    "snip": pr.criteria.snip,
    "synflow": pr.criteria.synflow,
    "taylor": pr.taylor,
    "taylor_abs": pr.criteria.taylor_abs,
    "taylor_sq": pr.criteria.taylor_sq,
    "wanda": pr.wanda,
}


@cells("criterion of weights", CRITERIA)
def by_weights(criterion: Any) -> pr.Plan:
    recipe = pr.Recipe(criterion, pr.Element(), pr.uniform)
    return pr.plan(NET.model(), DATA[0], recipe, target=pr.Sparsity(0.5), data=DATA, loss=loss)


@cells("criterion of channels", CRITERIA)
def by_channels(criterion: Any) -> pr.Plan:
    recipe = pr.Recipe(criterion, pr.Channel(), pr.uniform)
    return pr.plan(NET.model(), DATA[0], recipe, target=pr.Sparsity(0.4), data=DATA, loss=loss)


GRANULARITIES = {
    "element": pr.Element(),
    "element per row": pr.Element(per_row=True),
    "block": pr.Block(4, 2),
    "vector": pr.granularity.Vector(4),
    "kernel": pr.granularity.Kernel(),
    "filter": pr.granularity.Filter(),
    "kernel pattern": pr.granularity.KernelPattern(4, 4),
    "1:4": pr.NM(1, 4, ragged=True),
    "channel, max": pr.Channel(pr.granularity.Reduce.MAX),
    "channel, mean": pr.Channel(pr.granularity.Reduce.MEAN),
}


@cells("granularity", GRANULARITIES)
def by_granularity(granularity: Any) -> pr.Plan:
    only = ["0", "3"] if isinstance(granularity, pr.granularity.KernelPattern | pr.granularity.Kernel) else []
    fixed = isinstance(granularity, pr.NM | pr.granularity.KernelPattern)
    recipe = pr.Recipe(pr.magnitude, granularity, pr.uniform)
    return pr.plan(NET.model(), DATA[0], recipe, target=None if fixed else pr.Sparsity(0.5), only=only)


ALLOCATIONS = {
    "uniform": pr.uniform,
    "uniform_plus": pr.allocation.uniform_plus,
    "erk": pr.allocation.erk,
    "lamp": pr.allocation.lamp,
    "global": pr.global_,
    "global normalized": partial(pr.global_, normalize=pr.allocation.Normalize.MEAN),
    "global per cost": partial(pr.global_, per_cost=True),
    "isomorphic": pr.allocation.isomorphic,
    "owl": pr.allocation.owl,
    "per_round": partial(pr.allocation.per_round, rate=0.2),
    "fixed": partial(pr.allocation.fixed, shares={"0": 0.2, "3": 0.6, "8": 0.4}),
    "from_scan": pr.allocation.from_scan,
}


@cells("allocation of weights", ALLOCATIONS)
def allocated_weights(allocation: Any) -> pr.Plan:
    recipe = pr.Recipe(pr.magnitude, pr.Element(), allocation)
    return pr.plan(NET.model(), DATA[0], recipe, target=pr.Sparsity(0.6))


@cells("allocation of channels", ALLOCATIONS)
def allocated_channels(allocation: Any) -> pr.Plan:
    recipe = pr.Recipe(pr.criteria.group_norm, pr.Channel(), allocation)
    return pr.plan(NET.model(), DATA[0], recipe, target=pr.MACs(0.5))


@cell("densities and schedules")
def curves() -> dict[str, Any]:
    at = [step / 8 for step in range(9)]
    schedules = (
        pr.schedules.acdc,
        pr.schedules.cosine,
        pr.schedules.cubic,
        pr.schedules.exponential,
        pr.schedules.linear,
        pr.schedules.single_step,
    )
    trace = [0.1, 0.2, 0.1, 0.05]
    return {
        "erk": pr.allocation.erk_densities([(16, 3, 3, 3), (24, 16, 3, 3), (4, 20)], 0.2),
        "schedules": [[schedule(progress) for progress in at] for schedule in schedules],
        "rounds": [
            [one.value for one in pr.schedules.rounds(4, of_survivors=0.2)],
            [x.value for x in pr.schedules.rounds(4, of_all=0.2)],
        ],
        "rates": [
            [rate(progress) for progress in at]
            for rate in (
                pr.recovery.constant_lr,
                pr.recovery.linear_lr,
                pr.recovery.rewind_lr(trace, steps=3),
                pr.recovery.scaled_lr(trace, steps=8),
            )
        ],
        "adaptive_lr": pr.recovery.adaptive_lr(
            dict(NET.model().named_parameters()),
            dict(sparse_model().named_parameters()),
            peak=0.1,
            sparsity=0.7,
            budget=0.5,
        ),
        "rigl_flops": pr.train.rigl_flops(0.1, 1, 100),
        "amc_reward": pr.search.amc_reward(0.2, 1e6),
    }


def by_size(dense: nn.Module, small: nn.Module, *_: Any) -> pr.metrics.Timing:
    """A clock on which parameters are milliseconds."""
    full, size = (float(pr.metrics.count(model).params) for model in (dense, small))
    return pr.metrics.Timing(full, size, size / full, size / full, "by size")


@cell("latency by a clock of one's own")
def timed() -> pr.Plan:
    """A plan for a latency that does not depend on the machine."""
    return pr.plan(NET.model(), DATA[0], pr.Recipe(pr.criteria.group_norm), target=pr.Latency(0.6, measure=by_size))


# -- searches ----------------------------------------------------------------------------------------------------


def channels() -> pr.search.Space:
    """The channels of the network, scored once."""
    return pr.search.space(NET.model(), DATA[0], pr.Recipe(pr.criteria.group_norm))


def found(result: pr.search.SearchResult) -> list[Any]:
    """What a search gives."""
    return [result.shares, result.value, result.cost, result.tried, result.model]


@cell("search / scan and knapsack")
def scanned() -> dict[str, Any]:
    space = channels()
    scan = pr.search.scan(space, pr.search.agreement(space.model, DATA), ratios=(0.25, 0.5, 0.75))
    given = pr.Recipe(pr.criteria.group_norm, allocation=scan.allocation)
    return {
        "scan": [scan.base, scan.curves],
        "plan": pr.plan(NET.model(), DATA[0], given, target=pr.MACs(0.5)),
        "knapsack": found(pr.search.knapsack(space, pr.MACs(0.5), scan)),
        "cheapest": pr.search.cheapest(
            [
                [pr.search.Option(0.0, 3.0), pr.search.Option(2.0, 1.0)],
                [pr.search.Option(0.0, 2.0), pr.search.Option(1.0, 1.5)],
                [pr.search.Option(0.0, 2.0), pr.search.Option(3.0, 0.0)],
            ],
            4.0,
        ),
    }


@cell("search / evolution")
def evolved() -> dict[str, Any]:
    space = channels()
    quality = pr.search.agreement(space.model, DATA)
    front = pr.search.evolve_front(space, pr.MACs, quality, trials=6, seed=1)
    return {
        "best": found(pr.search.evolve(space, pr.MACs(0.6), quality, trials=6)),
        "front": [found(one) for one in front],
    }


@cell("search / netadapt")
def adapted() -> Any:
    space = channels()
    return found(pr.search.netadapt(space, pr.MACs(0.7), pr.search.agreement(space.model, DATA), step=0.15))


@cell("search / pareto")
def compared() -> Any:
    recipes = {"erk": pr.Recipe(pr.magnitude, pr.Element(), pr.allocation.erk)}
    experiment = pr.experiments.ParetoExperiment(
        lambda _: NET.model(), lambda model: -float(answers(model).square().mean()), DATA[0], recipes
    )
    frontier = pr.experiments.pareto(experiment, ratios=(2, 4), seeds=(0,))
    return sorted((point.method, point.ratio, point.mean, point.compression) for point in frontier.points)


# -- weights that change with a plan -----------------------------------------------------------------------------


@cells(
    "optimal brain surgeon",
    {"obs": partial(pr.solvers.obs, damping=1.0), "woodfisher": pr.solvers.woodfisher, "mfac": pr.solvers.mfac},
)
def surgeons(method: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    data = [torch.randn(16, 6) for _ in range(2)]
    plan = pr.plan(model, data[0], HALF, target=pr.Sparsity(0.5))
    solved = method(model, plan, data, loss=loss)
    return {"plan": solved, "model": pr.apply_(model, solved)}


@cell("permutation before 2:4")
def permuted() -> dict[str, Any]:
    done = pr.transform.permute(NET.model(), DATA[0], pr.NM(2, 4), rounds=10)
    plan = pr.plan(done.model, DATA[0], pr.Recipe(pr.magnitude, pr.NM(2, 4)), only=["3", "8", "10"])
    return {"model": done.model, "plan": plan}


# -- compression -------------------------------------------------------------------------------------------------


@cell("compression / integers")
def integers() -> dict[str, Any]:
    model = sparse_model()
    weight = model.get_parameter("8.weight")
    aware = copy.deepcopy(model)
    pr.finetune(aware, DATA, pr.compress.quantization_aware(loss, bits=4), steps=2, lr=1e-3)
    rounded = pr.compress.round_weights_(model, bits=4)
    return {"weight": pr.compress.quantize_weight(weight, bits=8), "rounded": rounded, "model": model, "aware": aware}


@cell("compression / int8 layers")
def int8() -> Any:
    model = sparse_model()
    done = pr.compress.to_int8_(model)
    return {"bytes": done, "outputs": outputs(model, DATA[0])}


@cell("compression / shared values and huffman")
def shared() -> dict[str, Any]:
    model = sparse_model()
    weight = model.get_parameter("8.weight")
    stored = pr.compress.deep_compression_(model, bits=4)
    return {
        "weight": [pr.compress.share_weight(weight, bits=3, start=start, seed=1) for start in pr.compress.CentroidInit],
        "gaps": pr.compress.relative_index(weight != 0, bits=4),
        "code": pr.compress.huffman(torch.arange(64) % 7, symbol_bits=3),
        "stored": stored,
        "model": model,
        "sizes": [
            pr.compress.stored_bytes(weight, form)
            for form in (
                pr.compress.StorageFormat.DENSE,
                pr.compress.StorageFormat.COO,
                pr.compress.StorageFormat.CSR,
                pr.compress.StorageFormat.BSR,
                pr.compress.StorageFormat.BITMASK,
            )
        ],
    }


@cell("compression / low rank")
def thin() -> dict[str, Any]:
    model, factors = pr.compress.low_rank(NET.model(), energy=0.6)
    weight = NET.model().get_parameter("8.weight")
    return {
        "model": model,
        "factors": factors,
        "svd": pr.compress.svd_factors(weight, rank=3),
        "outputs": outputs(model, DATA[0]),
    }


# -- what came from elsewhere, and what goes there ---------------------------------------------------------------


@cell("import of torch's own masks")
def imported() -> dict[str, Any]:
    theirs = NET.model()
    for layer in (theirs.get_submodule("3"), theirs.get_submodule("8")):
        torch_prune.l1_unstructured(layer, "weight", amount=0.6)
    plan = pr.importers.import_plan(NET.model(), DATA[0], theirs)
    return {"module": plan, "state": pr.importers.import_plan(NET.model(), DATA[0], theirs.state_dict()),
            "model": pr.apply_(NET.model(), plan)}  # fmt: skip


@cell("export of a program")
def exported() -> dict[str, Any]:
    small = pr.shrink(NET.model(), pr.plan(NET.model(), DATA[0], target=pr.MACs(0.5)))
    with tempfile.TemporaryDirectory() as folder:
        made = pr.export(small, Path(folder) / "small.pt2", inputs=DATA[0])
        again = torch.export.load(made.path).module()
    with torch.no_grad():
        return {"state": dict(again.state_dict()), "outputs": again(DATA[1])}


@cell("optimizer carried over a cut")
def carried() -> dict[str, Any]:
    model = NET.model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    loss(model, DATA[0]).backward()
    optimizer.step()
    plan = pr.plan(model, DATA[0], target=pr.MACs(0.5))
    small = pr.shrink(model, plan)
    pr.transform.carry_(optimizer, model, small, plan)
    optimizer.zero_grad()
    loss(small, DATA[1]).backward()
    optimizer.step()
    return {"model": small, "moments": [optimizer.state[parameter] for parameter in small.parameters()]}


@cell("sparse kernels")
def kernels() -> dict[str, Any]:
    """Which layers run which kernel is a matter of the clock; that they compute the same is not."""
    model = sparse_model()
    made = pr.sparse(model, DATA[0], seconds=0.01)
    seen = pr.runtime.sparsified(made)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        pr.runtime.save_sparse(made, Path(folder) / "sparse", factory=NET.model)
        again = pr.runtime.load_sparse(Path(folder) / "sparse", factory=NET.model, seconds=0.01)
        near = [torch.allclose(one(DATA[0]), model(DATA[0]), atol=1e-4) for one in (made, again)]
    return {"layers": [(layer.name, layer.sparsity) for layer in seen.layers], "near": near}


# -- metrics -----------------------------------------------------------------------------------------------------


@cell("metrics / outputs")
def metrics() -> dict[str, Any]:
    dense, model = NET.model(), sparse_model()
    labels = torch.arange(12) % 4
    one, other = answers(dense), answers(model)
    votes = torch.tensor([[0, 1, 2], [0, 1, 2], [1, 1, 0]]), torch.tensor([[0, 2, 2], [0, 2, 1], [0, 2, 2]])
    pairs = [(batch, labels[:4]) for batch in DATA]
    return {
        "flips": pr.metrics.flip_rate(one, other),
        "divergence": pr.metrics.kl_divergence(one, other),
        "calibration": [pr.metrics.calibration_error(other, labels, bins=5, adaptive=flag) for flag in (False, True)],
        "classes": pr.metrics.per_class_drop(one, other, labels),
        "exemplars": pr.metrics.pruning_identified_exemplars(*votes),
        "effects": pr.metrics.side_effects(dense, model, pairs, corruptions=("gaussian noise", "blur"), severity=2),
    }


@cell("metrics / size and reach")
def sizes() -> dict[str, Any]:
    dense, model = NET.model(), pr.apply_(NET.model(), scattered(0.97))
    reach = pr.metrics.effective_sparsity(model, DATA[0])
    return {
        "compression": pr.metrics.compression_ratio(dense, model),
        "reach": [reach.direct, reach.effective, reach.masks],
        "macs": pr.metrics.effective_macs(model, DATA[0]),
        "count": [pr.metrics.count(model), pr.metrics.count(model, scope="parameters")],
        "collapsed": sorted(pr.transform.collapsed(model)),
    }


@cell("metrics / report")
def reported() -> list[Any]:
    plan = pr.plan(NET.model(), DATA[0], target=pr.MACs(0.5))
    made = pr.report(NET.model(), pr.shrink(NET.model(), plan), DATA[0], plan=plan, rounds=5)
    return [made.difference, len(made.layers), len(made.widths), len(made.frozen)]


@cell("controls")
def controls() -> dict[str, Any]:
    plan = scattered()
    return {
        "plan": pr.transform.shuffled_plan(plan, seed=2),
        "model": pr.transform.reinitialized(NET.model(), seed=2),
        "reinit": pr.lottery.reinit_(sparse_model(), 3),
        "shuffle": pr.lottery.shuffle_masks_(sparse_model(), 3),
        "distance": pr.lottery.mask_distance(plan.masks, pr.transform.shuffled_plan(plan, seed=2).masks),
    }
