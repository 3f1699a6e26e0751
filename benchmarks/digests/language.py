"""Cells of `digests.py` on small language models: one-shot solvers, blocks, streams, adapters, tokens."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from cells import cell, cells
from models import NETS, outputs
from torch import Tensor, nn

import prunella as pr

LLAMA = next(net for net in NETS if net.name == "llama")
MIXTRAL = next(net for net in NETS if net.name == "mixtral")
VIT = next(net for net in NETS if net.name == "vit")
BERT = next(net for net in NETS if net.name == "bert")
DATA = LLAMA.batches(3)
TEXT = torch.randint(0, 61, (60,), generator=torch.Generator().manual_seed(3))


def layer() -> tuple[Tensor, Tensor]:
    """A weight and the Gram matrix of correlated inputs."""
    rng = torch.Generator().manual_seed(0)
    weight, mix = torch.randn(12, 32, generator=rng), torch.randn(32, 32, generator=rng)
    inputs = torch.randn(200, 32, generator=rng) @ mix
    return weight, inputs.T @ inputs


# -- solvers -----------------------------------------------------------------------------------------------------

PATTERNS = {"element": pr.Element(), "rows": pr.Element(per_row=True), "2:4": pr.NM(2, 4), "block": pr.Block(2, 4)}
SOLVERS: dict[str, Any] = {
    "sparsegpt": pr.solvers.sparsegpt,
    "admm": pr.solvers.admm,
    "alps": partial(pr.solvers.alps, steps=40),
    "swap": pr.solvers.swap,
    "wanda": partial(pr.solvers.by_score, score=pr.wanda),
    "ria": partial(pr.solvers.by_score, score=pr.criteria.ria),
    "prune_and_quantize": partial(pr.solvers.prune_and_quantize, grid=pr.solvers.Grid(4, 8)),
}


@cells("solver of a layer", SOLVERS)
def solved(solver: Any) -> dict[str, Any]:
    weight, gram = layer()
    found = {name: solver(weight, gram, pattern) for name, pattern in PATTERNS.items()}
    return {name: [one.weight, one.mask, one.error, one.damping] for name, one in found.items()}


@cell("solver of a layer / refit")
def refitted() -> list[Any]:
    weight, gram = layer()
    found = pr.solvers.refit(weight, gram, weight.abs() > weight.abs().median())
    return [found.weight, found.mask, found.error]


def one_shot(how: pr.llm.OneShot, net: Any = LLAMA) -> dict[str, Any]:
    """A language model pruned block by block."""
    model = net.model()
    done = pr.llm.solve_(model, DATA[0], how, data=DATA)
    fits = sorted((fit.name, fit.removed, fit.total, fit.tokens, fit.error, fit.damping) for fit in done.fits)
    return {"model": model, "masks": pr.masks_of(model), "fits": fits, "refined": done.refined,
            "outputs": outputs(model, DATA[0])}  # fmt: skip


@cells("one shot", SOLVERS)
def one_shot_by(solver: Any) -> dict[str, Any]:
    return one_shot(pr.llm.OneShot(pr.Element(), 0.5, solver))


HOWS = {
    "2:4 refined": pr.llm.one_shot(pr.NM(2, 4), epochs=2),
    "rows, blocks at once": pr.llm.OneShot(pr.Element(per_row=True), 0.6, true_sequential=False),
    "blocks of weights": pr.llm.OneShot(pr.Block(2, 2), 0.5, pr.solvers.sparsegpt, refine=pr.llm.Refine(1, 1e-3)),
}


@cells("one shot", HOWS)
def one_shot_how(how: pr.llm.OneShot) -> dict[str, Any]:
    return one_shot(how)


@cell("one shot / mixture of experts")
def one_shot_experts() -> dict[str, Any]:
    return one_shot(pr.llm.OneShot(pr.NM(2, 4), method=pr.solvers.sparsegpt), MIXTRAL)


@cell("one shot / alpha_sparsities")
def alpha() -> dict[str, Any]:
    shares = pr.llm.alpha_sparsities(LLAMA.model(), DATA[0], sparsity=0.6, spread=0.2)
    return {"shares": shares, **one_shot(pr.llm.OneShot(pr.Element(), shares, pr.solvers.sparsegpt))}


@cell("one shot / a folder")
def streamed() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        LLAMA.model().save_pretrained(folder / "in", max_shard_size="20KB")  # type: ignore[operator]
        pr.llm.solve_folder(
            folder / "in", folder / "out", pr.llm.OneShot(pr.NM(2, 4), method=pr.solvers.sparsegpt), data=DATA
        )
        files = sorted((folder / "out").glob("*.safetensors"))
        return {"tensors": {name: value for file in files for name, value in safetensors.torch.load_file(file).items()}}


@cell("one shot / evolve_levels")
def levels() -> list[Any]:
    stored = {}
    for sparsity in (0.25, 0.5, 0.75):
        stored[sparsity] = LLAMA.model()
        pr.llm.solve_(
            stored[sparsity], DATA[0], pr.llm.OneShot(pr.Element(), sparsity, pr.solvers.sparsegpt), data=DATA
        )
    quality = pr.search.agreement(LLAMA.model(), DATA, logits=True)
    found = pr.search.evolve_levels(pr.search.Levels(stored), 0.5, quality, generations=3, offspring=2)
    return [found.shares, found.value, found.tried, found.model]


# -- blocks and streams ------------------------------------------------------------------------------------------


def shrunk(plan: pr.Plan) -> dict[str, Any]:
    """A plan, the smaller model and its outputs."""
    small = pr.shrink(LLAMA.model(), plan)
    return {"plan": plan, "small": small, "outputs": outputs(small, DATA[0])}


@cell("blocks / drop_blocks")
def dropped() -> dict[str, Any]:
    return shrunk(pr.llm.drop_blocks(LLAMA.model(), DATA[0], ["model.layers.1", "model.layers.3"]))


@cell("blocks / drop_run")
def run() -> dict[str, Any]:
    return shrunk(pr.llm.drop_run(LLAMA.model(), DATA[0], DATA, count=2))


@cell("blocks / greedy_blocks")
def greedy() -> dict[str, Any]:
    model = LLAMA.model()
    found = pr.search.greedy_blocks(model, DATA[0], pr.search.agreement(model, DATA, logits=True), count=2)
    return {"values": found.values, "paths": found.paths, "plan": found.plan}


@cell("blocks / replace_run")
def replaced() -> dict[str, Any]:
    done = pr.llm.replace_run(LLAMA.model(), DATA[0], DATA, count=2, refine=pr.llm.Refine(1, 1e-3))
    return {"model": done.model}


@cell("blocks / match_stream_")
def matched() -> dict[str, Any]:
    model = LLAMA.model()
    plan = pr.llm.drop_blocks(model, DATA[0], ["model.layers.1", "model.layers.2"])
    small = pr.shrink(model, plan)
    done = pr.llm.match_stream_(small, model, DATA, plan, how=pr.llm.Match(gaps=True, refine=pr.llm.Refine(1, 1e-3)))
    return {"small": small, "fits": [[fit.layer, fit.before, fit.after] for fit in done.fits]}


@cell("blocks / rotate and rescale_")
def rotated() -> dict[str, Any]:
    turned = pr.llm.rotate(LLAMA.model(), DATA[0], DATA)
    plan = pr.plan(turned.model, DATA[0], pr.Recipe(pr.criteria.group_norm, pr.Width()), target=pr.Sparsity(0.25))
    small = pr.shrink(turned.model, plan)
    pr.llm.rescale_(small, turned)
    return {"model": turned.model, "energy": turned.energy, "small": small}


@cell("blocks / slice_stream")
def sliced() -> dict[str, Any]:
    done = pr.llm.slice_stream(LLAMA.model(), DATA[0], DATA, sparsity=0.25)
    return {"model": done.model}


# -- recovery ----------------------------------------------------------------------------------------------------


@cell("recovery / adapters")
def adapters() -> dict[str, Any]:
    model = LLAMA.model()
    some = pr.recovery.Adapters(rank=3, scale=0.5, only=("*down_proj", "*q_proj"))
    names = pr.recovery.add_adapters_(model, some, seed=1)
    return {"names": sorted(names), "model": model}


@cell("recovery / distill_lm_")
def recovered() -> dict[str, Any]:
    model = LLAMA.model()
    small = pr.shrink(model, pr.llm.drop_blocks(model, DATA[0], ["model.layers.2"]))
    whole = pr.shrink(model, pr.llm.drop_blocks(model, DATA[0], ["model.layers.2"]))
    done = pr.recovery.distill_lm_(small, model, DATA, steps=2, lr=1e-2, adapters=pr.recovery.Adapters(rank=2))
    pr.recovery.distill_lm_(whole, model, DATA, steps=2, lr=1e-3, adapters=None)
    return {"adapters": small, "all weights": whole, "loss": done.curve.loss, "rates": done.curve.lr}


class Adapted(nn.Module):
    """A frozen layer with a product of two thin ones beside it."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x) + self.up(self.down(x))
        return out


@cell("recovery / adapters on masks")
def masked_adapters() -> dict[str, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4))
    x = torch.randn(8, 12)
    pr.apply_(model, pr.plan(model, x, pr.Recipe(granularity=pr.Element()), target=pr.Sparsity(0.6)))
    model[0] = Adapted(model[0], 3)  # type: ignore[arg-type]
    pr.recovery.mask_adapters_(model)
    pr.finetune(model, [x], lambda m, b: (m(b) - 1).square().mean(), steps=3, lr=1e-2)
    merged = pr.recovery.merge_adapters_(model)
    return {"merged": merged, "model": model}


IMITATIONS: dict[str, Any] = {
    "logits": partial(pr.recovery.distill_logits, temperature=3.0),
    "features": partial(pr.recovery.distill_features, names=["model.layers.1"]),
    "attention": partial(pr.recovery.distill_attention, names=["model.layers.1"]),
    "probabilities": pr.recovery.distill_attention_probabilities,
}


@cells("recovery / distill", IMITATIONS)
def imitated(make: Any) -> dict[str, Any]:
    model = LLAMA.model()
    model.set_attn_implementation("eager")  # type: ignore[operator]
    small = pr.shrink(model, pr.plan(model, DATA[0], pr.Recipe(pr.criteria.group_norm), target=pr.Params(0.8)))
    curve = pr.distill(small, model, DATA, steps=2, lr=1e-3, imitate=make)
    return {"small": small, "loss": curve.loss}


@cell("recovery / biases and means")
def biased() -> dict[str, Any]:
    model = pr.io.with_biases(LLAMA.model())
    recipe = pr.Recipe(pr.criteria.fluctuation, pr.Channel(), pr.global_)
    plan = pr.plan(model, DATA[0], recipe, target=pr.Params(0.8), data=DATA)
    small = pr.shrink(model, plan)
    folded = pr.recovery.fold_means(small, model, DATA, plan)
    return {"plan": plan, "small": small, "folded": folded}


# -- metrics and tokens ------------------------------------------------------------------------------------------


@cell("metrics / language")
def measured() -> dict[str, Any]:
    model = LLAMA.model()
    small = pr.shrink(model, pr.llm.drop_blocks(model, DATA[0], ["model.layers.2"]))
    return {
        "perplexity": pr.metrics.perplexity(model, TEXT, window=12, stride=5),
        "agreement": pr.metrics.token_agreement(model, small, DATA),
        "quality": [pr.search.agreement(model, DATA, logits=flag)(small) for flag in (False, True)],
    }


@cell("tokens / merging")
def merging() -> dict[str, Any]:
    model, batch = VIT.model(), VIT.batches()[0]
    with pr.tokens.merge_tokens_(model, batch, r=1, protected=1) as done:
        seen = outputs(model, batch)
        sizes = list(done.sizes)
    matching = pr.tokens.bipartite_match(
        torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(1)), 3, protected=1
    )
    return {"outputs": seen, "sizes": sizes, "match": [matching.source, matching.target, matching.kept]}


@cell("tokens / neurons in context")
def context() -> dict[str, Any]:
    model, batch = VIT.model(), VIT.batches()[0]
    with pr.tokens.contextual_(model, batch, keep=0.25) as layers:
        return {"layers": sorted(layers), "outputs": outputs(model, batch)}


@cell("vocabulary renumbered")
def renumbered() -> dict[str, Any]:
    model, batch = BERT.model(), BERT.batches()[0]
    some = pr.granularity.Vocabulary(tuple(range(0, 61, 3)))
    plan = pr.plan(model, batch, pr.Recipe(granularity=some))
    return {"plan": plan, "numbers": plan.renumber(torch.tensor([[0, 3, 60]]))}
