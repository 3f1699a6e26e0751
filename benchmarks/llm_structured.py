"""Depth and width pruning of SmolLM2-135M: perplexity of every method in one protocol, before and after one recovery.

    python benchmarks/llm_structured.py [--cells CELL ...] [--eval-samples 16] [--quick] [--table] [--seed 0]

Model, text and windows as in benchmarks/llm.py: WikiText-2 raw test, windows of 1024 without overlap, the first
--eval-samples; calibration: --calibration random windows of 512 tokens of the validation split, by --seed; recovery:
--steps windows of 256 tokens, other ones of that split. Everything in float32; each cell records these numbers.
depth:METHOD:N drops N of 30 blocks; width:METHOD:P removes P % of the feed-forward neurons, the same in every layer;
recover:CELL is the same cut after the one recovery, rate:CELL its tokens a second. A cell that has its JSON is not run
again, and the searches (by loss, or by divergence from the dense model: kl) keep a journal. Cells that were calibrated
on other than 8 windows are in a folder of their own. `--quick` takes 2 windows and 2 steps, for a look that the script
works. PRUNELLA_TEXT names the folder of the text, ../shared/data/text by default.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from cells import RESULTS, shown, write
from torch import Tensor, nn

import llm
import prunella as pr

FOLDER = RESULTS / "llm_structured"
FIRST = 8
"""The number of calibration windows of the cells that are not in a folder of their own."""
WIDTHS = ("width:l2:20", "width:first:20", "width:flap:20", "width:ours:20", "width:obs:20")
PARTS = ("depth:influence:4", "depth:kl+match:4", *WIDTHS)
RECOVERED = tuple(f"recover:{name}" for name in WIDTHS)
RATES = ("rate:depth:influence:8", "rate:width:flap:20")
DEPTHS = (8, 2, 6, 4)
METHODS = ("influence", "kl", "kl+match", "influence+match", "loss", "loss+match", "angular", "streamline")
DEPTH = tuple(f"depth:{method}:{n}" for n in DEPTHS for method in METHODS)
CELLS = list(dict.fromkeys(["dense:", *PARTS, *RECOVERED, *RATES, *DEPTH]))
ANCHORS = {"dense:": 22.88, "depth:influence:2": 30.15, "depth:influence:4": 43.86, "depth:influence:8": 107.8}
"""What other code gave in the same protocol in bfloat16; influence from 8 k tokens of other windows."""


def next_token(model: nn.Module, batch: Any) -> Tensor:
    """The loss of a language model on a batch."""
    ids = batch["input_ids"]
    return nn.functional.cross_entropy(model(**batch).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def uncached(model: nn.Module, batch: Any) -> Tensor:
    """Logits without a cache."""
    return model(**batch, use_cache=False).logits  # type: ignore[no-any-return]


class Bench:
    """The model, its texts, and what all cells share."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.quick, self.seed, self.steps = options.quick, options.seed, options.steps
        self.windows = options.eval_samples
        self.dense, tokenizer = llm.load()
        self.test, held = (llm.tokens(tokenizer, f"wikitext2_{name}.txt") for name in ("test", "valid"))
        count, length = (2, 64) if self.quick else (options.calibration, 512)
        self.data = llm.calibration(held, count=count, length=length, seed=self.seed)
        self.recovery = llm.calibration(held, count=self.steps, length=min(length, 256), seed=self.seed + 100)
        self.evaluation = [{**b, "input_ids": b["input_ids"][:, :256]} for b in self.data[: 2 if self.quick else 4]]
        self.example = {**self.data[0], "input_ids": self.data[0]["input_ids"][:, :16]}

    def perplexity(self, model: nn.Module) -> float:
        """The protocol."""
        window, limit = (128, 2) if self.quick else (1024, self.windows)
        return pr.metrics.perplexity(model, self.test, window=window, limit=limit, outputs=uncached).value

    def quality(self, model: nn.Module) -> float:
        """Minus the loss on calibration text."""
        losses = [pr.metrics.perplexity(model, b["input_ids"][0], window=b["input_ids"].shape[1], outputs=uncached).loss
                  for b in self.evaluation]  # fmt: skip
        return -sum(losses) / len(losses)

    def cut(self, kind: str, method: str, amount: int) -> tuple[nn.Module, pr.Plan]:
        """The pruned model."""
        return (self.depth if kind == "depth" else self.width)(method, amount)

    def depth(self, method: str, count: int) -> tuple[nn.Module, pr.Plan]:
        """Without `count` blocks."""
        if method == "streamline":
            done = pr.llm.replace_run(self.dense, self.example, self.data, count=count, refine=pr.llm.Refine(5, 2e-4))
            return done.model, done.plan
        how, _, after = method.partition("+")
        plan = {"influence": self.by_influence, "angular": self.by_angle, "loss": self.by_loss,
                "kl": self.by_divergence}[how](count)  # fmt: skip
        return self.finished(plan, after)

    def by_influence(self, count: int) -> pr.Plan:
        """ShortGPT."""
        recipe = pr.Recipe(pr.criteria.block_influence, pr.Depth())
        return pr.plan(self.dense, self.example, recipe, target=pr.Sparsity(count / 30), data=self.data)

    def by_angle(self, count: int) -> pr.Plan:
        """Gromov et al."""
        return pr.llm.drop_run(self.dense, self.example, self.data, count=count)

    def by_loss(self, count: int) -> pr.Plan:
        """Ours: one at a time by measured loss, among the 6 of least influence; one journal for all counts."""
        return self.searched("loss", self.quality, count)

    def by_divergence(self, count: int) -> pr.Plan:
        """Ours: the same by the divergence from the dense model, which is less noisy on few tokens."""
        return self.searched(
            "kl", pr.search.agreement(self.dense, self.evaluation, logits=True, outputs=uncached), count
        )

    def searched(self, name: str, quality: Callable[[nn.Module], float], count: int) -> pr.Plan:
        """The greedy search, with a journal of its own."""
        folder = FOLDER / f"journal{'-quick' if self.quick else ''}-{name}-{self.seed}"
        return pr.search.greedy_blocks(self.dense, self.example, quality, count=count, data=self.data, among=6,
                                folder=folder).plan  # fmt: skip

    def width(self, method: str, percent: int) -> tuple[nn.Module, pr.Plan]:
        """With so many per cent fewer neurons in every feed-forward layer.

        l2, first: LLM-Pruner's sums over gate, up and down of squared weights, and of |weight * gradient|, which `snip`
        only divides by one number for all. ours and obs end with the match; obs eliminates neurons one after the other
        and makes up for each before it counts the next.
        """
        methods = {
            "l2": partial(pr.criteria.group_norm),
            "first": pr.criteria.snip,
            "flap": pr.criteria.fluctuation,
            "ours": pr.criteria.fluctuation,
            "obs": pr.criteria.obs_units,
        }
        recipe = pr.Recipe(methods[method], equal_widths=True)
        plan = pr.plan(self.dense, self.example, recipe, target=pr.Sparsity(percent / 100),
                       data=self.data, loss=next_token if method == "first" else None,
                       only=["model.layers.*.mlp.*"])  # fmt: skip
        return self.finished(plan, "match" if method in ("ours", "obs") else "")

    def finished(self, plan: pr.Plan, after: str) -> tuple[nn.Module, pr.Plan]:
        """Shrunk, and matched to the dense stream where that is asked."""
        small = pr.shrink(self.dense, plan)
        if after == "match":
            pr.llm.match_stream_(small, self.dense, self.data, plan)
        return small, plan

    def recover(self, model: nn.Module) -> float:
        """The same recovery for all: adapters of rank 16, a window a step, toward the dense logits; CPU seconds."""
        return seconds(
            lambda: pr.recovery.distill_lm_(
                model,
                self.dense,
                self.recovery,
                steps=self.steps,
                lr=1e-3,
                adapters=pr.recovery.Adapters(rank=16, only=("model.layers.*",)),
            )
        )[0]


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds, and what came back."""
    start = time.process_time()
    found = run()
    return time.process_time() - start, found


def cell(bench: Bench, name: str) -> dict[str, Any]:
    """One cell."""
    protocol = {"windows": bench.windows, "calibration": len(bench.data), "seed": bench.seed}
    if name == "dense:":
        return {"cell": name, "ppl": bench.perplexity(bench.dense), **protocol}
    kind, method, amount = name.split(":")
    spent, (small, plan) = seconds(lambda: bench.cut(kind, method, int(amount)))
    gone = [name for names in plan.dropped.values() for name in names]
    params = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in bench.dense.parameters())
    found = {"cell": name, "ppl": bench.perplexity(small), "params": params, "dropped": gone, "cpu_s": spent,
             **protocol}  # fmt: skip
    return found


def recovered(bench: Bench, name: str) -> dict[str, Any]:
    """A cell after the recovery."""
    small, _ = bench.cut(*name.split(":")[:2], int(name.split(":")[2]))
    spent = bench.recover(small)
    return {"cell": name, "ppl": bench.perplexity(small), "cpu_s": spent, "windows": bench.windows,
            "steps": bench.steps, "seed": bench.seed}  # fmt: skip


def rates(bench: Bench, name: str) -> dict[str, Any]:
    """Tokens a second of a pruned model beside the dense one."""
    small, _ = bench.cut(*name.split(":")[:2], int(name.split(":")[2]))
    found = pr.metrics.throughput(bench.dense, small, bench.test[None, : 32 if bench.quick else 256],
                          new=4 if bench.quick else 16, rounds=5 if bench.quick else 15)  # fmt: skip
    return {"cell": name, "text": str(found), **found.data()}


def table(folder: Path) -> str:
    """The cells that were run, as Markdown: means over seeds, with the spread of perplexity; blocks of the first."""
    lines = ["| cut | method | parameters | perplexity | recovered | blocks | CPU s | seeds |", "|" + "---|" * 8]
    for name in sorted({"dense:", *PARTS, *DEPTH}, key=lambda c: (c.split(":")[0], c.split(":")[-1], c)):
        found, after = (_read(folder, cell) for cell in (name, f"recover:{name}"))
        if found:
            kind, method, amount = (*name.split(":"), "", "")[:3]
            dropped, size = ", ".join(found[0].get("dropped", ())), f"{found[0].get('params', 1):.1%}"
            lines.append(f"| {kind} {amount} | {method} | {size} | {_perplexity(found)} | {_perplexity(after)} "
                         f"| {dropped} | {fmean(c.get('cpu_s', 0) for c in found):.0f} | {len(found)} |")  # fmt: skip
    for file in sorted(folder.glob("rate_*.json")):
        found = json.loads(file.read_text())
        lines += ["", f"{found['cell']}:", "", *(f"    {line}" for line in found["text"].split("\n"))]
    return "\n".join(lines)


def _read(folder: Path, name: str) -> list[dict[str, Any]]:
    """The cell for every seed that has it."""
    leaf = f"{name.replace(':', '_')}.json"
    files = [folder / leaf, *sorted(folder.glob(f"seed*/{leaf}"))]
    return [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]


def _perplexity(found: list[dict[str, Any]]) -> str:
    return shown([one["ppl"] for one in found])


def main() -> None:
    """Run the cells that are missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="*", default=CELLS)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--eval-samples", type=int, default=16)
    parser.add_argument("--calibration", type=int, default=32)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", action="store_true", help="only print what is there")
    options = parser.parse_args()
    many = "" if options.calibration == FIRST else f"calibration{options.calibration}"
    home = FOLDER / ("quick" if options.quick else many)
    folder = home / f"seed{options.seed}" if options.seed else home
    bench = None
    for name in [] if options.table else options.cells:
        file = folder / f"{name.replace(':', '_')}.json"
        if not file.exists():
            bench = bench or Bench(options)
            what, _, rest = name.partition(":")
            other = {"rate": rates, "recover": recovered}.get(what)
            found = other(bench, rest) if other else cell(bench, name)
            write(file, json.dumps(found, indent=1) + "\n")
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in found.items()}, flush=True)
    print(table(home))


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    main()
