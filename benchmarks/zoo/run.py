"""Every model of a suite in a process of its own; results as JSON, and as the table of the documentation.

    python benchmarks/zoo/run.py torchvision [PATTERN ...] [--full] [--rival] [--jobs 2] [--limit 300]
    python benchmarks/zoo/run.py table

Suites: torchvision, timm (the smallest model of each family), transformers (small configurations) and wild (packages of
PyPI). Weights are random, norm statistics too. `--full` stores, loads in a fresh process and exports as well; `--rival`
tries Torch-Pruning.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import json
import logging
import multiprocessing
import os
import resource
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import exam
import made
import torch

RESULTS = Path(__file__).parent / "results"
SUITES = {"torchvision": "vision", "timm": "families", "transformers": "hub", "wild": "wild"}
EVERY = 5
"""Of so many models one is written as ONNX too."""


def suite_module(suite: str) -> Any:
    """The module that lists and builds the models of a suite."""
    return importlib.import_module(SUITES[suite])


def one(suite: str, name: str, options: argparse.Namespace, scratch: Path, out: Path) -> None:
    """Examine one model and write the result; runs in a process of its own."""
    build = lambda: suite_module(suite).build(name)  # noqa: E731
    number = suite_module(suite).names().index(name)
    if options.memory:
        resource.setrlimit(resource.RLIMIT_AS, (options.memory << 30, options.memory << 30))
    try:
        if options.rival:
            import rival_zoo

            found = rival_zoo.examine(suite, name, build)
        else:
            onnx = options.full and number % EVERY == 0
            found = exam.examine(
                suite, name, build, full=options.full, onnx=onnx, scratch=scratch, factory=made.name(suite, number)
            )
    except Exception as error:
        if options.trace:
            traceback.print_exc()
        found = {"suite": suite, "name": name, "verdict": "not built", "why": f"{type(error).__name__}: {error}"[:300]}
    out.write_text(json.dumps(found, indent=1))


def again(suite: str, name: str, scratch: Path, out: Path) -> None:
    """Load what `one` stored; runs in a process of its own."""
    found = json.loads(out.read_text())
    factory = made.name(suite, suite_module(suite).names().index(name))
    wide = name.startswith(exam.SORTED)
    found["reload"] = exam.reload(lambda: suite_module(suite).build(name), scratch, factory, wide=wide)
    out.write_text(json.dumps(found, indent=1))


def run(suite: str, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """One model, with its time limit."""
    folder = RESULTS / (f"{suite}-rival" if options.rival else suite)
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / f"{name}.json"
    out.unlink(missing_ok=True)
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory(prefix="zoo-") as scratch:
        _await(fork.Process(target=one, args=(suite, name, options, Path(scratch), out)), options.limit)
        if out.exists() and json.loads(out.read_text()).get("reload") == "stored":
            _await(fork.Process(target=again, args=(suite, name, Path(scratch), out)), options.limit)
    if not out.exists():
        why = f"no answer in {options.limit:g} s of processor time"
        found = {"suite": suite, "name": name, "verdict": "time", "why": why}
        out.write_text(json.dumps(found, indent=1))
    found = json.loads(out.read_text())
    return dict(found)


def _await(process: Any, limit: float) -> None:
    """Wait until it ends, or has used so many seconds of a processor: what else the machine does costs it nothing."""
    process.start()
    end = time.monotonic() + 20 * limit
    while process.is_alive() and time.monotonic() < end and _used(process.pid) < limit:
        process.join(0.5)
    if process.is_alive():
        process.kill()
        process.join()


def _used(pid: int) -> float:
    """Seconds of processor time of a process and those that it waited for; 0 where the system does not say."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Run a suite, or write the table of all results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suite", choices=[*SUITES, "table"])
    parser.add_argument("patterns", nargs="*", default=["*"])
    parser.add_argument("--full", action="store_true", help="store, load and export too")
    parser.add_argument("--rival", action="store_true", help="Torch-Pruning in place of prunella")
    parser.add_argument("--trace", action="store_true", help="print tracebacks")
    parser.add_argument("--missing", action="store_true", help="only models without a result of this kind")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--memory", type=int, default=0, help="GiB of address space for a model, 0 for any")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds of processor time")
    options = parser.parse_args()
    if options.suite == "table":
        import table

        print(table.write(RESULTS))
        return
    torch.set_num_threads(1)
    if options.full:
        importlib.import_module("torch._dynamo")  # every export imports it: once here, not in each process
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    if options.suite == "wild":
        suite_module("wild").load(options.patterns)
    names = [n for n in suite_module(options.suite).names() if any(fnmatch.fnmatch(n, p) for p in options.patterns)]
    if options.missing:
        folder = RESULTS / (f"{options.suite}-rival" if options.rival else options.suite)
        names = [n for n in names if not _known(folder / f"{n}.json", full=options.full)]
    _all(options, names)


def _known(result: Path, *, full: bool) -> bool:
    """Whether a model has its result, and with `full` was loaded again too, unless it was refused."""
    if not result.exists():
        return False
    found = json.loads(result.read_text())
    return not full or bool(found.get("reload")) or found["verdict"] != "exact"


def _all(options: argparse.Namespace, names: list[str]) -> None:
    """So many at a time; threads only wait for their process."""
    from concurrent.futures import ThreadPoolExecutor

    start = time.perf_counter()
    with ThreadPoolExecutor(options.jobs) as pool:
        for found in pool.map(lambda name: run(options.suite, name, options), names):
            print(line(found), flush=True)
    print(f"{len(names)} models in {time.perf_counter() - start:.0f} s")


def line(found: dict[str, Any]) -> str:
    """One result in one line."""
    numbers = (
        f"{found['error64']:.0e} {found['error32']:.0e} left {found['params_left']:.2f} reach {found['reach']:.2f} "
        f"{found['groups']} groups {found['set_aside']} aside {found['couple_s']:.1f}+{found['prune_s']:.1f} s "
        f"got {found['got']:.3f} {found['reload']} {found['exported']} {found['onnx']}"
        if "error64" in found
        else ""
    )
    frozen = "; ".join(f"{count} {text}" for text, count in found.get("frozen", [])[:3])
    return f"{found['verdict']:9} {found['name']:40} {numbers} {found['why'][:200]} | {frozen[:300]}"


if __name__ == "__main__":
    main()
