"""prunella against Torch-Pruning 1.6.1 on ResNet-20 and ResNet-56 for CIFAR-10; then prunella alone on Lite0.

    python benchmarks/compare.py [--quick]

Same pretrained weights, same MACs (torch's own counter is the referee), same fine-tuning batches, three seeds. Accuracy
is on the first 2,000 test images; calibration and fine-tuning see training images only. Latency is measured
interleaved, one image at a time and 64 at a time, as a ratio to the dense network.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import torch
from images import missing, read_packed
from lite0 import lite0_table
from resnet import CifarResNet, pretrained, weights_name
from rival import Importance, rival_cut
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from training import accuracy, batches, count_macs, count_params, fine_tune

import prunella as pr
from prunella.measure.timing import compare_latency

EXAMPLE = torch.zeros(1, 3, 32, 32)
BUDGET = 0.5
STEPS = {20: 60, 56: 30}
STREAM = ["conv1", "*.conv2"]
"""Layers that write into the residual stream."""
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Outcome:
    """One method, one seed."""

    method: str
    depth: int
    seed: int
    seconds: float
    macs: int
    params: int
    before: float
    after: float
    note: str = ""


@dataclass(frozen=True)
class Setting:
    """What all methods of one run share."""

    depth: int
    seed: int
    steps: int
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    calibration: list[tuple[Tensor, Tensor]]


Method = Callable[[CifarResNet, Setting], tuple[nn.Module, str]]


def ours(
    dense: CifarResNet,
    setting: Setting,
    *,
    criterion: Callable[..., Tensor],
    inner: bool = False,
    recover: bool = False,
) -> tuple[nn.Module, str]:
    """prunella: joint ranking to the budget.

    inner: keep the residual stream dense, as Torch-Pruning has to. recover: least squares without labels before the
    fine-tuning.
    """
    recipe = pr.Recipe(
        criterion=criterion, allocation=partial(pr.global_, normalize=pr.allocation.Normalize.MEAN), seed=setting.seed
    )
    plan = pr.plan(
        dense, EXAMPLE, recipe, target=pr.MACs(BUDGET), data=setting.calibration, loss=_loss, skip=STREAM * inner
    )
    small = pr.shrink(dense, plan)
    if recover:
        pr.reconstruct(small, dense, [x for x, _ in setting.calibration[:2]], plan)
    return small, ""


def theirs(dense: CifarResNet, setting: Setting, *, importance: Importance) -> tuple[nn.Module, str]:
    """Torch-Pruning to the same number of MACs."""
    budget = BUDGET * count_macs(dense, EXAMPLE)
    spare = [name for name, _ in dense.named_modules() if any(fnmatchcase(name, pattern) for pattern in STREAM)]
    cut = rival_cut(dense, EXAMPLE, budget=budget, importance=importance, data=setting.calibration, spare=spare)
    return cut.model, cut.scope


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


METHODS: dict[str, Method] = {
    "prunella, group norm": partial(ours, criterion=pr.criteria.group_norm),
    "prunella, group norm, inner layers": partial(ours, criterion=pr.criteria.group_norm, inner=True),
    "Torch-Pruning, group norm": partial(theirs, importance="group_norm"),
    "prunella, Taylor": partial(ours, criterion=pr.taylor),
    "prunella, Taylor, inner layers": partial(ours, criterion=pr.taylor, inner=True),
    "Torch-Pruning, Taylor": partial(theirs, importance="taylor"),
    "prunella, Taylor, recovered first": partial(ours, criterion=pr.taylor, recover=True),
}


def _methods(depth: int) -> list[str]:
    """The methods at that depth. The deep one goes without least squares, a pass over the data for each layer."""
    return [method for method in METHODS if depth == 20 or "recovered" not in method]


def one(method: str, setting: Setting) -> tuple[Outcome, nn.Module]:
    """Prune, test, fine-tune, test."""
    dense = pretrained(setting.depth)
    start = time.perf_counter()
    small, note = METHODS[method](dense, setting)
    seconds = time.perf_counter() - start
    macs, params = count_macs(small, EXAMPLE), count_params(small)
    before = accuracy(small, *setting.test)
    cut = copy.deepcopy(small)
    fine_tune(small, *setting.train, steps=setting.steps, batch=128, rate=0.02, seed=setting.seed)
    after = accuracy(small, *setting.test)
    return Outcome(method, setting.depth, setting.seed, seconds, macs, params, before, after, note), cut


def latency(models: dict[str, nn.Module], batch: int, rounds: int) -> dict[str, str]:
    """Speed-up of each model over the first, with its 95 % interval, all measured in turn."""
    x = torch.randn(batch, 3, 32, 32)

    def runner(model: nn.Module) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with torch.inference_mode():
                return model(x)

        return run

    found = compare_latency({name: runner(model.eval()) for name, model in models.items()}, rounds=rounds)
    others = list(models)[1:]
    return {n: f"{r.value:.2f} [{r.low:.2f}, {r.high:.2f}]" for n, r in zip(others, found.ratios, strict=True)}


def depth_table(depth: int, seeds: int, steps: int, test_images: int) -> tuple[list[Outcome], str]:
    """All methods on one network."""
    train = read_packed("cifar10_train.npz", stop=max(128 * steps, 4096))
    test = read_packed("cifar10_test.npz", stop=test_images)
    outcomes: list[Outcome] = []
    models: dict[str, nn.Module] = {"dense": pretrained(depth)}
    for seed in range(seeds):
        calibration = list(batches(*train, steps=4, batch=128, seed=1000 + seed))
        for method in _methods(depth):
            outcome, small = one(method, Setting(depth, seed, steps, train, test, calibration))
            outcomes.append(outcome)
            models.setdefault(method, small)
            print(f"ResNet-{depth} seed {seed} {method}: {outcome}", flush=True)
    dense = accuracy(models["dense"], *test)
    single, many = latency(models, 1, 60), latency(models, 64, 20)
    lines = [
        f"### ResNet-{depth}: dense {dense:.2f} %, {count_macs(models['dense'], EXAMPLE) / 1e6:.1f} M MACs",
        "",
        f"{seeds} seeds, {steps} fine-tuning steps of 128 images, {test_images} test images.",
        "",
        "| method | MACs | parameters | accuracy before | after fine-tuning "
        "| speed-up, 1 image | 64 images | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method in _methods(depth):
        mine = [o for o in outcomes if o.method == method]
        lines.append(
            f"| {method} | {mean(o.macs for o in mine) / 1e6:.1f} M | {mean(o.params for o in mine) / 1e3:.0f} k "
            f"| {_spread([o.before for o in mine])} | {_spread([o.after for o in mine])} "
            f"| {single[method]} | {many[method]} | {mean(o.seconds for o in mine):.1f} |"
        )
    notes = sorted({f"{o.method}: {o.note}" for o in outcomes if o.note})
    return outcomes, "\n".join([*lines, "", *(f"- {note}" for note in notes)])


def _spread(values: list[float]) -> str:
    return f"{mean(values):.2f} ± {stdev(values):.2f}" if len(values) > 1 else f"{values[0]:.2f}"


def main() -> None:
    """Run, print the tables, and write them beside this file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, few steps: to see that it runs")
    parser.add_argument("--only", choices=["20", "56", "lite0"], help="one part alone")
    options = parser.parse_args()
    absent = missing("cifar10_train.npz", "cifar10_test.npz", *(weights_name(d) for d in (20, 56)))
    if absent:
        print(f"the benchmark data is not here ({', '.join(absent)}); set PRUNELLA_DATA to the folder that holds it")
        return
    RESULTS.mkdir(exist_ok=True)
    seeds, test_images = (1, 1000) if options.quick else (3, 2000)
    for depth in (20, 56):
        if options.only in (None, str(depth)):
            steps = 10 if options.quick else STEPS[depth]
            outcomes, table = depth_table(depth, seeds, steps, test_images)
            _write(f"resnet{depth}", table, [asdict(o) for o in outcomes], options.quick)
    if options.only in (None, "lite0"):
        rows, table = lite0_table(quick=options.quick)
        _write("lite0", table, rows, options.quick)


def _write(name: str, table: str, rows: list[dict[str, object]], quick: bool) -> None:
    print(table, flush=True)
    if not quick:
        (RESULTS / f"{name}.md").write_text(table + "\n")
        about = {"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows}
        (RESULTS / f"{name}.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
