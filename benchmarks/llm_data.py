"""What calibrates decides: one-shot pruning of SmolLM2 from several texts, judged on four that calibrate none of them.

    python benchmarks/llm_data.py [--cells one_shot:2:4:auto one_shot:0.5:auto+c4 ...] [--batches 32] [--seed 0]
    python benchmarks/llm_data.py --table

A cell is METHOD:PATTERN:SOURCES. Sources: auto (text that the model writes itself), c4, wikipedia, wikitext (the
validation split: in domain for the first text); with + they give the same number of windows each. SOURCES/OTHER holds
an eighth of --batches more from OTHER out, by which the change of the weights is shrunk. SOURCES*N takes N times the
windows and as many steps of refinement. Windows to calibrate: --batches of 512 tokens. Perplexity: the first 8 windows
of 1024 of WikiText-2 test, Python's own help, AG News and stories. Precision and model as in benchmarks/llm.py.
"Won back" is the part of the log perplexity lost by SparseGPT from C4 that a cell recovers, text by text, and the mean.
The text that the model wrote is kept beside the cells, which are one JSON each and not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from statistics import fmean
from typing import Any

import torch
from cells import RESULTS, once
from torch import Tensor, nn

import llm
import prunella as pr

FOLDER = RESULTS / "llm_data"
TEXTS = ("wikitext", "python", "news", "stories")
FILES = {"c4": "calib_c4.txt", "wikipedia": "calib_wikipedia.txt"}
PATTERNS = ("2:4", "0.5")
ROWS = ("wanda:{}:c4", "sparsegpt:{}:c4", "one_shot:{}:wikitext", "one_shot:{}:c4", "one_shot:{}:auto",
        "one_shot:{}:auto+c4", "one_shot:{}:auto+c4+wikipedia", "one_shot:{}:auto+c4*2", "one_shot:{}:c4/auto",
        "one_shot:{}:auto/c4")  # fmt: skip
CELLS = ["dense", *(row.format(pattern) for pattern in PATTERNS for row in ROWS)]
WINDOWS, LENGTH = 8, 512


def judged(tokenizer: Any) -> dict[str, Tensor]:
    """The texts that judge."""
    news = (llm.TEXT / "agnews_test.tsv").read_text(encoding="utf-8").splitlines()[1:2000]
    texts = {
        "python": "\n\n".join(topics.values()),
        "news": "\n".join(line.partition("\t")[2] for line in news),
        "stories": (llm.TEXT / "tinystories.txt").read_text(encoding="utf-8")[:80_000].replace("<|endoftext|>\n", "\n"),
    }
    found = {name: tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0]
             for name, text in texts.items()}  # fmt: skip
    return {"wikitext": llm.tokens(tokenizer, "wikitext2_test.txt"), **found}


def own_windows(model: nn.Module, count: int, seed: int) -> list[dict[str, Any]]:
    """Windows that the model wrote, the first of those that are kept; more are written if they are too few."""
    file = FOLDER / f"own.seed{seed}.json"
    if not file.exists() or len(json.loads(file.read_text())["tokens"]) < count:
        file.unlink(missing_ok=True)
        start = time.process_time()
        text = pr.llm.own_text(model, nsamples=count, seqlen=LENGTH, seed=seed, batch_size=40)
        content = {"digest": text.digest, "losses": text.losses, "cpu_s": time.process_time() - start}
        once(file, lambda: {**content, "tokens": text.tokens.tolist()})
    rows = torch.tensor(json.loads(file.read_text())["tokens"][:count])
    return [{"input_ids": row[None], "use_cache": False} for row in rows]


def windows(model: nn.Module, tokenizer: Any, source: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Windows of one source."""
    if source == "auto":
        return own_windows(model, count, seed)
    if source == "wikitext":
        return llm.calibration(llm.tokens(tokenizer, "wikitext2_valid.txt"), count=count, length=LENGTH, seed=seed)
    text = (llm.TEXT / FILES[source]).read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0]
    return llm.calibration(ids, count=count, length=LENGTH, seed=seed)


def data_of(
    model: nn.Module, tokenizer: Any, sources: str, batches: int, seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The batches that are fitted, in a mixed order, and those that are held out."""
    names, _, other = sources.partition("/")
    each = names.split("+")
    counts = pr.llm.Calibration(dict.fromkeys(each, 1.0), nsamples=batches).windows
    fitted = [batch for name in each for batch in windows(model, tokenizer, name, counts[name], seed)]
    order = torch.randperm(len(fitted), generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = windows(model, tokenizer, other, max(1, batches // 8), seed + 1) if other else []
    return [fitted[k] for k in order], held_out


def run(cell: str, batches: int, seed: int, run_in: str) -> dict[str, Any]:
    """Prune and measure one cell."""
    torch.manual_seed(seed)
    model, tokenizer = llm.load()
    found: dict[str, Any] = {"cell": cell, "batches": batches, "seed": seed, "precision": run_in}
    if cell != "dense":
        method, _, rest = cell.partition(":")
        amount, _, sources = rest.rpartition(":")
        sources, _, times = sources.partition("*")
        rows = pr.Element(per_row=method == "wanda")
        pattern = pr.NM(*map(int, amount.split(":"))) if ":" in amount else rows
        how = llm.METHODS[method](pattern, 0.5)
        more = int(times or 1)
        if more > 1:
            how = pr.llm.one_shot(pattern, 0.5, epochs=max(1, round(3 / more)))
        fitted, held_out = data_of(model, tokenizer, sources, batches * more, seed)
        start = time.process_time()
        with llm.precision(run_in):
            done = pr.llm.solve_(model, fitted[0], how, data=pr.llm.Split(fitted, held_out))
        found |= {"cpu_s": time.process_time() - start, "sparsity": done.sparsity, "strengths": dict(done.strengths)}
    texts = judged(tokenizer)
    return found | {name: llm.perplexity(model, ids, windows=WINDOWS, length=1024, run_in=run_in)
                    for name, ids in texts.items()}  # fmt: skip


def file_of(cell: str, batches: int, seed: int, run_in: str) -> Path:
    """Where the result of one cell is."""
    name = cell.replace(":", "_").replace("/", "-held-").replace("*", "-times-")
    return FOLDER / f"{name}.b{batches}.{run_in}.seed{seed}.json"


def won_back(dense: Sequence[float], reference: Sequence[float], values: Sequence[float]) -> list[float]:
    """The part of the log perplexity that the reference lost and these values have, text by text."""
    return [math.log(r / v) / math.log(r / d) for d, r, v in zip(dense, reference, values, strict=True)]


def table(batches: int, seed: int, run_in: str) -> str:
    """The cells that were run, as Markdown."""
    head = ["pattern", "method", "calibrated on", *TEXTS, "won back", "least", "CPU s"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    files = {cell: file_of(cell, batches, seed, run_in) for cell in CELLS}
    found = {cell: json.loads(file.read_text(encoding="utf-8")) for cell, file in files.items() if file.exists()}
    ppl = {cell: [float(one[name]) for name in TEXTS] for cell, one in found.items()}
    for cell, values in ppl.items():
        method, _, rest = cell.partition(":")
        amount, _, sources = rest.rpartition(":")
        reference = ppl.get(f"sparsegpt:{amount}:c4")
        back = won_back(ppl["dense"], reference, values) if reference and "dense" in ppl and amount else []
        shown = [f"{fmean(back):.0%}", f"{min(back):.0%}"] if back and values != reference else ["", ""]
        entries = [amount, method, sources, *(f"{v:.2f}" for v in values), *shown, f"{found[cell].get('cpu_s', 0):.0f}"]
        lines.append(f"| {' | '.join(entries)} |")
    return "\n".join(lines)


def main() -> None:
    """Run the cells that are missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="*", default=CELLS)
    parser.add_argument("--batches", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=("float32", "bf16"), default="bf16" if llm.fast_bf16() else "float32")
    parser.add_argument("--table", action="store_true", help="run nothing")
    options = parser.parse_args()
    how = options.batches, options.seed, options.precision
    for cell in [] if options.table else options.cells:
        found = once(file_of(cell, *how), partial(run, cell, *how))
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in found.items()}, flush=True)
    print(table(*how))


if __name__ == "__main__":
    main()
