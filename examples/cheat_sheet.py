"""Four lines of every cheat sheet, as masks and as surgery: threshold, indices, bottom-k, dead neurons. Seconds."""

from __future__ import annotations

import copy

import torch
from parts import batches, digits, network, options, train

import prunella as pr


def main() -> None:
    given = options(__doc__)
    data, _ = digits()
    model, x = train(network(), data, 1 if given.quick else 5), batches(data)[0][0]

    weights = pr.Recipe(granularity=pr.Element())
    plan = pr.plan(model, x, weights, target=pr.Threshold(0.01))  # mask = |w| > t
    masked = pr.apply_(copy.deepcopy(model), plan)
    assert all(float(p[p != 0].abs().min()) > 0.01 for name, p in masked.named_parameters() if name in plan.masks)
    print("threshold:", plan.outcome)

    plan = pr.plan(model, x, remove={"0": [2, 5, 7]})  # channels of a layer, by index
    print("by index: ", pr.shrink(model, plan)[0])

    plan = pr.plan(model, x, counts={"4": 16})  # the 16 filters with the lowest scores
    print("bottom-k: ", pr.shrink(model, plan)[4])

    lowest = min(float(row.abs().sum()) for row in model[0].weight.flatten(1))
    plan = pr.plan(model, x, only=["0"], target=pr.Threshold(1.1 * lowest))  # units whose score is below t
    print("below t:  ", pr.shrink(model, plan)[0])
    same = torch.allclose(pr.shrink(model, plan)(x), pr.apply_(copy.deepcopy(model), plan)(x), atol=1e-4)
    print("masks and surgery agree:", same)
    assert same


if __name__ == "__main__":
    main()
