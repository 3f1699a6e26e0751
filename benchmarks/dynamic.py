"""Dynamic sparse training of LeNet-300-100 on MNIST at 98 and 99 % sparsity: RigL and SET against static masks.

    python benchmarks/dynamic.py               # three seeds, about 15 core-minutes; goes on where it was stopped
    python benchmarks/dynamic.py --quick       # one seed, part of the data, half a minute

One JSON file a cell goes to `results/dynamic/`, the table to `results/dynamic.md`. All start from the same random masks
with densities by Erdos-Renyi; GraNet alone starts at half density. Masks move until three quarters of the training.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from typing import Any

import torch
from cells import RESULTS, once, spread, write
from mnist import Digits, Hook, accuracy, lenet, load, train
from torch import nn
from torch.optim import Optimizer

import prunella as pr
from prunella.planning.recipes import erk_random

SPARSITIES = (0.98, 0.99)
METHODS = ("static", "set", "rigl", "sparse_momentum", "granet")
EVERY = 100


def rule(method: str, sparsity: float) -> pr.train.Rule:
    """The rule of a method with its usual settings."""
    made = {"set": pr.train.set_, "rigl": pr.train.rigl, "sparse_momentum": pr.train.sparse_momentum}
    return pr.train.granet(final=sparsity) if method == "granet" else made[method]()


def cell(data: Digits, method: str, sparsity: float, seed: int, *, epochs: int, every: int = EVERY) -> dict[str, Any]:
    """One training: accuracy, active weights, and how much of the network was ever active."""
    start = time.process_time()
    model = lenet(seed)
    if method != "dense":
        first = 0.5 if method == "granet" else sparsity
        recipe = erk_random()
        recipe = pr.Recipe(recipe.criterion, recipe.granularity, recipe.allocation, seed=seed)
        pr.apply_(model, pr.plan(model, data.train_x[:1], recipe, target=pr.Sparsity(first)))
    loops: list[pr.train.DropGrow] = []

    def setup(net: nn.Module, optimizer: Optimizer) -> Hook:
        if method in ("dense", "static"):
            pr.Pruner(net, optimizer)
            return lambda step: None
        steps = 3 * epochs * (len(data.train_y) // 100) // 4
        how = rule(method, sparsity)
        loops.append(
            pr.train.DropGrow(net, optimizer, rule=how, steps=steps, every=every, layers=["*.weight"], seed=seed)
        )
        return lambda step: loops[0].step()

    train(model, data, epochs=epochs, seed=seed, setup=setup)
    total = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    kept = total - sum(int((~mask).sum()) for mask in pr.masks_of(model).values())
    explored = loops[0].explored if loops else kept / total
    return {
        "method": method,
        "sparsity": sparsity,
        "seed": seed,
        "epochs": epochs,
        "accuracy": accuracy(model, data),
        "kept": kept,
        "explored": explored,
        "seconds": time.process_time() - start,
    }


def table(cells: list[dict[str, Any]]) -> str:
    """The cells as Markdown."""
    seeds = len({one["seed"] for one in cells})
    lines = [
        f"LeNet-300-100 on MNIST, test accuracy in percent, mean ± deviation of {seeds} seeds, {cells[0]['epochs']} "
        "epochs of SGD each. `R_s`: part of the weights that was active at some time. Made by "
        "`python benchmarks/dynamic.py`.",
        "",
        "| method | sparsity | weights left | accuracy | R_s |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for key in dict.fromkeys((one["method"], one["sparsity"]) for one in cells):
        mine = [one for one in cells if (one["method"], one["sparsity"]) == key]
        explored = sum(one["explored"] for one in mine) / len(mine)
        numbers = (
            f"{100 * key[1]:g} % | {mine[0]['kept']} | {spread([one['accuracy'] for one in mine])} | {explored:.2f}"
        )
        lines.append(f"| {key[0]} | {numbers} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Make what is missing, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, two epochs, part of the data")
    parser.add_argument("--epochs", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    name, seeds, epochs, every = "dynamic", (0, 1, 2), options.epochs, EVERY
    if options.quick:
        name, seeds, epochs, every = "dynamic-quick", (0,), 4, 20
    data = load(train=12_000 if options.quick else None)
    cells = []
    for method, sparsity in (("dense", 0.0), *((method, s) for s in SPARSITIES for method in METHODS)):
        for seed in seeds:
            file = RESULTS / name / f"{method}-{100 * sparsity:g}-{seed}.json"
            make = partial(cell, data, method, sparsity, seed, epochs=epochs, every=every)
            cells.append(once(file, make))
            last = cells[-1]
            print(f"{method} {sparsity:g} seed {seed}: {last['accuracy']:.2f} % in {last['seconds']:.0f} s", flush=True)
    text = table(cells)
    write(RESULTS / f"{name}.md", text)
    print(text)


if __name__ == "__main__":
    main()
