"""Lottery tickets in LeNet-300-100 on MNIST: tickets against re-initialized and shuffled controls, down to 3.6 %.

    python benchmarks/tickets.py               # three seeds, about 20 core-minutes; goes on where it was stopped
    python benchmarks/tickets.py --quick       # one seed, two rounds, half a minute

One JSON file a seed goes to `results/tickets/`, the table to `results/tickets.md`. The weights of every round are kept
under `--work`, from where a run that was killed goes on with the same bits.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from cells import RESULTS, once, spread, write
from mnist import Digits, accuracy, lenet, load, loss
from torch import Tensor, nn

import prunella as pr

LR, BATCH = 1.2e-3, 100
REPORTED = (1, 3, 7, 9, 12, 15)


class Shuffled:
    """Batches in an order from torch's global generator, so that rewinding it rewinds the order."""

    def __init__(self, data: Digits) -> None:
        self.data = data

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.data.train_y))
        for chosen in order[: len(order) // BATCH * BATCH].split(BATCH):
            yield self.data.train_x[chosen], self.data.train_y[chosen]


def spec(data: Digits, *, epochs: int, seed: int) -> pr.lottery.TrainingSpec:
    """Adam at 0.0012, as in the paper, with batches of 100."""

    def train(model: nn.Module, session: pr.lottery.Session) -> None:
        optimizer = torch.optim.Adam(model.parameters(), lr=LR)
        for one in session.steps(Shuffled(data), optimizer):
            optimizer.zero_grad(set_to_none=True)
            loss(model, one).backward()
            optimizer.step()

    steps = epochs * (len(data.train_y) // BATCH)
    return pr.lottery.TrainingSpec(train, steps, lambda model: accuracy(model, data), seed=seed)


def cell(data: Digits, seed: int, *, epochs: int, rounds: int, work: Path) -> dict[str, Any]:
    """One seed: every round's density and accuracy, and those of the controls."""
    start = time.process_time()
    reported = tuple(k for k in REPORTED if k <= rounds)
    found = pr.lottery.find_ticket(
        lenet(seed),
        spec(data, epochs=epochs, seed=seed),
        prune=pr.lottery.imp(data.train_x[:1]),
        rounds=rounds,
        controls=pr.lottery.Controls(rounds=reported),
        folder=work / f"seed-{seed}-{epochs}",
    )
    rows = [
        {
            "round": one.number,
            "density": one.density,
            "ticket": one.score,
            **{kind.value: score for kind, score in one.controls.items()},
        }
        for one in found.rounds
    ]
    return {"seed": seed, "epochs": epochs, "seconds": time.process_time() - start, "rows": rows}


def table(cells: list[dict[str, Any]]) -> str:
    """The cells as Markdown."""
    count = sum(len(one["rows"]) for one in cells)
    lines = [
        f"LeNet-300-100 on MNIST, test accuracy in percent, mean ± deviation of {len(cells)} seeds; "
        f"{cells[0]['epochs']} epochs of Adam in each of the {count} rounds and of the controls. "
        "Made by `python benchmarks/tickets.py`.",
        "",
        "| round | weights left | ticket | re-initialized | mask shuffled |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]
    for index, row in enumerate(cells[0]["rows"]):
        rows = [one["rows"][index] for one in cells]
        parts = [spread([r[key] for r in rows]) if key in row else "" for key in ("ticket", "reinit", "shuffle")]
        lines.append(f"| {row['round']} | {100 * row['density']:.2f} % | {' | '.join(parts)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Make what is missing, then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, two rounds, one epoch, part of the data")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "prunella-tickets")
    options = parser.parse_args()
    torch.set_num_threads(1)
    name, seeds, rounds, epochs = "tickets", (0, 1, 2), 15, options.epochs
    if options.quick:
        name, seeds, rounds, epochs = "tickets-quick", (0,), 2, 1
    data = load(train=6000 if options.quick else None)
    work = options.work / ("quick" if options.quick else "full")
    cells = []
    for seed in seeds:
        file = RESULTS / name / f"seed-{seed}.json"
        cells.append(once(file, lambda seed=seed: cell(data, seed, epochs=epochs, rounds=rounds, work=work)))
        print(f"seed {seed}: {cells[-1]['seconds']:.0f} s of one core")
    text = table(cells)
    write(RESULTS / f"{name}.md", text)
    print(text)


if __name__ == "__main__":
    main()
