"""`pr.prune` against Torch-Pruning 1.6.1 at its best: the same weights, MACs, batches, loss and steps; equal seconds.

    python benchmarks/compare.py [--only resnet20-0.5 ...] [--seeds 0 1 2] [--table]

Each cell (network, share of the MACs, seed, method) is one file in benchmarks/results/compare, so that a run goes on
where it was stopped; `--table` writes benchmarks/results/compare.md and docs/benchmarks.md from the cells that are
there. The referee of MACs is torch's own counter. Seconds are CPU seconds of one thread. Both networks get the same
distillation (`T^2 KL`, T = 2, Nesterov SGD, no labels) and channels_last; in equal seconds the peer gets as many steps
as fit into the seconds that prunella took in all, and beside what prunella has before its distillation as many as fit
into the seconds until then. The seeds draw the batches.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from cells import RESULTS, once, spread, write
from rival import rival_cut
from subjects import Subject, subjects
from torch import Tensor, nn
from training import count_macs, count_params

import prunella as pr

CELLS, WEIGHTS = RESULTS / "compare", RESULTS / "cells"
PAGE, MARKS = (
    Path(__file__).parents[1] / "docs" / "benchmarks.md",
    ("<!-- measured: compare -->", "<!-- end: compare -->"),
)
RATE, TEMPERATURE = 0.02, 2.0
PEER = "Torch-Pruning"
Cell = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One network, one share of its MACs, one seed."""

    key: str
    subject: Subject
    share: float
    seed: int

    def path(self, method: str) -> Path:
        """Of the cell of a method."""
        return CELLS / f"{self.key}-{self.share:g}-{method}-{self.seed}.json"

    def example(self, batches: Sequence[Any]) -> Any:
        """What is counted: the first batch where the network has no fixed input."""
        return batches[0] if self.subject.example is None else self.subject.example

    def macs(self, model: nn.Module, example: Any) -> int:
        """By torch's counter."""
        if isinstance(example, Tensor):
            return count_macs(model, example)
        return count_macs(_Called(model), example)


class _Called(nn.Module):
    """A model that takes its keyword arguments as one mapping."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> Any:
        return self.model(**batch)


@dataclass
class _Seen:
    """Runs the models, and copies the small one when the stages before distillation are done."""

    run: Callable[[nn.Module, Any], Any]
    last: nn.Module | None = None
    before: nn.Module | None = None
    copying: float = 0.0
    reached: float = 0.0

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        self.last = model
        return self.run(model, batch)

    def on_stage(self, progress: Any) -> None:
        """Called by `pr.prune`."""
        if progress.stage in ("reconstruct", "bn") and progress.done == progress.total:
            self.reached = time.process_time() - self.copying
            self.before = copy.deepcopy(self.last)
            self.copying += time.process_time() - self.copying - self.reached


def ours(case: Case) -> Cell:
    """`pr.prune` with its defaults; what it gives before and after distillation, and its seconds."""
    subject, dense = case.subject, case.subject.dense()
    batches = subject.batches(subject.count, case.seed)
    example, seen = case.example(batches), _Seen(subject.loss or (lambda model, batch: model(batch)))
    one_pass, call = _pass_seconds(seen, dense, batches), pr.prune  # reading the name imports what it needs
    start = time.process_time()
    recover: Any = {"steps": subject.steps} if subject.steps else "reconstruct"
    pruned = call(
        dense, example, target=pr.MACs(case.share), data=batches, loss=seen, recover=recover, seed=case.seed,
        on_stage=seen.on_stage,
    )  # fmt: skip
    seconds = time.process_time() - start - seen.copying
    assert seen.before is not None
    cell = _size(case, pruned.model, dense, example)
    cell |= {
        "seconds": seconds,
        "seconds to prune": seen.reached - start,
        "seconds of a dense pass": one_pass,
        "stages": [[s.name, s.seconds, s.after, s.note] for s in pruned.history],
    }
    cell["label-free"] = _tested(subject, seen.before)
    return cell | ({"recovered": _tested(subject, pruned.model)} if subject.steps else {})


def _pass_seconds(run: Callable[[nn.Module, Any], Any], dense: nn.Module, batches: Sequence[Any]) -> float:
    """Of the dense network on one batch: how fast the machine is, with whatever runs beside."""
    with torch.no_grad():
        run(dense, batches[0])
        start = time.process_time()
        for batch in batches[:4]:
            run(dense, batch)
    return (time.process_time() - start) / len(batches[:4])


def cut_of_peer(case: Case) -> Cell:
    """Torch-Pruning's cut, which no seed changes: the pruned network is kept beside the cells."""
    subject, dense = case.subject, case.subject.dense()
    cut = rival_cut(
        dense, subject.example, budget=case.share * count_macs(dense, subject.example), last=subject.last,
        spare=subject.spare,
    )  # fmt: skip
    torch.save(cut.model, _peer_file(case))
    return _size(case, cut.model, dense, subject.example) | {
        "seconds": cut.seconds, "scope": cut.scope, "cut": _tested(subject, cut.model),
    }  # fmt: skip


def _step_of_peer(case: Case) -> float:
    """Seconds of one step: the least over the seeds, since work beside a run makes it slower."""
    cells = [_read(path) for path in sorted(CELLS.glob(f"{case.key}-{case.share:g}-peer-steps-*.json"))]
    return float(min(cell["distilling"] / cell["steps"] for cell in cells))


def _peer_file(case: Case) -> Path:
    WEIGHTS.mkdir(parents=True, exist_ok=True)
    return WEIGHTS / f"{case.key}-{case.share:g}-peer.pt"


def distilled_peer(case: Case, steps: int, cut: Cell) -> Cell:
    """The peer's cut after as many steps, on the batches that prunella distilled with first."""
    subject, dense = case.subject, case.subject.dense()
    small = torch.load(_peer_file(case), weights_only=False).to(memory_format=torch.channels_last)
    most = max(subject.count, math.ceil(steps * 4 / 3))
    batches = subject.batches(most, case.seed)
    first, rest = [b for k, b in enumerate(batches) if k % 4 != 1], [b for k, b in enumerate(batches) if k % 4 == 1]
    start = time.process_time()
    distill(small, dense, (first + rest)[:steps])
    seconds = time.process_time() - start
    return {
        "steps": steps, "seconds": cut["seconds"] + seconds, "distilling": seconds,
        "recovered": _tested(subject, small),
    }  # fmt: skip


def distill(model: nn.Module, teacher: nn.Module, batches: Sequence[Tensor]) -> None:
    """What `pr.prune` does, without looks at held-out batches: the state behind the last step counts."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), RATE, momentum=0.9, nesterov=True)
    loss = pr.recovery.distill_logits(teacher, temperature=TEMPERATURE)
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 + math.cos(math.pi * (step + 0.5) / len(batches))) / 2
        optimizer.zero_grad()
        loss(model, batch).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
    model.eval()


def _size(case: Case, small: nn.Module, dense: nn.Module, example: Any) -> Cell:
    return {
        "share of MACs": case.macs(small, example) / case.macs(dense, example),
        "share of parameters": count_params(small) / count_params(dense),
    }


def _tested(subject: Subject, model: nn.Module) -> Any:
    """Percent and, as one string, which samples; or the numbers of the test."""
    found = subject.test(model.eval())
    if isinstance(found, dict):
        return found
    return {"percent": 100 * mean(found), "samples": "".join("01"[value] for value in found)}


def run(case: Case) -> None:
    """All cells of a case."""
    say = f"{case.key} {case.share:g} seed {case.seed}"
    dense = once(CELLS / f"{case.key}-dense.json", lambda: _tested(case.subject, case.subject.dense()))
    mine = once(case.path("prunella"), lambda: ours(case))
    print(say, "prunella", _short(dense), _short(mine["label-free"]), _short(mine.get("recovered")), flush=True)
    if not case.subject.steps:
        return
    shared = Case(case.key, case.subject, case.share, -1)
    if not _peer_file(case).is_file():
        shared.path("peer").unlink(missing_ok=True)
    cut = once(shared.path("peer"), lambda: cut_of_peer(case))
    equal = once(case.path("peer-steps"), lambda: distilled_peer(case, case.subject.steps, cut))
    each = _step_of_peer(case)
    steps = max(case.subject.steps, int((mine["seconds"] - cut["seconds"]) / each))
    longer = once(case.path("peer-seconds"), lambda: distilled_peer(case, steps, cut))
    few = max(1, math.ceil((mine["seconds to prune"] - cut["seconds"]) / each))
    shorter = once(case.path("peer-prune"), lambda: distilled_peer(case, few, cut))
    results = (cut["cut"], equal["recovered"], longer["recovered"], shorter["recovered"])
    print(say, PEER, *map(_short, results), f"in 0, {case.subject.steps}, {steps} and {few} steps", flush=True)


def _short(result: Any) -> str:
    if result is None:
        return "-"
    return f"{result['percent']:.2f}" if "percent" in result else " / ".join(f"{v:.2f}" for v in result.values())


# -- the table -----------------------------------------------------------------------------------------------------


def table(cases: Sequence[Case]) -> str:
    """One row for each network and share with a cell."""
    lines = [
        "| network, share of the MACs | seeds | dense | label-free | distilled | peer, equal steps "
        "| peer, equal seconds | minus peer, steps | minus peer, seconds | label-free minus peer, seconds "
        "| CPU s to prune / in all |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    keys = dict.fromkeys((case.key, case.share) for case in cases)
    for key, share in keys:
        mine = [case for case in cases if (case.key, case.share) == (key, share) and case.path("prunella").is_file()]
        if mine:
            lines.append(_row(mine))
    return "\n".join(lines)


def _row(cases: Sequence[Case]) -> str:
    case, cells = cases[0], [_read(case.path("prunella")) for case in cases]
    dense = _read(CELLS / f"{case.key}-dense.json")
    ways = ("peer-steps", "peer-seconds", "peer-prune")
    peers = {way: [_read(c.path(way)) for c in cases if c.path(way).is_file()] for way in ways}
    entries = [
        f"{case.subject.name}, {case.share:.0%} ({mean(c['share of MACs'] for c in cells):.1%})",
        str(len(cases)), _short(dense),
        _values([cell["label-free"] for cell in cells]), _values([c["recovered"] for c in cells if "recovered" in c]),
        *(_values([cell["recovered"] for cell in peers[way]]) for way in ways[:2]),
        *(_difference(cells, peers[way], "recovered") for way in ways[:2]),
        _difference(cells, peers["peer-prune"], "label-free"),
        " / ".join(f"{mean(cell[name] for cell in cells):.0f}" for name in ("seconds to prune", "seconds")),
    ]  # fmt: skip
    return f"| {' | '.join(entries)} |"


def _values(results: Sequence[Any]) -> str:
    if not results:
        return ""
    names = ["percent"] if "percent" in results[0] else list(results[0])
    columns = [[result[name] for result in results] for name in names]
    return " / ".join(spread(values) if len(values) > 1 else f"{values[0]:.2f}" for values in columns)


def _difference(cells: Sequence[Cell], peers: Sequence[Cell], name: str) -> str:
    """Mean over seeds, with a 95 % interval: of the images (paired, averaged over seeds) and of the seeds together."""
    if len(peers) < len(cells) or not peers:
        return ""
    pairs = [(_flags(a[name]), _flags(b["recovered"])) for a, b in zip(cells, peers, strict=True)]
    each = [100 * float((a - b).mean()) for a, b in pairs]
    by_image = torch.stack([a - b for a, b in pairs]).mean(0)
    error = 100 * float(by_image.std()) / math.sqrt(len(by_image))
    if len(each) > 1:
        error = math.hypot(error, stdev(each) / math.sqrt(len(each)))
    return f"{mean(each):+.2f} ± {1.96 * error:.2f}"


def _flags(result: Any) -> Tensor:
    return torch.tensor([float(flag) for flag in result["samples"]])


def _read(path: Path) -> Any:
    return once(path, dict)


def publish(cases: Sequence[Case]) -> None:
    """The table beside the cells, and in the documentation."""
    text = table(cases)
    print(text)
    write(RESULTS / "compare.md", text + "\n")
    before, mark, rest = PAGE.read_text(encoding="utf-8").partition(MARKS[0])
    if mark:
        write(PAGE, f"{before}{mark}\n{text}\n{MARKS[1]}{rest.partition(MARKS[1])[2]}")


def main() -> None:
    """Run the cells that are missing, then write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="such as resnet20-0.5; all by default")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--table", action="store_true", help="only write the table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases = [
        Case(key, subject, share, seed)
        for seed in options.seeds
        for key, subject in subjects(WEIGHTS).items()
        for share in subject.shares
    ]
    for case in [] if options.table else cases:
        if not options.only or f"{case.key}-{case.share:g}" in options.only:
            run(case)
    publish(cases)


if __name__ == "__main__":
    main()
