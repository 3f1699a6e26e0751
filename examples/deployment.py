"""A pruned network in three backends: eager torch, torch.compile and ONNX Runtime, beside the dense one. A minute."""

from __future__ import annotations

import torch
from parts import batches, digits, network, options, train

import prunella as pr
from prunella.app.backends import bench_pair


def main() -> None:
    given = options(__doc__)
    data, _ = digits()
    dense = train(network(width=64), data, 1 if given.quick else 3)
    some = [x for x, _ in batches(data)[:8]]
    plan = pr.plan(dense, some[0], pr.Recipe(pr.criteria.group_norm, round_to=8), target=pr.MACs(0.4))
    small = pr.shrink(dense, plan)
    pr.reconstruct(small, dense, some, plan)
    for name in ("small.pt2", "small.onnx"):
        print(pr.export(small, given.out / name, inputs=some[0][:1], any_size=True))
    backends = ("eager", "onnxruntime") if given.quick else ("eager", "compiled", "onnxruntime")
    example, rounds = torch.zeros(1, 1, 8, 8), 5 if given.quick else 15
    timed = bench_pair(dense, small, example, backends=backends, batches=(1, 32), threads=(1,), rounds=rounds)
    for row in timed.rows:
        times = f"{row.dense_ms:7.3f} -> {row.pruned_ms:7.3f} ms"
        print(f"batch {row.batch:2}, {row.backend:28} {times}, {row.ratio.verdict}")
    print(timed.verdict, *timed.left_out.values(), sep="\n")


if __name__ == "__main__":
    main()
