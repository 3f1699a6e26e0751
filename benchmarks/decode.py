"""One to eight tokens times a sparse weight, against torch's dense linear: `python benchmarks/decode.py`.

Everything runs interleaved on one thread. A cell is the 30th percentile of the processor time of a call (other programs
take wall time, not that) in microseconds, and how many times quicker it is than F.linear in fp32, oneDNN's, and bf16.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from prunella.runtime.kernels import library
from prunella.runtime.kernels.config import Config, Kind, Precision

Call = Callable[[], object]
KERNELS = {
    "bits fp32": Config(Kind.DECODE),
    "bits bf16": Config(Kind.DECODE, Precision.BF16),
    "bits int8": Config(Kind.DECODE, Precision.INT8),
    "columns fp32": Config(Kind.CSR),
    "columns bf16": Config(Kind.CSR, Precision.BF16),
}


def dense(weight: Tensor, x: Tensor) -> dict[str, Call]:
    """What torch offers for a weight whose zeros it multiplies."""
    half, x_half = weight.bfloat16(), x.bfloat16()
    ordered = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
    return {
        "F.linear": lambda: linear(x, weight),
        "oneDNN": lambda: torch.ops.mkldnn._linear_pointwise(x, ordered, None, "none", [], ""),
        "F.linear bf16": lambda: linear(x_half, half),
    }


def sparse(weight: Tensor, x: Tensor, sparsity: int) -> dict[str, Call]:
    """Every kernel for a few tokens, on a random part of the weight."""
    kept = weight * (torch.rand_like(weight) >= sparsity / 100)
    packed = {name: library.pack(kept, config) for name, config in KERNELS.items()}
    return {f"{sparsity} % {name}": lambda p=p: library.linear(p, x) for name, p in packed.items()}


def seconds(run: Call, calls: int) -> float:
    begin = time.clock_gettime(time.CLOCK_THREAD_CPUTIME_ID)
    for _ in range(calls):
        run()
    return (time.clock_gettime(time.CLOCK_THREAD_CPUTIME_ID) - begin) / calls


def measure(runs: dict[str, Call], rounds: int, calls: int) -> dict[str, float]:
    """The 30th percentile of each, all run in turn so that a slow moment is slow for all."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            taken[name].append(seconds(run, calls))
    return {name: sorted(each[1:])[rounds * 3 // 10] for name, each in taken.items()}


def table(shape: tuple[int, int], tokens: int, sparsities: list[int], rounds: int) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(shape), torch.randn(tokens, shape[1])
    runs = dense(weight, x)
    for sparsity in sparsities:
        runs |= sparse(weight, x, sparsity)
    found = measure(runs, rounds, max(1, 4_000_000 // weight.numel()))
    bases = [found[name] for name in ("F.linear", "oneDNN", "F.linear bf16")]
    print(f"\n{shape[0]}x{shape[1]}, {tokens} token{'s' * (tokens > 1)}, {library.isa()}")
    print(f"{'':20}{'us':>9}{'/ fp32':>9}{'/ oneDNN':>9}{'/ bf16':>9}")
    for name, took in found.items():
        print(f"{name:20}{took * 1e6:9.1f}" + "".join(f"{base / took:9.2f}" for base in bases))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "576x1536"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 8])
    parser.add_argument("--sparsity", nargs="+", type=int, default=[50, 70, 80, 90, 95])
    parser.add_argument("--rounds", type=int, default=11)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with torch.inference_mode():
        for shape in given.shapes:
            rows, columns = (int(n) for n in shape.split("x"))
            for tokens in given.tokens:
                table((rows, columns), tokens, given.sparsity, given.rounds)


if __name__ == "__main__":
    main()
