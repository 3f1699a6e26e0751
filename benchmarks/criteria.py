"""Every criterion on ResNet-20 for CIFAR-10 under the same budgets: one shot, and after a few steps of fine-tuning.

    python benchmarks/criteria.py [--quick] [--seeds 3] [--steps 10] [--part masks] [--only magnitude ...]

Three parts: single weights under masks, compressed 2, 4, 8, 16 and 32 times; channels, at five fractions of the
multiply-adds; residual blocks, one to four of them, since every stage keeps one. Masks and channels have a uniform
allocation, so that nothing but the order that a criterion gives decides; blocks are ranked together. Data for criteria
are 256 training images, other ones for each seed. A cell (part, criterion, ratio, seed) is a file written at once when
it is done; a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from statistics import mean, stdev

import torch
from images import missing, read_packed
from resnet import pretrained, weights_name
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from training import accuracy, batches, fine_tune

import prunella as pr
from prunella.registry.catalogue import methods
from prunella.registry.controlled import name_of

EXAMPLE = torch.zeros(1, 3, 32, 32)
RESULTS = Path(__file__).parent / "results"
CELLS = RESULTS / "cells"
BATCH = 64
BLOCKS = 7
"""Residual blocks of ResNet-20 that keep the shape of the stream."""
RATIOS: dict[str, tuple[float, ...]] = {
    "masks": (2, 4, 8, 16, 32),
    "channels": (0.8, 0.65, 0.5, 0.35, 0.25),
    "blocks": (1, 2, 3, 4),
}
HEADS = {"masks": "{:g}x smaller", "channels": "{:.0%} of the MACs", "blocks": "{:g} blocks pruned"}
ONLY_BLOCKS = {"block_influence"}
ONLY_UNITS = {"bn_scale", "geometric_median", "group_norm", "apoz", "hrank", "activation_norm", "activation_variance"}
NOT_HERE = {
    "head_importance": "the same as taylor_abs without its rescaling, and there are no heads",
    **dict.fromkeys(("router_frequency", "router_weight", "reap"), "there are no experts"),
}

Criterion = Callable[..., Tensor]


@dataclass(frozen=True)
class Cell:
    """One plan: accuracies in percent before and after fine-tuning, or why there is none."""

    part: str
    criterion: str
    ratio: float
    seed: int
    steps: int
    test_images: int
    seconds: float = 0.0
    before: float = 0.0
    after: float = 0.0
    note: str = ""

    @property
    def file(self) -> str:
        """Where it is kept: everything that it depends on is in the name."""
        return f"{self.part}-{self.criterion}-{self.ratio:g}-s{self.seed}-{self.steps}-{self.test_images}.json"


def criteria(part: str) -> dict[str, Criterion]:
    """All registered criteria that can score the units of a part, and the controls of magnitude."""
    found = {m.name: m.function for m in methods() if m.kind == "criterion" and m.name not in NOT_HERE}
    no = {"masks": ONLY_BLOCKS | ONLY_UNITS, "channels": ONLY_BLOCKS, "blocks": ONLY_UNITS}[part]
    for control in (pr.criteria.inverted(pr.magnitude), pr.criteria.shuffled(pr.magnitude)):
        found[name_of(control)] = control
    return {name: found[name] for name in sorted(found) if name not in no}


def recipe(cell: Cell) -> tuple[pr.Recipe, object]:
    """Recipe and target of a cell. oBERT's groups of four are pruned as groups of four."""
    criterion = criteria(cell.part)[cell.criterion]
    if cell.part == "masks":
        granularity: pr.Block | pr.Element = pr.Block(1, 4) if cell.criterion == "obert" else pr.Element()
        return pr.Recipe(criterion, granularity, seed=cell.seed), pr.Sparsity(1 - 1 / cell.ratio)
    if cell.part == "channels":
        return pr.Recipe(criterion, seed=cell.seed), pr.MACs(cell.ratio)
    whole = pr.Recipe(criterion, pr.Depth(pr.granularity.Reduce.MEAN), pr.global_, seed=cell.seed)
    return whole, pr.Sparsity(cell.ratio / BLOCKS)


def measure(cell: Cell) -> Cell:
    """Plan, test, fine-tune, test."""
    train, test = pictures(max(BATCH * cell.steps, 4096), cell.test_images)
    calibration = list(batches(*train, steps=2, batch=128, seed=1000 + cell.seed))
    dense = pretrained(20)
    asked, target = recipe(cell)
    start = time.perf_counter()
    try:
        plan = pr.plan(dense, EXAMPLE, asked, target=target, data=calibration, loss=_loss, skip=SKIP[cell.part])
    except pr.PruningError as error:
        return Cell(**{**asdict(cell), "note": str(error).splitlines()[0]})
    seconds = time.perf_counter() - start
    small = pr.shrink(dense, plan).to(memory_format=torch.channels_last)  # trains 1.4 times as fast on a CPU
    before = accuracy(small, *test)
    fine_tune(small, *train, steps=cell.steps, batch=BATCH, rate=0.02, seed=cell.seed, guard=pr.Pruner)
    return Cell(**{**asdict(cell), "seconds": seconds, "before": before, "after": accuracy(small, *test)})


SKIP: dict[str, Sequence[str]] = {"masks": ["conv1", "linear"], "channels": (), "blocks": ()}


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return cross_entropy(model(batch[0]), batch[1])


@cache
def pictures(train: int, test: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and test images."""
    return read_packed("cifar10_train.npz", stop=train), read_packed("cifar10_test.npz", stop=test)


def settled(cell: Cell, folder: Path) -> Cell:
    """The cell from its file, or measured and written: under another name first, so that no half file is ever read."""
    path = folder / cell.file
    if path.is_file():
        return Cell(**json.loads(path.read_text()))
    done = measure(cell)
    aside = path.with_suffix(f".{os.getpid()}")
    aside.write_text(json.dumps(asdict(done), indent=1) + "\n")
    os.replace(aside, path)
    print(done, flush=True)
    return done


def cells(options: argparse.Namespace) -> Iterator[Cell]:
    """Everything that is asked for, a seed at a time, so that a stopped run has whole columns."""
    for seed in range(options.seeds):
        for part in options.part or RATIOS:
            for name in criteria(part):
                for ratio in RATIOS[part] if not options.quick else RATIOS[part][:1]:
                    if not options.only or name in options.only:
                        yield Cell(part, name, ratio, seed, options.steps, options.test_images)


def table(done: Sequence[Cell]) -> str:
    """A Markdown table for each part: before -> after fine-tuning, mean and standard deviation over seeds."""
    lines = []
    for part in dict.fromkeys(cell.part for cell in done):
        mine = [cell for cell in done if cell.part == part]
        ratios = list(dict.fromkeys(cell.ratio for cell in mine))
        seeds = len({cell.seed for cell in mine})
        about = f"{seeds} seeds, {mine[0].steps} steps of {BATCH} images, {mine[0].test_images} test images."
        lines += [f"### Criteria, {part}", "", f"{about} One shot / after fine-tuning, top-1 in percent.", ""]
        lines += [f"| criterion | {' | '.join(HEADS[part].format(ratio) for ratio in ratios)} | seconds to plan |"]
        lines += ["|---" * (len(ratios) + 2) + "|"]
        for name in dict.fromkeys(cell.criterion for cell in mine):
            rows = [[c for c in mine if c.criterion == name and c.ratio == ratio] for ratio in ratios]
            shown = [f"{_spread([c.before for c in row])} / {_spread([c.after for c in row])}"
                     if row and not any(c.note for c in row) else "-" for row in rows]  # fmt: skip
            seconds = mean(c.seconds for c in mine if c.criterion == name)
            lines.append(f"| {name} | {' | '.join(shown)} | {seconds:.1f} |")
        notes = sorted({f"- {c.criterion}: {c.note}" for c in mine if c.note})
        lines += ["", *notes, ""] if notes else [""]
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{mean(values):.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def main() -> None:
    """Run what is not done yet, print the tables, and write them beside this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, one ratio, few steps: to see that it runs")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help=f"of fine-tuning, {BATCH} images each")
    parser.add_argument("--test-images", type=int, default=1000)
    parser.add_argument("--part", nargs="*", choices=list(RATIOS), help="some parts alone")
    parser.add_argument("--only", nargs="*", help="some criteria alone")
    parser.add_argument("--table", action="store_true", help="only write the tables from the cells that there are")
    parser.add_argument("--cells", type=Path, default=CELLS, help="folder of the finished cells")
    options = parser.parse_args()
    absent = missing("cifar10_train.npz", "cifar10_test.npz", weights_name(20))
    if absent:
        print(f"the benchmark data is not here ({', '.join(absent)}); set PRUNELLA_DATA to the folder that holds it")
        return
    if options.quick:
        options.seeds, options.steps, options.test_images = 1, 2, 500
    options.cells.mkdir(parents=True, exist_ok=True)
    asked = [cell for cell in cells(options) if not options.table or (options.cells / cell.file).is_file()]
    done = [settled(cell, options.cells) for cell in asked]
    text = table(done)
    print(text, flush=True)
    if not options.quick and not options.only and not options.part:
        (RESULTS / "criteria.md").write_text(text + "\n")
        about = {"torch": torch.__version__, "rows": [asdict(cell) for cell in done]}
        (RESULTS / "criteria.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
