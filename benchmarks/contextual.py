"""How many neurons of its MLPs a small language model needs for a token: an oracle, and a linear predictor.

    python benchmarks/contextual.py            # a few minutes; needs ../shared/data

A Llama of 260,032 parameters on short stories. Each token keeps the part of the neurons with the largest activations
(oracle), those that a linear map of the input of the MLP predicts, fitted by least squares on other stories, or, as a
control, the same neurons as all tokens: those of the largest mean activation on the other stories. The table goes to
`results/contextual.md`. It says nothing of time: dense kernels compute all neurons.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from cells import RESULTS
from torch import Tensor, nn

import prunella as pr
from prunella.graph.solve.groups import couple
from prunella.io.load import import_module
from prunella.tokens.contextual import Predictor, neurons

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
PARTS = (1.0, 0.75, 0.5, 0.3, 0.2, 0.1)


def stories(tokenizer: Any, first: int, last: int) -> list[dict[str, Any]]:
    """One batch a story, cut at the context of the model."""
    text = (SHARED / "text" / "tinystories.txt").read_text(encoding="utf-8").split("<|endoftext|>")
    made = []
    for story in text[first:last]:
        ids = [1, *tokenizer(story.strip(), add_special_tokens=False).input_ids][:512]
        made.append({"input_ids": torch.tensor([ids]), "use_cache": False})
    return made


@torch.no_grad()
def loss(model: nn.Module, data: list[dict[str, Any]]) -> float:
    """Mean loss of a token."""
    total = tokens = 0.0
    for batch in data:
        count = batch["input_ids"].shape[1] - 1
        total += float(model(**batch, labels=batch["input_ids"]).loss) * count
        tokens += count
    return total / tokens


@torch.no_grad()
def fitted(model: nn.Module, data: list[dict[str, Any]]) -> tuple[dict[str, Predictor], dict[str, Predictor]]:
    """By the path of the layer that reads the neurons: least squares from the MLP's input to |a|, and its mean."""
    found: dict[str, Predictor] = {}
    same: dict[str, Predictor] = {}
    for path, source in neurons(couple(model, data[0])).items():
        seen: dict[str, list[Tensor]] = {path: [], source: []}
        handles = [
            model.get_submodule(name).register_forward_pre_hook(lambda m, a, s=s: s.append(a[0].flatten(0, -2)))
            for name, s in seen.items()
        ]
        for batch in data:
            model(**batch)
        for handle in handles:
            handle.remove()
        x, y = torch.cat(seen[source]), torch.cat(seen[path]).abs()
        x = torch.cat([x, torch.ones(len(x), 1)], 1)
        weight = torch.linalg.lstsq(x, y).solution
        found[path] = lambda v, w=weight: v @ w[:-1] + w[-1]
        mean = y.mean(0)
        same[path] = lambda v, m=mean: m.expand(*v.shape[:-1], -1)
    return found, same


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--stories", type=int, default=16, help="how many to measure on, the last of the file")
    count = parser.parse_args().stories
    transformers = import_module("transformers")  # also beside a torchvision that does not fit
    home = SHARED / "stories260k"
    model = transformers.AutoModelForCausalLM.from_pretrained(home).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(home)
    data, other = stories(tokenizer, 317 - count, 317), stories(tokenizer, 0, 60)
    (predictors, same), dense = fitted(model, other), loss(model, data)
    lines = [
        f"Loss of a token on {count} stories; dense {dense:.4f}.",
        "",
        "| kept | oracle | linear predictor | same for all |",
    ]
    lines += ["| --- | --- | --- | --- |"]
    for keep in PARTS:
        with pr.tokens.contextual_(model, data[0], keep=keep):
            oracle = loss(model, data)
        with pr.tokens.contextual_(model, data[0], keep=keep, predictors=predictors):
            predicted = loss(model, data)
        with pr.tokens.contextual_(model, data[0], keep=keep, predictors=same):
            control = loss(model, data)
        lines.append(f"| {keep:.0%} | {oracle:.4f} | {predicted:.4f} | {control:.4f} |")
        print(lines[-1], flush=True)
    (RESULTS / "contextual.md").write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
