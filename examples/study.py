"""A researcher's study: a criterion of one's own, baselines, seeds, a page, CSV and LaTeX. Two minutes."""

from __future__ import annotations

from functools import partial

from parts import accuracy, batches, digits, loss, network, options, train
from torch import Tensor

import prunella as pr


def surprise(weight: Tensor, input_norm: Tensor, grad: Tensor) -> Tensor:
    """The criterion that is proposed: magnitude, input and gradient in one product."""
    return weight.abs() * input_norm * grad.abs()


def main() -> None:
    given = options(__doc__)
    data, test = digits()
    recipes = {
        "surprise": pr.Recipe(surprise, pr.Element(), pr.global_),
        "taylor": pr.Recipe(pr.criteria.taylor_abs, pr.Element(), pr.global_),
    }
    experiment = pr.experiments.ParetoExperiment(
        lambda seed: train(network(seed), data, 1 if given.quick else 8), partial(accuracy, data=test),
        batches(data)[0][0], recipes, data=batches(data)[:8], loss=loss,
    )  # fmt: skip
    ratios, seeds = ((4.0,), (0,)) if given.quick else ((4.0, 10.0, 20.0), (0, 1, 2))
    frontier = pr.experiments.pareto(
        experiment, given.out / "study", ratios=ratios, seeds=seeds,
        on_cell=lambda cell, n, total: print(f"{n} of {total}: {cell.method}, {cell.ratio:g}x, seed {cell.seed}"),
    )  # fmt: skip
    (given.out / "study.csv").write_text(frontier.csv())
    (given.out / "study.tex").write_text(frontier.latex())
    print(frontier)
    print(f"curves in {given.out / 'study' / 'pareto.html'}")


if __name__ == "__main__":
    main()
