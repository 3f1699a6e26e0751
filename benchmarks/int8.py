"""Sparse int8 on the CPU against the quickest dense int8, sparse float32 and dense float32, on one linear layer.

    python benchmarks/int8.py [--only 4x4 1x4 ...] [--table]

Blocks of zeros at random, weights of noise, 64 tokens or more. All include the quantisation of x and the bias, but for
`torch._int_mm`, which gets codes and gives sums. Processor time of one thread, all candidates of a cell in interleaved
rounds. Dense int8 is the quicker of torch's dynamic operation and, if it is installed, that of ONNX Runtime.
`--table` runs nothing, and writes what there is into docs/sparse_inference.md.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cells import RESULTS, once, write
from torch import Tensor

import prunella as pr
from prunella.measure.machine import cpu_name
from prunella.measure.timing import compare_latency, own_clock, paired_ratio
from prunella.runtime.kernels import library
from prunella.runtime.kernels.config import DOT_ROWS, Precision
from prunella.runtime.tuning.choice import Choice, Problem, Route, describe, is_dense
from prunella.runtime.tuning.tune import candidates, screen

SHAPES = ((512, 512, 196), (1024, 1024, 64), (768, 3072, 128), (3072, 768, 128))
SPARSITIES = (50, 80, 90)
PATTERNS = {"4x4": (4, 4), "2x4": (2, 4), "1x4": (1, 4), "scattered": (1, 1)}
PAGE = Path(__file__).resolve().parents[1] / "docs" / "sparse_inference.md"
MARKS = "<!-- measured: int8 -->", "<!-- end: int8 -->"
DENSE_INT8 = ("torch int8", "onnxruntime int8")


def weight(m: int, k: int, percent: int, block: tuple[int, int]) -> Tensor:
    """Noise with so many zeros, in blocks."""
    g = torch.Generator().manual_seed(0)
    kept = torch.rand((m // block[0], k // block[1]), generator=g) >= percent / 100
    return torch.randn((m, k), generator=g) * kept.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)


def onnx_run(matrix: Tensor, x: Tensor) -> Callable[[], object] | None:
    """The layer in ONNX Runtime with its own dynamic int8; None where it is not installed."""
    try:
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper
    except ImportError:
        return None
    scale = matrix.abs().amax(1).clamp_min(1e-30) / 127
    codes = (matrix / scale[:, None]).round().to(torch.int8).t().contiguous()
    fixed = {"w": codes.numpy(), "s": scale.numpy(), "z": torch.zeros(len(matrix), dtype=torch.int8).numpy()}
    node = helper.make_node("DynamicQuantizeMatMul", ["x", "w", "s", "z"], ["y"], domain="com.microsoft")
    sides = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, [len(x), wide])
        for n, wide in (("x", x.shape[1]), ("y", len(matrix)))
    ]
    graph = helper.make_graph(
        [node], "layer", sides[:1], sides[1:], [numpy_helper.from_array(v, n) for n, v in fixed.items()]
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    )
    model.ir_version = 8
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return partial(session.run, None, {"x": x.numpy()})


def cell(m: int, k: int, n: int, percent: int, block: tuple[int, int], rounds: int) -> dict[str, Any]:
    """One layer: the quickest of each kind, chosen by a screening, then measured in turns."""
    matrix, x = weight(m, k, percent, block), torch.randn(n, k)
    runs = candidates(matrix, torch.zeros(m), Problem(n), None, Precision.INT8, 0, {})
    codes = [torch.randint(-127, 128, shape, dtype=torch.int8) for shape in ((n, k), (m, k))]
    with torch.inference_mode():
        times = screen(runs, 0.4, is_dense)

        def quickest(of: Callable[[Choice], bool]) -> Choice:
            return min(filter(of, times), key=times.__getitem__)

        skip = quickest(lambda c: not isinstance(c, Route) and c.kind in DOT_ROWS)
        float_skip = quickest(lambda c: not isinstance(c, Route) and c.precision is Precision.FP32)
        float_dense = quickest(lambda c: is_dense(c) and c is not Route.INT8)
        timed: dict[str, Any] = {
            "sparse int8": runs[skip], "sparse float32": runs[float_skip], "dense float32": runs[float_dense],
            "int_mm": partial(torch._int_mm, codes[0], codes[1].t().contiguous()),
        }  # fmt: skip
        if Route.INT8 in runs:
            timed["torch int8"] = runs[Route.INT8]
        other = onnx_run(matrix, x)
        if other is not None:
            timed["onnxruntime int8"] = other
        found = compare_latency(timed, rounds=rounds, warmup=2, clock=own_clock())
    latencies = {latency.name: latency for latency in found.latencies}
    ratio = {
        name: paired_ratio(latencies[name].samples, latencies["sparse int8"].samples).value
        for name in latencies.keys() - {"sparse int8"}
    }
    return {
        "ms": {name: latency.median * 1e3 for name, latency in latencies.items()}, "ratio": ratio,
        "kernel": describe(skip), "isa": library.isa(), "cpu": cpu_name(), "torch": torch.__version__,
    }  # fmt: skip


def table(folder: Path) -> str:
    """Geometric means over the shapes."""
    head = "| zeros | blocks | dense int8 | lowest shape | `_int_mm` alone | sparse float32 | dense float32 |"
    rows = [head, "|---|---|---:|---:|---:|---:|---:|"]
    for pattern in PATTERNS:
        for percent in SPARSITIES:
            files = [folder / f"{pattern}-{m}x{k}x{n}-{percent}.json" for m, k, n in SHAPES]
            if not all(file.exists() for file in files):
                continue
            found = [json.loads(file.read_text(encoding="utf-8"))["ratio"] for file in files]
            dense = [min(ratio[name] for name in DENSE_INT8 if name in ratio) for ratio in found]
            others = [[ratio[name] for ratio in found] for name in ("int_mm", "sparse float32", "dense float32")]
            means = [f"{math.prod(each) ** (1 / len(each)):.2f}" for each in (dense, *others)]
            rows.append(f"| {percent} % | {pattern} | {means[0]} | {min(dense):.2f} | {' | '.join(means[1:])} |")
    return "\n".join(rows)


def main() -> None:
    """Run the cells that are not there, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="beginnings of names of cells")
    parser.add_argument("--rounds", type=int, default=15, help="of a cell")
    parser.add_argument("--table", action="store_true", help="run nothing, write what there is into the page")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = RESULTS / "int8" / library.isa()
    for pattern, block in PATTERNS.items():
        for (m, k, n), percent in ((shape, percent) for shape in SHAPES for percent in SPARSITIES):
            name = f"{pattern}-{m}x{k}x{n}-{percent}"
            if args.table or (args.only and not name.startswith(tuple(args.only))):
                continue
            try:
                once(folder / f"{name}.json", partial(cell, m, k, n, percent, block, args.rounds))
            except pr.PruningError as error:
                print(f"{name}: {error}", flush=True)
    print(table(folder))
    if args.table:
        found = json.loads(next(folder.glob("*.json")).read_text(encoding="utf-8"))
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
        how = f"One thread, {found['cpu']}, {found['isa']} kernels, torch {found['torch']}."
        write(PAGE, f"{before}{MARKS[0]}\n{table(folder)}\n\n{how}\n{MARKS[1]}{rest.partition(MARKS[1])[2]}")


if __name__ == "__main__":
    main()
