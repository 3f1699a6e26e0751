"""Every verb that writes, on the smallest job: what it reads lies in `source`, and what it writes beside it.

Each is called in a process of its own, whose working folder is the home of the job.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

JOB = """
import torch
from torch import nn
from torch.nn.functional import cross_entropy

SEED = 0

def net():
    torch.manual_seed(SEED)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4)).eval()

def data():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, 8, generator=generator) for _ in range(2)]

def metric(model):
    return float(model(data()[0]).square().mean())

def made(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()

def batch():
    return data()[0]

def loss(model, batch):
    return cross_entropy(model(batch), torch.arange(len(batch)) % 4)

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return x + self.linear(x).relu()

def deep():
    torch.manual_seed(SEED)
    return nn.Sequential(nn.Sequential(*(Block() for _ in range(4))), nn.Linear(8, 4)).eval()

def tokens():
    generator = torch.Generator().manual_seed(2)
    return [{"input_ids": torch.randint(0, 32, (1, 16), generator=generator)} for _ in range(2)]
"""


@dataclass(frozen=True)
class Verb:
    """One job. call: does it. again: what a second call is told when the first was complete: 0, or 2 for "exists".

    check: reads what is finished, where a second call does not. shares: its journal takes the records of several runs,
    each under its own identity.
    """

    name: str
    call: Callable[[], object]
    prepare: Callable[[], object] = lambda: None
    again: tuple[int, ...] = (0,)
    check: Callable[[], object] | None = None
    shares: bool = False


def _line(*words: str) -> Callable[[], object]:
    """A line of the command line."""

    def call() -> None:
        from prunella.cli import main

        main([*words, "--json"])

    return call


VERIFY = _line("verify", "out")
NET = ("source.job:net", "--inputs", "2x8")
OWN_TEXT = ("--nsamples", "2", "--seqlen", "16")
SHORT = (
    "--eval-seqlen",
    "16",
    "--eval-samples",
    "2",
)  # the dense model writes the text by which both are judged, token by token
RUN = ("run", *NET, "--target", "macs=0.6", "--data", "source.job:data", "--metric", "source.job:metric", "-o", "out")


def _net() -> nn.Module:
    from source import job  # type: ignore[import-not-found]

    net: nn.Module = job.net()
    return net


def _save(overwrite: bool = False) -> None:
    import torch

    import prunella as pr

    plan = pr.plan(_net(), torch.ones(2, 8), target=pr.MACs(0.3 if overwrite else 0.6))
    pr.save(pr.shrink(_net(), plan), "out", plan=plan, factory=_net, overwrite=overwrite)


def _llama() -> None:
    import torch
    from source import job

    from prunella.io.load import import_transformers

    library = import_transformers()
    torch.manual_seed(job.SEED)
    config = library.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    library.LlamaForCausalLM(config).save_pretrained("source/llama")


def _one_shot(sparsity: float = 0.5, overwrite: bool = False) -> None:
    import torch

    import prunella as pr

    generator = torch.Generator().manual_seed(0)
    data = [{"input_ids": torch.randint(0, 32, (1, 16), generator=generator)} for _ in range(2)]
    how = pr.llm.OneShot(pr.Element(), sparsity)
    pr.llm.solve_folder("source/llama", "out", how, data=data, overwrite=overwrite)


def _prepared_llm() -> None:
    _llama()
    _one_shot(0.3)


def _imp() -> None:
    from source import job

    import prunella as pr

    spec = pr.lottery.TrainingSpec(pr.lottery.descent(job.data(), job.loss, lr=0.1), steps=3, evaluate=job.metric)
    controls = pr.lottery.Controls(kinds=())
    pr.lottery.find_ticket(
        job.made(0), spec, prune=pr.lottery.imp(job.batch()), rounds=1, controls=controls, folder="out"
    )


def _levels() -> None:
    from source import job

    import prunella as pr

    def masked(sparsity: float) -> nn.Module:
        model: nn.Module = job.made(0)
        recipe = pr.Recipe(pr.magnitude, pr.Element())
        return pr.apply_(model, pr.plan(model, job.batch(), recipe, target=pr.Sparsity(sparsity)))

    levels = pr.search.Levels({sparsity: masked(sparsity) for sparsity in (0.25, 0.5, 0.75)})
    pr.search.evolve_levels(levels, 0.5, job.metric, generations=2, offspring=3, folder="out")


def _pareto() -> None:
    import prunella as pr

    experiment = pr.experiments.ParetoExperiment("source.job:made", "source.job:metric", "source.job:batch")
    pr.experiments.pareto(experiment, "out", ratios=(2.0,), seeds=(0, 1))


def _netadapt() -> None:
    from source import job

    import prunella as pr

    space = pr.search.space(job.made(0), job.batch(), pr.Recipe())
    pr.search.netadapt(space, pr.MACs(0.6), job.metric, step=0.2, folder="out")


def _depth() -> None:
    from source import job

    import prunella as pr

    pr.search.greedy_blocks(job.deep(), job.batch(), job.metric, count=2, folder="out")


def _train() -> None:
    from source import job

    import prunella as pr
    from prunella.recovery import checkpoint

    checkpoint.SECONDS = 0.0
    training = pr.recovery.Training(checkpoint="out.safetensors")
    pr.finetune(job.made(0), job.data(), job.loss, steps=3, lr=0.1, training=training)


def _compare() -> None:
    from source import job

    import prunella as pr

    def pruned(seed: int) -> nn.Module:
        model: nn.Module = job.made(seed)
        return model

    def width(model: nn.Module) -> float:
        weights: list[Tensor] = list(model.parameters())
        return float(weights[0].sum())

    pr.experiments.compare(job.made(0), {"other": pruned}, {"width": width}, seeds=(0, 1), folder="out")


def _prune() -> None:
    import random

    from source import job

    import prunella as pr

    random.seed(0)  # which a forked process seeds anew, and what is kept holds
    pr.prune(_net(), job.batch(), target=pr.MACs(0.6), data=job.data(), recover={"steps": 3}, folder="out")


VERBS = (
    Verb("plan", _line("plan", *NET, "--target", "macs=0.6", "-o", "out.plan"), check=_line("show", "out.plan")),
    Verb("export", _line("export", *NET, "-o", "out.safetensors", "--overwrite")),
    Verb("inspect", _line("inspect", *NET, "--html", "out.html", "--overwrite")),
    Verb("save", _save, again=(0, 2), check=VERIFY),
    Verb("save over", lambda: _save(overwrite=True), _save, check=VERIFY),
    Verb("scan", _line("scan", *NET, "--ratios", "0.5", "--metric", "source.job:metric", "-o", "out")),
    Verb("prune", _prune),
    Verb("imp", _imp),
    Verb("levels", _levels),
    Verb("netadapt", _netadapt),
    Verb("depth", _depth),
    Verb("train", _train),
    Verb("compare", _compare),
    Verb("pareto", _pareto, shares=True),
    Verb(
        "llm", _line("llm", "source/llama", "--data", "source.job:tokens", *SHORT, "-o", "out"), _llama, (0, 2), VERIFY
    ),
    Verb("llm auto", _line("llm", "source/llama", *OWN_TEXT, "-o", "out"), _llama, (0, 2), VERIFY),
    Verb("llm over", lambda: _one_shot(overwrite=True), _prepared_llm, check=VERIFY),
    Verb("run", _line(*RUN, "--recover", "bn,reconstruct,distill:3"), again=(0, 2), check=VERIFY),
    Verb("run over", _line(*RUN, "--recover", "bn", "--overwrite"), _line(*RUN, "--skip", "0"), check=VERIFY),
)


def make_source(home: Path) -> None:
    """What all verbs read."""
    shutil.rmtree(home, ignore_errors=True)
    (home / "source").mkdir(parents=True)
    (home / "source" / "__init__.py").touch()
    (home / "source" / "job.py").write_text(JOB)
