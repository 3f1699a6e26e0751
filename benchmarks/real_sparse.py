"""Trained networks with scattered zeros on the sparse kernels: what they lose in accuracy and gain in speed.

    python benchmarks/real_sparse.py [--quick] [--table]

ResNet-56 with its CIFAR-10 weights: magnitude with LAMP's allocation, fine-tuned under the masks; accuracy on the first
2,000 test images. all-MiniLM-L6-v2: layers solved one after another (ADMM) on 96 passages, then distilled under the
masks without labels; evaluated by retrieval of other sections.
Speed: one image and 16, or two texts of 128 tokens; eager, eager with channels last, frozen inductor and the sparse
kernels in turn, end to end, on one thread, in its processor time.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cells import RESULTS, once, write
from images import missing, read_packed
from resnet import pretrained, weights_name
from torch import Tensor, nn
from training import accuracy, fine_tune

import prunella as pr
from runtime import compared, frozen, say, value, where

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "sparse_inference.md")
MARKS = "<!-- measured: real networks -->", "<!-- end: real networks -->"
PERCENTS = {"ResNet-56": (80,), "all-MiniLM-L6-v2": (80,)}
DATA = {"ResNet-56": ("cifar10_train.npz", "cifar10_test.npz", weights_name(56))}


def resnet56(percent: int, *, quick: bool) -> dict[str, Any]:
    """Accuracy in percent of the dense and the pruned network, and the speeds."""
    steps, images = (4, 200) if quick else (300, 2000)
    test, train = read_packed("cifar10_test.npz", stop=images), read_packed("cifar10_train.npz", stop=64 * 200)
    dense, example = pretrained(56), torch.randn(1, 3, 32, 32)
    recipe = pr.Recipe(pr.magnitude, pr.Element(), pr.allocation.lamp)
    plan = pr.plan(dense, example, recipe, target=pr.Sparsity(percent / 100), skip=["conv1", "linear"])
    model = copy.deepcopy(dense).to(memory_format=torch.channels_last)
    pr.apply_(model, plan)
    fine_tune(model, *train, steps=steps, batch=64, rate=0.02, seed=0, guard=pr.Pruner)
    model = model.to(memory_format=torch.contiguous_format)
    return {
        "measure": "top-1, %",
        "dense": accuracy(dense, *test),
        "pruned": accuracy(model, *test),
        "zeros": zeros(model),
        **speeds(model, example, quick=quick),
        "16 images": speeds(model, example.expand(16, -1, -1, -1).contiguous(), quick=quick),
    }


def minilm(percent: int, *, quick: bool) -> dict[str, Any]:
    """Recall at 1 of the dense and the pruned network, and the speeds."""
    from prunella.app.demo.minilm import minilm_job
    from prunella.app.demo.parts import Effort

    effort = Effort(texts=32 if quick else None)
    with tempfile.TemporaryDirectory() as folder:
        demo = minilm_job(Path(folder), pr.Sparsity(percent / 100), seed=0, effort=effort)
    job, model = demo.job, copy.deepcopy(demo.model)
    pr.llm.solve_(model, demo.inputs, pr.llm.OneShot(pr.Element(), percent / 100, pr.solvers.admm), data=list(job.data))
    cut = job.quality(model)
    batches, loss = list(job.recovery.data), job.recovery.imitate(demo.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=job.recovery.lr)
    rounds = 1 if quick else 3
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, rounds * len(batches))
    with pr.Pruner(model, optimizer):
        for batch in batches * rounds:
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()
            decay.step()
    dense, recovered = job.quality(demo.model), job.quality(model)
    measure = "retrieval recall@1"
    return {
        "measure": "recall@1, %",
        "dense": 100 * dense[measure],
        "cut": 100 * cut[measure],
        "pruned": 100 * recovered[measure],
        "agreement": recovered["agreement (cosine)"],
        "zeros": zeros(model),
        **speeds(model, demo.inputs, quick=quick),
    }


NETWORKS: dict[str, Callable[..., dict[str, Any]]] = {"ResNet-56": resnet56, "all-MiniLM-L6-v2": minilm}


def zeros(model: nn.Module) -> float:
    """Part of the weights of linear layers and convolutions that is zero."""
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def speeds(model: nn.Module, example: Any, *, quick: bool) -> dict[str, Any]:
    """The model as it is on each backend, in turn."""
    model = model.eval().requires_grad_(False)
    made = pr.sparse(model, example, seconds=0.2 if quick else 1.0)
    runs: dict[str, Callable[[], object]] = {
        "eager": partial(forward, model, example),
        "sparse": partial(forward, made, example),
    }
    if isinstance(example, Tensor):
        turned = copy.deepcopy(model).to(memory_format=torch.channels_last)
        runs["channels last"] = partial(turned, example.contiguous(memory_format=torch.channels_last))
    if not quick:
        runs["frozen"] = (
            frozen(Positional(model, example), tuple(example.values()))
            if isinstance(example, dict)
            else frozen(model, example)
        )
    with torch.inference_mode():
        found = compared(runs, 5 if quick else 21)
    record = pr.runtime.sparsified(made)
    return {
        **found,
        "replaced": len(record.replaced),
        "difference": record.outcome.difference,
        "why": record.outcome.why,
        **where(),
    }


class Positional(nn.Module):
    """A model whose inputs have names, called with a tuple of them."""

    def __init__(self, model: nn.Module, example: dict[str, Tensor]) -> None:
        super().__init__()
        self.model, self.names = model, tuple(example)

    def forward(self, inputs: tuple[Tensor, ...]) -> object:
        return self.model(**dict(zip(self.names, inputs, strict=True)))


def forward(model: nn.Module, example: Any) -> object:
    """One pass; a mapping gives arguments by name."""
    return model(**example) if isinstance(example, dict) else model(example)


def table(cells: dict[str, dict[str, Any]]) -> str:
    """The cells as Markdown."""
    lines = [
        "| network | zeros | metric | dense | pruned | ms, sparse | against eager | against the best dense backend |",
        "|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    rows = {}
    for name, cell in cells.items():
        rows[name] = cell
        if "16 images" in cell:
            rows[f"{name}, 16 images at once"] = {**cell, **cell["16 images"]}
    for name, cell in rows.items():
        rivals = [name for name in ("eager", "channels last", "frozen") if name in cell]
        best = min(rivals, key=lambda name: value(cell[name]))
        row = (
            name, f"{cell['zeros']:.0%}", cell["measure"], f"{cell['dense']:.1f}", f"{cell['pruned']:.1f}",
            f"{cell['ms']['sparse']:.3g}", say(cell["eager"]), f"{say(cell[best])} ({best})",
        )  # fmt: skip
        lines.append(f"| {' | '.join(row)} |")
    some = next(iter(cells.values()))
    about = f"One thread, {some['cpu']} with {some['isa']} kernels. Made by `python benchmarks/real_sparse.py`."
    return "\n".join([*lines, "", about])


def main() -> None:
    """Run what is not there; the table goes between its marks in README and docs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps, to see that it runs; writes no page")
    parser.add_argument("--table", action="store_true", help="only write the pages from what there is")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = RESULTS / ("real_sparse-quick" if options.quick else "real_sparse")
    cells = {}
    for name, percents in PERCENTS.items():
        absent = missing(*DATA.get(name, ()))
        if absent:
            print(f"{name} is left out: its data is not here ({', '.join(absent)}); set PRUNELLA_DATA")
            continue
        for percent in percents:
            file = folder / f"{name}-{percent}.json"
            if options.table and not file.exists():
                continue
            cells[f"{name}, {percent} %"] = once(file, partial(NETWORKS[name], percent, quick=options.quick))
            print(json.dumps(cells[f"{name}, {percent} %"]), flush=True)
    if not cells:
        print("nothing was measured yet")
        return
    text = table(cells)
    print(text)
    if not options.quick:
        for page in PAGES:
            before, mark, rest = page.read_text(encoding="utf-8").partition(MARKS[0])
            if mark:
                write(page, f"{before}{mark}\n{text}\n{MARKS[1]}{rest.partition(MARKS[1])[2]}")


if __name__ == "__main__":
    main()
