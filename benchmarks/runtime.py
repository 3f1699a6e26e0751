"""The sparse runtime against the best dense code that torch has, and against plain eager torch, both in one run.

    python benchmarks/runtime.py [--only linear bert ...] [--wait 60] [--quick] [--table]

One thread unless said otherwise, measured in processor time of that thread, so that other programs do not decide; all
candidates of a cell in interleaved rounds. What others do to the caches shows all the same: with `--wait SECONDS` the
rounds of a cell begin when a small probe is nearly as quick as it ever was, or after so long. Masks and weights are
random unless said otherwise. A cell that has its JSON is not run again; the table says which instructions were used.
Frozen: torch.compile with inductor's freezing.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from cells import RESULTS, once, write
from torch import Tensor, nn
from torch.nn import functional

import prunella as pr
from prunella.io.load import import_module
from prunella.measure.machine import cpu_name
from prunella.measure.timing import compare_latency, own_clock, paired_ratio
from prunella.runtime.kernels import library
from prunella.runtime.kernels.config import Config, Kind, Precision
from prunella.runtime.tuning.choice import Problem, Route, describe, is_dense
from prunella.runtime.tuning.tune import candidates, screen

SHAPES = ((512, 512, 196), (2048, 512, 49), (1024, 1024, 64), (768, 3072, 128), (3072, 768, 128), (3072, 768, 16))
SPARSITIES = (50, 80, 90, 95)
REAL = {
    "first-up": "encoder.layer.0.intermediate.dense",
    "last-down": "encoder.layer.5.output.dense",
    "third-query": "encoder.layer.2.attention.self.query",
}
"""Layers of a trained network whose masks are measured beside random ones."""
Cell = Callable[[], dict[str, Any]]
PAGE = Path(__file__).resolve().parents[1] / "docs" / "sparse_inference.md"
MARKS = "<!-- measured: runtime -->", "<!-- end: runtime -->"
MANY = [f"{m}x{k}x{n}" for m, k, n in SHAPES if n >= 64]
GOALS: tuple[tuple[str, list[str], str, str], ...] = (
    *((f"linear layers in float32, 64 tokens or more, {p} % zeros", [f"linear-{s}-{p}" for s in MANY], "", goal)
      for p, goal in ((50, "1.5, aim 1.8"), (80, "2.8, aim 3.8"), (90, "4.6, aim 7"), (95, "8, aim 11"))),
    *((f"layers of MiniLM, 128 tokens, {p} % zeros in all by magnitude", [f"minilm-{n}-{p}" for n in REAL], "", "")
      for p in SPARSITIES),
    ("linear layers in blocks of 16x1, 90 %", [f"block16-{s}-90" for s in MANY], "", "8, aim 10"),
    ("linear layers in bf16 against torch's bf16, 90 %", [f"bf16-{s}-90" for s in MANY], "bf16", "3.8, aim 6"),
    ("decode 4096x4096 in bf16, 50 %", ["decode-4096x4096-bf16-50"], "", "1.8, aim 1.9"),
    ("decode 4096x4096 in bf16, 70 %", ["decode-4096x4096-bf16-70"], "", "2.4, aim 2.7"),
    ("50 % against only reading the dense bf16 weights", ["decode-4096x4096-bf16-50"], "read", ""),
    ("70 % against only reading the dense bf16 weights", ["decode-4096x4096-bf16-70"], "read", ""),
    ("ResNet-50, 90 %, batch 1", ["resnet50-90"], "", "2.5 (eager 5), aim 3.3 (7)"),
    ("BERT-base, 128 tokens, 90 %", ["bert-90"], "", "eager 7, aim 9"),
    ("the same with bf16 kernels", ["bertbf16-90"], "", "eager 9, aim 13"),
    ("two threads against one", ["threads"], "", "1.8, aim 1.95"),
    ("SmolLM2-135M, generate(), 70 %, against dense bf16", ["smollm2-70"], "bf16", "2, aim 3"),
    ("the same with bf16 kernels", ["smollm2-70"], "bf16 kernels", "2, aim 3"),
    ("the same with int8 kernels", ["smollm2-70"], "int8 kernels", ""),
)  # fmt: skip
"""What, cells, rival (the best dense one if none is named), and the goal: set on a processor with AVX-512."""


def weight(rows: int, wide: int, percent: int, *, block: int = 1, seed: int = 0) -> Tensor:
    """Normal noise with so many zeros, whole blocks of rows alike."""
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand((rows // block, wide), generator=g) >= percent / 100
    return torch.randn((rows, wide), generator=g) * mask.repeat_interleave(block, 0)


def linear(m: int, k: int, n: int, percent: int, *, block: int = 1, precision: Precision = Precision.FP32,
           rounds: int = 15) -> dict[str, Any]:  # fmt: skip
    """A layer of noise: the best kernel, the best dense operation, F.linear."""
    return layer(weight(m, k, percent, block=block), n, precision, rounds)


@cache
def minilm() -> nn.Module:
    """all-MiniLM-L6-v2, as its package brings it."""
    from prunella.app.demo.minilm import minilm_job
    from prunella.app.demo.parts import Effort

    with tempfile.TemporaryDirectory() as folder:
        return minilm_job(Path(folder), pr.Sparsity(0.5), seed=0, effort=Effort(texts=32)).model


def trained(name: str, percent: int, rounds: int) -> dict[str, Any]:
    """A layer of MiniLM for 128 tokens: the smallest weights of all its layers together are zero."""
    model = copy.deepcopy(minilm())
    example = {"input_ids": torch.arange(128)[None], "attention_mask": torch.ones(1, 128, dtype=torch.int64)}
    plan = pr.plan(model, example, pr.Recipe(pr.magnitude, pr.Element()), target=pr.Sparsity(percent / 100))
    pr.finalize(pr.apply_(model, plan))
    matrix = model.get_submodule(name).weight.detach()
    zeros = float((matrix == 0).float().mean())
    return {**layer(matrix, 128, Precision.FP32, rounds), "zeros": zeros}


def layer(matrix: Tensor, n: int, precision: Precision, rounds: int) -> dict[str, Any]:
    """A linear layer for n tokens: the best kernel, the best dense operation, F.linear."""
    m, k = matrix.shape
    bias, layers = torch.zeros(m), dict[Any, Any]()
    runs = candidates(matrix, bias, Problem(n), None, precision, 0, layers)
    with torch.inference_mode():
        best = screen(runs, 0.5, is_dense)
        skips = [c for c in best if not is_dense(c) and (precision is Precision.FP32 or _is(c, precision))]
        if not skips:
            return {"missing": f"no kernel of {precision.value} here", **where()}
        skip = min(skips, key=best.__getitem__)
        pairs: dict[str, Any] = {"eager": runs[Route.TORCH], "sparse": runs[skip]}
        if Route.ONEDNN in runs:
            pairs["onednn"] = runs[Route.ONEDNN]
        if precision is not Precision.FP32:
            x, low = torch.randn(n, k, dtype=torch.bfloat16), matrix.to(torch.bfloat16)
            pairs["bf16"] = partial(functional.linear, x, low, bias.to(torch.bfloat16))
            if n == 1:  # no dense kernel of bf16 can take less time than this
                pairs["read"] = low.view(torch.int64).sum
        return {**compared(pairs, rounds), "kernel": describe(skip), "config": str(skip), **where()}


def _is(choice: Any, precision: Precision) -> bool:
    return getattr(choice, "precision", None) is precision


class Probe:
    """A sparse layer of a size that fits the second cache, timed again and again: is the machine quiet?"""

    limit = 0.0
    """Seconds to wait for that."""

    def __init__(self) -> None:
        self.best = math.inf
        matrix, x = weight(768, 768, 90), torch.randn(128, 768)
        self.run = partial(library.linear, library.pack(matrix, Config(Kind.ROWS)), x)

    def now(self) -> float:
        """The median time of a call."""
        clock, times = own_clock(), list[float]()
        for _ in range(200):
            start = clock()
            self.run()
            times.append(clock() - start)
        return sorted(times)[100]

    def settle(self) -> float:
        """Wait; how much slower than ever the probe is then."""
        start = time.perf_counter()
        while True:
            now = self.now()
            known, self.best = self.best < math.inf, min(self.best, now)
            spent = time.perf_counter() - start
            if spent > self.limit or (now < _NEAR * self.best and (known or spent > self.limit / 4)):
                return now / self.best
            time.sleep(0.2)


@cache
def probe() -> Probe | None:
    """The one of this run; None without kernels."""
    return Probe() if library.available() else None


_NEAR = 1.05


def compared(runs: Mapping[str, Any], rounds: int) -> dict[str, Any]:
    """Milliseconds of each run, and how often sparse is as fast as each other one, with its interval."""
    quiet = probe()
    slower = quiet.settle() if quiet else 1.0
    found = compare_latency(runs, rounds=rounds, warmup=2, clock=own_clock())
    times = {latency.name: latency for latency in found.latencies}
    data: dict[str, Any] = {"ms": {name: latency.median * 1e3 for name, latency in times.items()}, "probe": slower}
    for name in times.keys() - {"sparse"}:
        ratio = paired_ratio(times[name].samples, times["sparse"].samples)
        data[name] = [ratio.value, ratio.low, ratio.high]
    return data


def where() -> dict[str, Any]:
    """What the numbers depend on."""
    tier = library.isa() if library.available() else "none"
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan
    return {
        "isa": tier,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "load": load,
        "torch": torch.__version__,
    }


# -- full models -------------------------------------------------------------------------------------------------------


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 and a shortcut, as in ResNet-50 v1.5."""

    def __init__(self, before: int, wide: int, stride: int) -> None:
        super().__init__()
        sizes = ((before, wide, 1, 1), (wide, wide, 3, stride), (wide, 4 * wide, 1, 1))
        for number, (a, b, kernel, step) in enumerate(sizes, 1):
            setattr(self, f"conv{number}", nn.Conv2d(a, b, kernel, step, kernel // 2, bias=False))
            setattr(self, f"norm{number}", nn.BatchNorm2d(b))
        self.relu = nn.ReLU()
        same = before == 4 * wide and stride == 1
        side = nn.Sequential(nn.Conv2d(before, 4 * wide, 1, stride, bias=False), nn.BatchNorm2d(4 * wide))
        self.side = nn.Identity() if same else side

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm1(self.conv1(x)))
        y = self.relu(self.norm2(self.conv2(y)))
        return self.relu(self.norm3(self.conv3(y)) + self.side(x))


def resnet50() -> nn.Module:
    """ResNet-50 with random weights."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]
    before = 64
    for stage, depth in enumerate((3, 4, 6, 3)):
        for number in range(depth):
            layers.append(Bottleneck(before, 64 << stage, 2 if stage and not number else 1))
            before = 256 << stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000)).eval()


def bert(layers: int = 12) -> nn.Module:
    """The encoder of BERT-base with random weights."""
    transformers = import_module("transformers")

    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig(num_hidden_layers=layers), add_pooling_layer=False).eval()


def with_random_zeros(model: nn.Module, percent: int) -> nn.Module:
    """Random zeros in every linear layer, or every convolution but the first; the other weights are scaled up."""
    convolutions = [m for m in model.modules() if type(m) is nn.Conv2d]
    layers = convolutions[1:] or [m for m in model.modules() if type(m) is nn.Linear]
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in layers:
            keep = torch.rand(layer.weight.shape, generator=g) >= percent / 100
            layer.weight.mul_(keep).div_(math.sqrt(1 - percent / 100))
    return model


def frozen(model: nn.Module, example: Any) -> Callable[[], object]:
    """The model by inductor with frozen weights."""
    import torch._inductor.config as settings

    torch._dynamo.reset()
    with settings.patch(freezing=True), torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = torch.compile(copy.deepcopy(model), dynamic=False)
        made(example)
    return partial(made, example)


def network(make: Callable[[], nn.Module], example: Tensor, percent: int, *, precision: Precision = Precision.FP32,
            rounds: int = 9, with_frozen: bool = True, last: bool = False) -> dict[str, Any]:  # fmt: skip
    """A full model: eager, dense by the quicker kernel, frozen, sparse."""
    model = with_random_zeros(make(), percent).requires_grad_(False)
    made = pr.sparse(model, example, precision=precision, seconds=1.0)
    record = pr.runtime.sparsified(made)
    runs: dict[str, Any] = {"eager": partial(model, example), "sparse": partial(made, example)}
    fast = pr.runtime.dense_fast(model, example)
    if pr.runtime.sparsified(fast).outcome.kept:
        runs["dense fast"] = partial(fast, example)
    if last:
        layout = torch.channels_last
        replica, turned = copy.deepcopy(model).to(memory_format=layout), example.contiguous(memory_format=layout)
        runs["eager channels last"] = partial(replica, turned)
    if with_frozen:
        runs["frozen"] = frozen(model, example)
    with torch.inference_mode():
        found = compared(runs, rounds)
    layers = {layer.name: str(layer) for layer in record.layers}
    return {
        **found,
        "replaced": len(record.replaced),
        "difference": record.outcome.difference,
        "layers": layers,
        **where(),
    }


def two_threads(rounds: int = 41) -> dict[str, Any]:
    """One thread against two on one layer, in turn, in wall time: a number for an idle machine only."""
    matrix, best = weight(3072, 768, 90), dict[int, Callable[[], object]]()
    with torch.inference_mode():
        for count in (1, 2):
            torch.set_num_threads(count)
            runs = candidates(matrix, None, Problem(512), None, Precision.FP32, 0, {})
            times = screen(runs, 0.5, is_dense)
            best[count] = runs[min((c for c in times if not is_dense(c)), key=times.__getitem__)]

        def on(count: int) -> object:
            torch.set_num_threads(count)
            return best[count]()

        found = compare_latency({"one": partial(on, 1), "two": partial(on, 2)}, rounds=rounds, warmup=3)
    torch.set_num_threads(1)
    ms = {latency.name: latency.median * 1e3 for latency in found.latencies}
    return {"ms": ms, "ratio": found.ratio.value, "interval": [found.ratio.low, found.ratio.high], **where()}


def smollm2(percent: int, new: int = 24, rounds: int = 5) -> dict[str, Any]:
    """Tokens a second of `generate()`: SmolLM2-135M pruned by Wanda, every row alike, on 2048 tokens of Python's help.

    Rivals: the same weights in float32 and bf16, and by torch's dynamic int8, all in eager mode.
    """
    from pydoc_data.topics import topics

    from llm import load

    model, tokenizer = load()
    text = tokenizer("\n\n".join(topics.values()), return_tensors="pt").input_ids[0]
    data = [{"input_ids": part[None], "use_cache": False} for part in text[:2048].split(512)]
    how = pr.llm.OneShot(pr.Element(per_row=True), percent / 100, partial(pr.solvers.by_score, score=pr.wanda))
    pruned = pr.llm.solve_(model, data[0], how, data=data).sparsity
    ids = tokenizer("The city of Paris is", return_tensors="pt").input_ids
    runs = {"eager": model, "bf16": copy.deepcopy(model).to(torch.bfloat16), "int8": int8(model)}
    for name, precision in (
        ("sparse", Precision.FP32),
        ("sparse bf16", Precision.BF16),
        ("sparse int8", Precision.INT8),
    ):
        runs[name] = pr.sparse(model, {"input_ids": ids}, seconds=1.0, precision=precision)
    words, speed = dict[str, list[int]](), dict[str, list[float]]()
    for _ in range(rounds):
        for name, one in runs.items():
            clock = own_clock()
            start = clock()
            with torch.inference_mode():
                out = one.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False)
            speed.setdefault(name, []).append(new / (clock() - start))
            words[name] = out[0].tolist()
    rate = {name: sorted(values)[len(values) // 2] for name, values in speed.items()}
    against = {name: rate["sparse"] / rate[name] for name in ("eager", "bf16", "int8")}
    against |= {f"{how} kernels": rate[f"sparse {how}"] / rate["bf16"] for how in ("bf16", "int8")}
    same = {name: words["eager"] == words[name] for name in runs}
    return {"tokens_s": rate, **against, "same_tokens": same, "sparsity": pruned, **where()}


def int8(model: nn.Module) -> nn.Module:
    """torch's dynamic quantization of all linear layers."""
    import torch.ao.quantization as quantization

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)


def cells(quick: bool) -> Iterator[tuple[str, Cell]]:
    """Name and work of each cell."""
    rounds = 5 if quick else 41
    for m, k, n in SHAPES[:2] if quick else SHAPES:
        for percent in SPARSITIES:
            yield f"linear-{m}x{k}x{n}-{percent}", partial(linear, m, k, n, percent, rounds=rounds)
    for m, k, n in SHAPES[:1] if quick else SHAPES:
        yield f"block16-{m}x{k}x{n}-90", partial(linear, m, k, n, 90, block=16, rounds=rounds)
        yield f"bf16-{m}x{k}x{n}-90", partial(linear, m, k, n, 90, precision=Precision.BF16, rounds=rounds)
    for name, path in list(REAL.items())[: 1 if quick else None]:
        for percent in SPARSITIES:
            yield f"minilm-{name}-{percent}", partial(trained, path, percent, rounds)
    size = 1024 if quick else 4096
    for precision in Precision:
        for percent in (50, 70, 80, 90):
            name = f"decode-{size}x{size}-{precision.value}-{percent}"
            yield name, partial(linear, size, size, 1, percent, precision=precision, rounds=rounds)
    yield "threads", two_threads
    pixels, ids = (
        torch.randn(1, 3, 64 if quick else 224, 64 if quick else 224),
        torch.arange(16 if quick else 128)[None],
    )
    yield (
        "resnet50-90",
        partial(network, resnet50, pixels, 90, last=True, with_frozen=not quick, rounds=5 if quick else 11),
    )
    yield "bert-90", partial(network, partial(bert, 1 if quick else 12), ids, 90, with_frozen=not quick)
    yield "bertbf16-90", partial(network, partial(bert, 1 if quick else 12), ids, 90, precision=Precision.BF16,
                                 with_frozen=not quick)  # fmt: skip
    yield "smollm2-70", partial(smollm2, 70, 4 if quick else 24)


def table(folder: Path) -> str:
    """The cells as Markdown."""
    found = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.json"))}
    lines = ["| cell | kernels | kernel | ms | against eager | against the best dense |", "|---|---|---|---|---|---|"]
    for name, cell in found.items():
        if "missing" in cell or "failed" in cell:
            lines.append(f"| {name} | {cell['isa']} | {cell.get('missing') or cell['failed']} | | | |")
            continue
        if "eager" not in cell:
            lines.append(f"| {name} | {cell['isa']} | | | | {cell['ratio']:.2f} |")
            continue
        rival = strongest(cell)
        low = f" ({rival})" if rival != "eager" else ""
        spent = f"{cell['ms']['sparse']:.3g}" if "ms" in cell else f"{cell['tokens_s']['sparse']:.1f} tokens/s"
        row = (name, cell["isa"], cell.get("kernel", ""), spent, say(cell["eager"]), say(cell[rival]) + low)
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def summary(folder: Path) -> str:
    """The cells of each goal together: geometric means against the best dense code and against eager torch."""
    lines = ["| what | against the best dense | against eager | goal | cells |", "|---|---|---|---|---|"]
    for what, names, rival, goal in GOALS:
        found = [json.loads((folder / f"{n}.json").read_text()) for n in names if (folder / f"{n}.json").exists()]
        some = [cell for cell in found if "missing" not in cell and (not rival or rival in cell)]
        if some:
            ratios = [value(cell["ratio"] if "ratio" in cell else cell[rival or strongest(cell)]) for cell in some]
            other = rival == "read" or rival.endswith("kernels")  # then eager is of other numbers
            eager = [value(cell["eager"]) for cell in some if "eager" in cell and not other]
            plain = f"{geometric(eager):.2f}" if eager else ""
            lines.append(f"| {what} | {geometric(ratios):.2f} | {plain} | {goal} | {len(some)} |")
    return "\n".join(lines)


def geometric(values: Sequence[float]) -> float:
    """The geometric mean."""
    return math.exp(sum(map(math.log, values)) / len(values))


def strongest(cell: Mapping[str, Any]) -> str:
    """The best dense rival that a cell was measured against: the one that sparse gains least on."""
    rivals = [c for c in ("eager", "onednn", "frozen", "dense fast", "bf16", "eager channels last") if c in cell]
    return min(rivals, key=lambda rival: value(cell[rival]))


def publish(folders: Sequence[Path]) -> None:
    """Write the tables of every tier that was measured into docs/sparse_inference.md, between the marks."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
    text = "\n\n".join(map(section, folders))
    write(PAGE, f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{rest.partition(MARKS[1])[2]}")


def section(folder: Path) -> str:
    """What was measured with the kernels of one tier."""
    cell = json.loads(next(folder.glob("*.json")).read_text(encoding="utf-8"))
    how = f"One thread unless it says two, {cell['cpu']}, torch {cell['torch']}."
    details = f"<details markdown><summary>Every cell, {folder.name}</summary>\n\n{table(folder)}\n\n</details>"
    return f"### {folder.name}\n\n{how}\n\n{summary(folder)}\n\n{details}"


def value(cell: Any) -> float:
    """The number of a ratio, with or without an interval."""
    return float(cell[0] if isinstance(cell, list) else cell)


def say(cell: Any) -> str:
    """A ratio with its interval."""
    return f"{cell[0]:.2f} [{cell[1]:.2f}, {cell[2]:.2f}]" if isinstance(cell, list) else f"{cell:.2f}"


def main() -> None:
    """Run the cells that are not there, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="beginnings of names of cells")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--wait", type=float, default=0.0, help="most seconds to wait for a quiet machine")
    parser.add_argument(
        "--table", action="store_true", help="run nothing, write what there is into docs/sparse_inference.md"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    Probe.limit = args.wait
    tier = library.isa() if library.available() else "none"
    folder = RESULTS / ("runtime-quick" if args.quick else "runtime") / tier
    for name, cell in cells(args.quick):
        if args.table or (args.only and not name.startswith(tuple(args.only))):
            continue
        start = time.perf_counter()
        try:
            once(folder / f"{name}.json", cell)
        except (pr.PruningError, ImportError, FileNotFoundError) as error:
            print(f"{name}: {error}", flush=True)
            continue
        print(f"{name} ({time.perf_counter() - start:.0f} s)", flush=True)
    if args.table and not args.quick:
        publish(sorted((RESULTS / "runtime").iterdir(), reverse=True))
    print(f"{table(folder)}\n\n{summary(folder)}")


if __name__ == "__main__":
    main()
