"""The instructions of a model's source that a run executes, and the modules that it calls.

Two runs that differ in them have taken different branches.
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

Step = tuple[CodeType, int] | int
"""An instruction of a function, or the identity of a module that is called."""
_PATHS = sysconfig.get_paths()
_SKIPPED = (
    "<",
    f"{Path(torch.__file__).parent}{os.sep}",
    f"{Path(__file__).parents[1]}{os.sep}",
)
"""Code of torch and of this package, and code without a file."""


@contextmanager
def executed(model: nn.Module) -> Iterator[set[Step]]:
    """Inside, collect the instructions that run outside of torch, this package and Python, and the modules called."""
    steps = set[Step]()

    def each(frame: FrameType, event: str, _: Any) -> Any:
        if event == "opcode":
            steps.add((frame.f_code, frame.f_lasti))
        return each

    def entered(frame: FrameType, _: str, __: Any) -> Any:
        if not is_source(frame.f_code.co_filename):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
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
