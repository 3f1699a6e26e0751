"""One way to run a round of faults over verbs, and to tell what was not survived."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

from tests.faults.processes import working_folder
from tests.faults.verbs import VERBS, Verb

Cases = Iterator[tuple[str, Callable[[], str]]]
"""What is tried, and what tries it: it tells what was wrong, an empty text if nothing was. Each before the next one."""


@dataclass(frozen=True)
class Effort:
    """most: faults of a kind, 0 for all. seed: of what is random."""

    most: int = 0
    seed: int = 0


@dataclass(frozen=True)
class Round:
    """name: of the round. cases: of a verb in a home. most: faults of a kind if nobody says; 0 for all."""

    name: str
    cases: Callable[[Verb, Path, Effort], Cases]
    most: int = 0


def main(rounds: Sequence[Round], description: str | None, words: Sequence[str] | None = None) -> int:
    """The command line of some rounds. Exit code 1 if anything was not survived."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verbs", default=",".join(verb.name for verb in VERBS))
    parser.add_argument("--most", type=int, help="faults of a kind, 0 for all")
    parser.add_argument("--first", type=int, default=0, help="number of the first fault: processes can share a verb")
    parser.add_argument("--stride", type=int, default=1, help="every so-many-th fault")
    parser.add_argument("--seed", type=int, default=0, help="of what is random")
    asked = parser.parse_args(words)
    prepare()
    failures = 0
    for verb in (verb for verb in VERBS if verb.name in asked.verbs.split(",")):
        with working_folder() as place:  # one for all rounds, which share what is made once
            for round_ in rounds:
                effort = Effort(round_.most if asked.most is None else asked.most, asked.seed)
                failures += told(round_, verb, round_.cases(verb, place / "home", effort), asked.first, asked.stride)
    return int(failures > 0)


@cache
def prepare() -> None:
    """What all forks share: one thread, and the libraries."""
    os.environ["OMP_NUM_THREADS"] = "1"
    warnings.simplefilter("ignore")
    import torch
    import typer.main

    import prunella as pr
    import prunella.cli.app

    torch.set_num_threads(1)
    _ = pr.plan, pr.lottery.imp, pr.experiments.pareto, pr.llm.solve_folder, prunella.cli.app
    typer.main.get_command = cache(typer.main.get_command)  # as long as a whole verb
    draw_each_chart_once()
    couple_each_model_once()
    trace_each_block_once()
    time_each_model_once()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def draw_each_chart_once() -> None:
    """A page has the charts of the first one, whose numbers are times: drawing takes longer than the whole run."""
    from prunella.reporting import chart

    draw, drawn = chart.figure, dict[tuple[str, float, float], Any]()

    def once(tag: str, shapes: Any, width: float, height: float) -> Any:
        if (tag, width, height) not in drawn:
            drawn[tag, width, height] = draw(tag, shapes, width, height)
        return drawn[tag, width, height]

    chart.figure = once


def couple_each_model_once() -> None:
    """The graph of a model is that of the first run of the same model: it takes a quarter of the time of a scan."""
    from prunella.io.identity import digest_of, model_parts
    from prunella.planning import request

    couple, coupled = request.couple, dict[str, Any]()

    def once(model: Any, inputs: Any, others: Any = (), arguments: Any = ()) -> Any:
        key = digest_of([model_parts(model), inputs, list(others), list(arguments)])
        if key not in coupled:
            coupled[key] = couple(model, inputs, others, arguments)
        return coupled[key]

    request.couple = once


def trace_each_block_once() -> None:
    """Layers and memory of a block are found in the first run: both take longer than all that is written."""
    from prunella.llm.streaming import runner

    trace, traced = runner.layers_of, dict[str, Any]()

    def once(model: Any, path: str, call: Any, skip: Any) -> Any:
        if path not in traced:
            traced[path] = trace(model, path, call, skip)
        return traced[path]

    runner.layers_of = once
    work, sizes = runner.StreamingRun._work, dict[str, int]()

    def known(run: Any, path: str, call: Any) -> int:
        if path not in sizes:
            sizes[path] = work(run, path, call)
        return sizes[path]

    runner.StreamingRun._work = known  # type: ignore[method-assign]


def time_each_model_once() -> None:
    """Both models are timed in the first run, and called once in the others: it takes half of the time of a run."""
    from prunella.measure import timing

    measure, measured = timing._measure, dict[tuple[Any, ...], Any]()

    def once(candidates: Any, rounds: int, *how: Any) -> Any:
        for candidate in candidates.values():
            candidate()
        if (*candidates, rounds) not in measured:
            measured[*candidates, rounds] = measure(candidates, rounds, *how)
        return measured[*candidates, rounds]

    timing._measure = once


def told(round_: Round, verb: Verb, cases: Cases, first: int, stride: int) -> int:
    """Print what was not survived, and a line at the end; how many."""
    failures = number = 0
    for number, (what, tried) in enumerate(islice(cases, first, None, stride), 1):
        if number % 25 == 0:
            print(f"{round_.name}, {verb.name}: {number}", file=sys.stderr, flush=True)
        if wrong := tried():
            failures += 1
            print(f"{round_.name}, {verb.name}, {what}: {wrong}", flush=True)
    print(f"{round_.name}, {verb.name}: {number} faults, {failures} not survived", flush=True)
    return failures
