"""The steps of a run through a model's source, from instruction to instruction, and the modules that it calls.

Two runs that differ in them have taken different branches, or another number of turns of a loop.
"""

from __future__ import annotations

import os
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn

Step = tuple[CodeType, int, int, bool] | int
"""From one instruction of a function to the next, and whether again; or the identity of a module that is called."""
_PATHS = sysconfig.get_paths()
_SKIPPED = (
    "<",
    f"{Path(torch.__file__).parent}{os.sep}",
    f"{Path(__file__).parents[1]}{os.sep}",
)
"""Code of torch and of this package, and code without a file."""


@contextmanager
def executed(model: nn.Module) -> Iterator[set[Step]]:
    """Inside, collect the steps that run outside of torch, this package and Python, and the modules called.

    That an instruction was passed over shows in the step beside it, and a second turn of a loop as a step taken again.
    """
    steps = set[Step]()

    def entered(frame: FrameType, _: str, __: Any) -> Any:
        code, last, here = frame.f_code, -1, set[tuple[int, int]]()
        if not is_source(code.co_filename):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False

        def each(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal last
            if event == "opcode":
                step = last, frame.f_lasti
                steps.add((code, *step, step in here))
                here.add(step)
                last = frame.f_lasti
            return each

        return each

    handles = [module.register_forward_pre_hook(lambda m, _: steps.add(id(m))) for module in model.modules()]
    before = sys.gettrace()
    sys.settrace(entered)
    try:
        yield steps
    finally:
        sys.settrace(before)
        for handle in handles:
            handle.remove()


def is_source(path: str) -> bool:
    """Whether a file is neither of torch, nor of this package or of Python."""
    library = path.startswith((_PATHS["stdlib"], _PATHS["platstdlib"])) and "site-packages" not in path
    return not library and not path.startswith(_SKIPPED)
