"""The instructions of a model's source that a run executes, and the modules that it calls.

Two runs that differ in them have taken different branches.
"""

from __future__ import annotations

import dis
import gc
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn

_PATHS = sysconfig.get_paths()
_SKIPPED = (
    "<",
    f"{Path(torch.__file__).parent}{os.sep}",
    f"{Path(__file__).parents[1]}{os.sep}",
)
"""Code of torch and of this package, and code without a file."""
_LEAVES = frozenset({"RETURN_VALUE", "RAISE_VARARGS", "RERAISE", "YIELD_VALUE", "RETURN_GENERATOR"})
"""Instructions after which another block begins, beside the jumps."""


@dataclass(frozen=True)
class ExecutedSteps:
    """What has run. places: function -> its lines, as negative numbers, or its instructions. modules: identities."""

    places: dict[CodeType, set[int]] = field(default_factory=dict)
    modules: set[int] = field(default_factory=set)

    def __le__(self, other: ExecutedSteps) -> bool:
        """Whether all of this is in `other`."""
        known = all(code in other.places and places <= other.places[code] for code, places in self.places.items())
        return known and self.modules <= other.modules

    def add(self, other: ExecutedSteps) -> None:
        """Add what has run in another run."""
        self.modules.update(other.modules)
        for code, places in other.places.items():
            self.places.setdefault(code, set()).update(places)


@contextmanager
def executed(model: nn.Module) -> Iterator[ExecutedSteps]:
    """Inside, collect the instructions that run outside of torch, this package and Python, and the modules called.

    A line stands for its instructions where none of them runs without the others. No garbage is collected meanwhile:
    callbacks and finalizers of other libraries would run at moments that have nothing to do with the model.
    """
    steps = ExecutedSteps()
    tracers: dict[int, Callable[..., Any] | None] = {}  # by identity: a function of many constants is slow to hash

    def entered(frame: FrameType, _: str, __: Any) -> Any:
        code = frame.f_code
        if id(code) not in tracers:
            tracers[id(code)] = _tracer(code, steps) if is_source(code.co_filename) else None
        return tracers[id(code)]

    handles = [module.register_forward_pre_hook(lambda m, _: steps.modules.add(id(m))) for module in model.modules()]
    before, collects = sys.gettrace(), gc.isenabled()
    gc.disable()
    sys.settrace(entered)
    try:
        yield steps
    finally:
        sys.settrace(before)
        if collects:
            gc.enable()
        for handle in handles:
            handle.remove()


def _tracer(code: CodeType, steps: ExecutedSteps) -> Callable[..., Any] | None:
    """What follows a function that runs; None where it has no branch."""
    places = steps.places.setdefault(code, set())
    mixed = _mixed_lines(code)
    if mixed is None:
        places.add(0)
        return None

    def each(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            places.add(-frame.f_lineno)
            frame.f_trace_opcodes = frame.f_lineno in mixed
        elif event == "opcode":
            places.add(frame.f_lasti)
        return each

    return each


@cache
def _mixed_lines(code: CodeType) -> frozenset[int] | None:
    """The lines of which some instructions may run without the others; None if the function has no branch at all."""
    blocks: dict[int | None, set[int]] = {}
    line, block, begins = None, 0, False
    for entry in dis.get_instructions(code):
        line = entry.positions.lineno if entry.positions else line
        block += begins or entry.is_jump_target
        blocks.setdefault(line, set()).add(block)
        begins = entry.opcode in _JUMPS or entry.opname in _LEAVES
    return frozenset(n for n, several in blocks.items() if n is not None and len(several) > 1) if block else None


_JUMPS = frozenset({*dis.hasjrel, *dis.hasjabs})


@cache
def is_source(path: str) -> bool:
    """Whether a file is neither of torch, nor of this package or of Python."""
    library = path.startswith((_PATHS["stdlib"], _PATHS["platstdlib"])) and "site-packages" not in path
    return not library and not path.startswith(_SKIPPED)
