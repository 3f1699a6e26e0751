"""Which layers are sensitive, which budget is worth it, which method is best: scan, pareto, compare. A minute."""

from __future__ import annotations

from functools import partial

import torch
from parts import accuracy, batches, digits, network, options, train

import prunella as pr


def main() -> None:
    given = options(__doc__)
    data, test = digits()
    epochs = 1 if given.quick else 8
    dense = train(network(), data, epochs)
    some = [x for x, _ in batches(data)[:8]]
    recipe = pr.Recipe(pr.criteria.group_norm)
    judge = partial(accuracy, data=test)

    scan = pr.search.scan(pr.search.space(dense, some[0], recipe), judge, ratios=(0.25, 0.5, 0.75))
    print(scan)

    experiment = pr.experiments.ParetoExperiment(
        lambda seed: train(network(seed), data, epochs), judge, some[0],
        {"group norm": recipe, "fpgm": pr.recipes.fpgm()},
    )  # fmt: skip
    ratios, seeds = ((2.0,), (0,)) if given.quick else ((2.0, 4.0), (0, 1, 2))
    frontier = pr.experiments.pareto(experiment, given.out / "pareto", ratios=ratios, seeds=seeds)
    print(frontier)

    def by(name: str, seed: int) -> torch.nn.Module:
        plan = pr.plan(dense, some[0], pr.recipes.named(name), target=pr.MACs(0.5), data=some)
        small = pr.shrink(dense, plan)
        pr.reconstruct(small, dense, some[seed:], plan)
        return small

    methods = {name: partial(by, name) for name in ("group_l2", "l1_filter")}
    print(pr.experiments.compare(dense, methods, {"accuracy": judge}, seeds=seeds))


if __name__ == "__main__":
    main()
