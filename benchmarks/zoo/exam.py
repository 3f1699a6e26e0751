"""What one model of the zoo has to pass: couple, cut 30 % of every group, compare, store, load, export."""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import judge
import second
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import prunella as pr
from prunella.graph.data import ReasonKind
from prunella.graph.solve.groups import couple
from prunella.planning.reach import WIDER, in_program, reach

Build = Callable[[], tuple[nn.Module, Any]]
OUTPUTS = "outputs.safetensors"
EXACT, SINGLE = 1e-9, 1e-4
ROUNDINGS = 4
"""Both models round: where float32 alone moves the output by more than `SINGLE`, so many times that is allowed."""
SHARE = 0.3
LITTLE = 0.5
"""Of the parameters: a model with less within reach is captured as a program too, which takes seconds."""
SORTED = "detection."
"""Boxes are sorted by scores that random weights make nearly equal: in float32 rounding decides, so float64 judges."""


@dataclass(frozen=True)
class Exam:
    """One model, one tool. `verdict`: exact, refused, wrong (a silent error), traceback or time."""

    suite: str
    name: str
    tool: str
    verdict: str = "time"
    why: str = ""
    params: int = 0
    params_left: float = 1.0
    macs_left: float = 1.0
    reach: float = 0.0
    groups: int = 0
    units: int = 0
    set_aside: int = 0
    asked: float = SHARE
    got: float = 0.0
    error64: float = -1.0
    error32: float = -1.0
    noise32: float = 0.0
    """How far the smaller or the dense model in float32 is from itself in float64; where `error32` is large."""
    couple_s: float = 0.0
    prune_s: float = 0.0
    reload: str = ""
    exported: str = ""
    onnx: str = ""
    frozen: tuple[tuple[str, int], ...] = ()
    others: tuple[tuple[str, str], ...] = ()
    """Kinds of units beyond channels and heads that the model has: `exact` by the tool's own check, or why not."""
    plan_cpu_s: float = 0.0
    """Processor time of `plan` alone, after the model was coupled once."""
    second: tuple[tuple[str, str], ...] = ()
    """Second batch, second size, gradients, training step: `exact`, `not taken` by the dense model, or what differs."""
    reach_wide: float = 0.0
    """`reach` with widths and experts, which change what a norm or a router sees."""
    reach_program: float | None = None
    """`reach` as a program, where little else is and sizes of the source keep many parameters."""


def examine(
    suite: str, name: str, build: Build, *, full: bool, onnx: bool, scratch: Path, factory: str
) -> dict[str, Any]:
    """Try prunella on one model."""
    model, inputs = build()
    judge.settle(model)
    facts: dict[str, Any] = {"params": sum(p.numel() for p in model.parameters())}
    start = time.perf_counter()
    try:
        graph = couple(model, inputs)
        facts["couple_s"] = time.perf_counter() - start
        plain = [group for group in graph.groups if group.kind in ("channel", "head")]
        facts |= {"groups": len(plain), "units": sum(g.size for g in plain), "reach": _reach(graph, plain)}
        facts |= {"frozen": _reasons(graph.frozen), "reach_wide": reach(graph, WIDER)}
        start = time.perf_counter()
        kinds, begun = (pr.Channel(), pr.Head()), time.process_time()
        plan = pr.plan(model, inputs, pr.Recipe(pr.criteria.random, kinds, pr.uniform), target=pr.Sparsity(SHARE))
        facts["plan_cpu_s"] = time.process_time() - begun
        small = pr.shrink(model, plan)
        facts["prune_s"] = time.perf_counter() - start
    except pr.PruningError as error:
        if facts.get("groups") == 0:  # all units lie along norms: do they go by themselves?
            facts["others"] = _others(model, inputs, graph, ("width", "expert"))
        return asdict(Exam(suite, name, "prunella", "refused", " ".join(str(error).split())[:300], **facts))
    except Exception as error:
        return asdict(Exam(suite, name, "prunella", "traceback", f"{type(error).__name__}: {error}"[:300], **facts))
    facts |= {"got": plan.got, "macs_left": plan.after.macs / max(plan.before.macs, 1), "frozen": _reasons(plan.frozen)}
    facts["params_left"] = sum(p.numel() for p in small.parameters()) / facts["params"]
    facts["set_aside"] = sum(f.kind is ReasonKind.UNPROVEN for f in plan.frozen)
    facts |= _compare(model, small, inputs, sorts=name.startswith(SORTED))
    kinds_of_units = ("width", "expert") if suite == "wild" else tuple(OTHERS)
    facts["others"] = _others(model, inputs, graph, kinds_of_units)
    if suite == "wild":
        facts |= _beyond(model, small, inputs, graph)
    if full and facts["verdict"] == "exact":
        facts["exported"] = _export(small, inputs, scratch / "model.pt2")
        facts["onnx"] = _export(small, inputs, scratch / "model.onnx") if onnx else ""
        facts["reload"] = _store(small, plan, model, inputs, scratch, factory, name.startswith(SORTED))
    return asdict(Exam(suite, name, "prunella", **facts))


def _compare(model: nn.Module, small: nn.Module, inputs: Any, *, sorts: bool) -> dict[str, Any]:
    try:
        found = {f"error{bits}": judge.error(model, small, inputs, wide=bits == 64) for bits in (64, 32)}
    except judge.Unreadable as error:
        return {"verdict": "wrong", "why": str(error)}
    except Exception as error:
        return {"verdict": "wrong", "why": f"the cut model does not run: {type(error).__name__}: {error}"[:300]}
    wide = judge.runs_wide(model, inputs)
    if wide and found["error32"] > SINGLE:
        both = [judge.distance(judge.run(m, inputs), judge.run_wide(m, inputs)) for m in (small, model)]
        found["noise32"] = max(both)
    single = max(SINGLE, ROUNDINGS * found.get("noise32", 0.0))
    exact = found["error64"] <= (EXACT if wide else SINGLE) and (found["error32"] <= single or (sorts and wide))
    return {**found, "verdict": "exact" if exact else "wrong"}


def _beyond(model: nn.Module, small: nn.Module, inputs: Any, graph: Any) -> dict[str, Any]:
    """The second batch and size, gradients and training, and the reach as a program."""
    facts: dict[str, Any] = {"second": second.examine(model, small, inputs)}
    if any(text.startswith("differs") for _, text in facts["second"]):
        facts |= {"verdict": "wrong", "why": str(facts["second"])}
    try:
        facts["reach_program"] = in_program(model, inputs, graph) if reach(graph, WIDER) < LITTLE else None
    except Exception as error:
        facts |= {"verdict": "traceback", "why": f"as a program: {type(error).__name__}: {error}"[:300]}
    return facts


def _others(model: nn.Module, inputs: Any, graph: Any, tried: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """The same share of every width, of the experts, of the blocks and of the tokens, each kind alone."""
    kinds = {group.kind for group in (*graph.groups, *graph.stacks)} & {*tried}
    found = []
    for kind in sorted(kinds):
        granularity = OTHERS[kind](graph)
        target = None if kind == "vocabulary" else pr.Sparsity(SHARE)
        try:
            plan = pr.plan(model, inputs, pr.Recipe(pr.criteria.random, granularity), target=target)
            pr.shrink(model, plan)
            found.append((kind, "exact"))
        except pr.PruningError as error:
            found.append((kind, f"refused: {' '.join(str(error).split())}"[:200]))
        except Exception as error:
            found.append((kind, f"traceback: {type(error).__name__}: {error}"[:200]))
    return tuple(found)


OTHERS: dict[str, Callable[[Any], Any]] = {
    "width": lambda graph: pr.Width(),
    "expert": lambda graph: pr.Expert(),
    "block": lambda graph: pr.Depth(),
    "vocabulary": lambda graph: pr.granularity.Vocabulary(tuple(range(0, graph.tokens.size, 2))),
}


def _reach(graph: Any, groups: Any) -> float:
    """Part of the parameters that would be gone if every group kept one unit."""
    keep = {g.name: torch.arange(g.size) == 0 for g in groups}
    return 1 - graph.params(keep) / max(graph.params(), 1)


def _reasons(frozen: Any) -> tuple[tuple[str, int], ...]:
    found: Counter[str] = Counter()
    for item in frozen:
        found[f"{item.reason} ({item.where})" if item.where else item.reason] += item.count
    return tuple(found.most_common(5))


def _export(small: nn.Module, inputs: Any, file: Path) -> str:
    try:
        pr.export(copy.deepcopy(small), file, inputs=inputs)
        return "yes"
    except pr.PruningError as error:
        return f"refused: {' '.join(str(error).split())[:160]}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:160]
    finally:
        file.unlink(missing_ok=True)


def _store(
    small: nn.Module, plan: pr.Plan, dense: nn.Module, inputs: Any, scratch: Path, factory: str, wide: bool
) -> str:
    """Write the artifact and the outputs; `reload` reads them in a process of its own."""
    try:
        pr.save(small, scratch / "model", plan=plan, dense=dense, factory=factory)
        outputs = _answers(small, inputs, wide)
        save_file({str(k): t.contiguous().clone() for k, t in enumerate(outputs)}, scratch / OUTPUTS)
        return "stored"
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]


def _answers(small: nn.Module, inputs: Any, wide: bool) -> list[torch.Tensor]:
    return judge.run_wide(small, inputs) if wide else judge.run(small, inputs)


def reload(build: Build, scratch: Path, factory: str, *, wide: bool) -> str:
    """Load the artifact, here without the weights of the dense model, and compare the outputs (`wide`: in float64)."""
    try:
        made = pr.load(scratch / "model", factory=factory)
        stored = load_file(scratch / OUTPUTS)
        found = _answers(made.eval(), build()[1], wide)
        gap = judge.distance(found, [stored[str(k)] for k in range(len(stored))])
        return "yes" if gap <= 1e-6 else f"outputs differ by {gap:.1e}"
    except Exception as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]
