"""The steps of a run through a model's source, from place to place, and the modules that it calls.

Two runs that differ in them have taken different branches, or another number of turns of a loop.
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
from torch.nn.modules.module import register_module_forward_pre_hook

_PATHS = sysconfig.get_paths()
_SKIPPED = (
    "<",
    f"{Path(torch.__file__).parent}{os.sep}",
    f"{Path(__file__).parents[1]}{os.sep}",
)
"""Code of torch and of this package, and code without a file."""
_LEAVES = frozenset({"RETURN_VALUE", "RAISE_VARARGS", "RERAISE", "YIELD_VALUE", "RETURN_GENERATOR"})
"""Instructions after which another block begins, beside the jumps."""
_OF_ATTRIBUTES = frozenset({"__getattribute__", "__getattr__", "__setattr__"})
"""Functions that run at every access to an attribute, as in a configuration: what they do is no branch of a model."""
Step = int
"""From one place of a function to the next: both in one number, negative if the step is taken again in one call."""
_WIDTH = 32
"""Bits of a place: the number of a line, or of an instruction, and which of the two."""


@dataclass(frozen=True)
class ExecutedSteps:
    """What has run. steps: by function. modules: identities."""

    steps: dict[CodeType, set[Step]] = field(default_factory=dict)
    modules: set[int] = field(default_factory=set)

    def __le__(self, other: ExecutedSteps) -> bool:
        """Whether all of this is in `other`."""
        known = all(code in other.steps and steps <= other.steps[code] for code, steps in self.steps.items())
        return known and self.modules <= other.modules

    def add(self, other: ExecutedSteps) -> None:
        """Add what has run in another run."""
        self.modules.update(other.modules)
        for code, steps in other.steps.items():
            self.steps.setdefault(code, set()).update(steps)


@contextmanager
def executed(model: nn.Module) -> Iterator[ExecutedSteps]:
    """Inside, collect the steps that run outside of torch, this package and Python, and the modules called.

    That an instruction was passed over shows in the step beside it, and a second turn of a loop as a step taken again.
    A line stands for its instructions where none of them runs without the others. No garbage is collected meanwhile:
    callbacks and finalizers of other libraries would run at moments that have nothing to do with the model.
    """
    executed_steps = ExecutedSteps()
    followed: dict[int, _Function | None] = {}  # by identity: a function of many constants is slow to hash

    def entered(frame: FrameType, _: str, __: Any) -> Any:
        code = frame.f_code
        if id(code) not in followed:
            own = is_source(code.co_filename) and code.co_name not in _OF_ATTRIBUTES
            followed[id(code)] = _function(code, executed_steps) if own else None
        function = followed[id(code)]
        return function.tracer() if function else None

    own = {id(module) for module in model.modules()}

    def called(module: nn.Module, _: Any) -> None:
        if id(module) in own:
            executed_steps.modules.add(id(module))

    handle = register_module_forward_pre_hook(called)
    before, collects = sys.gettrace(), gc.isenabled()
    gc.disable()
    sys.settrace(entered)
    try:
        yield executed_steps
    finally:
        sys.settrace(before)
        if collects:
            gc.enable()
        handle.remove()


@dataclass(frozen=True)
class _Function:
    """A function with branches: the lines that are followed by instruction, and its steps so far."""

    mixed: frozenset[int]
    steps: set[Step]

    def tracer(self) -> Callable[..., Any]:
        """Follow one call of the function."""
        mixed, steps, here, last = self.mixed, self.steps, set[int](), 0

        def each(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal last
            if event == "line":
                place = frame.f_lineno << 1
                if mixed:
                    frame.f_trace_opcodes = place >> 1 in mixed
            elif event == "opcode":
                place = frame.f_lasti << 1 | 1
            else:
                steps.update(here)
                return each
            step = last << _WIDTH | place
            last = place
            if step in here:
                steps.add(-step)
            else:
                here.add(step)
            return each

        return each


def _function(code: CodeType, executed_steps: ExecutedSteps) -> _Function | None:
    """What follows a function that runs; None where it has no branch."""
    steps, mixed = executed_steps.steps.setdefault(code, set()), _mixed_lines(code)
    if mixed is None:
        steps.add(0)
        return None
    return _Function(mixed, steps)


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
