"""Pruning before training: SNIP, GraSP, SynFlow, magnitude and random on LeNet-300-100 and MNIST.

    python benchmarks/at_init.py [--quick]

Six densities, three seeds. Every cell is a JSON file in `benchmarks/results/at_init`, written when done, so that a
run that was stopped goes on; the table of all cells found is written beside it. `--quick`: one seed, two densities and
a twelfth of the images, in a folder of its own.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev

import mnist
import torch
from torch import nn

import prunella as pr
from prunella.io.files import write_atomic

RESULTS = Path(__file__).parent / "results"
DENSITIES = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01)
SEEDS = (0, 1, 2)
Cut = Callable[[nn.Module, mnist.Digits, pr.Sparsity, int], pr.Plan]


@dataclass(frozen=True)
class Cell:
    """One training. accuracy: percent on the test images. layers: weights that each layer keeps."""

    method: str
    density: float
    seed: int
    accuracy: float
    layers: list[int]
    collapsed: list[str]


def by(criterion: Callable[..., torch.Tensor]) -> Cut:
    """One ranking over all layers, in one step, on a thousand images; layers may empty."""

    def cut(model: nn.Module, data: mnist.Digits, target: pr.Sparsity, seed: int) -> pr.Plan:
        recipe = pr.Recipe(criterion, pr.Element(), pr.global_, seed=seed, min_units=0)
        batches = list(zip(data.train_x[:1000].split(200), data.train_y[:1000].split(200), strict=True))
        return pr.plan(model, data.train_x[:2], recipe, target=target, data=batches, loss=mnist.loss)

    return cut


METHODS: dict[str, Cut] = {
    "snip": by(pr.criteria.snip),
    "grasp": by(pr.criteria.grasp),
    "synflow, 100 rounds": lambda model, data, target, seed: pr.planning.synflow_rounds(
        model, data.train_x[:2], target=target
    ),
    "magnitude": by(pr.magnitude),
    "random": by(pr.criteria.random),
}


def run(method: str, density: float, seed: int, data: mnist.Digits, epochs: int) -> Cell:
    """Prune at initialization, train under the mask, test."""
    model = mnist.lenet(seed)
    plan = METHODS[method](model, data, pr.Sparsity(1 - density), seed)
    pr.apply_(model, plan)

    def masked(net: nn.Module, optimizer: torch.optim.Optimizer) -> mnist.Hook:
        pr.Pruner(net, optimizer)
        return lambda step: None

    mnist.train(model, data, epochs=epochs, seed=seed, setup=masked)
    pr.finalize(model)
    kept = [row.kept for row in plan.rows]
    return Cell(method, density, seed, mnist.accuracy(model, data), kept, list(pr.transform.collapsed(plan)))


def table(cells: list[Cell]) -> str:
    """Mean and deviation of the accuracy by method and density; how many seeds have an empty layer."""
    densities = sorted({cell.density for cell in cells}, reverse=True)
    head = [f"{100 * d:g} %" for d in densities]
    lines = ["| method | " + " | ".join(head) + " |", "| --- |" + " ---: |" * len(head)]
    for method in METHODS:
        texts = [_text([c for c in cells if (c.method, c.density) == (method, d)]) for d in densities]
        lines.append(f"| {method} | " + " | ".join(texts) + " |")
    note = "Test accuracy in percent, mean and standard deviation over seeds; (n empty): seeds with an emptied layer."
    return "\n".join([*lines, "", note, ""])


def _text(cells: list[Cell]) -> str:
    if not cells:
        return ""
    values = [cell.accuracy for cell in cells]
    spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    empty = sum(bool(cell.collapsed) for cell in cells)
    return f"{mean(values):.2f}{spread}" + (f" ({empty} empty)" if empty else "")


def main() -> None:
    """Fill in the cells that are missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--epochs", type=int, default=10)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    name = "at_init_quick" if asked.quick else "at_init"
    folder = RESULTS / name
    folder.mkdir(parents=True, exist_ok=True)
    data = mnist.load(train=5000 if asked.quick else None)
    cells = []
    for seed in SEEDS[:1] if asked.quick else SEEDS:
        for density in (0.1, 0.01) if asked.quick else DENSITIES:
            for method in METHODS:
                file = folder / f"{method.split(',')[0]}-{density:g}-{seed}.json"
                if not file.is_file():
                    cell = run(
                        method, density, seed, data, math.ceil(asked.epochs / 5) if asked.quick else asked.epochs
                    )
                    text = json.dumps(asdict(cell), indent=1)
                    write_atomic(file, lambda place, text=text: Path(place).write_text(text, encoding="utf-8"))
                cells.append(Cell(**json.loads(file.read_text(encoding="utf-8"))))
                print(f"{method:20} density {density:<5g} seed {seed}: {cells[-1].accuracy:.2f} %", flush=True)
    (RESULTS / f"{name}.md").write_text(table(cells), encoding="utf-8")
    print(table(cells))


if __name__ == "__main__":
    main()
