"""Name and source location of a running call, in the model's source or in the source of a program.

The code of a graph module is generated and has no file. A node may store the line of the model's source from which it
was captured; otherwise the name of the node is its location.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import FrameType

import torch
from torch import fx

from prunella.model.user_code import short

GENERATED = "<eval_with_key>"
"""Prefix of the file names of generated code."""
_TORCH, _OWN = f"{Path(torch.__file__).parent}{os.sep}", f"{Path(__file__).parents[2]}{os.sep}"
LIBRARY = (_TORCH, _OWN)
"""Folders of torch and of this package, which do not contain a model's source."""
_RUN = f"{_OWN}model{os.sep}forward.py"
"""The file in which this package calls the model: outer frames are not the model's source."""
_PARTS = tuple(f"{_TORCH}{part}{os.sep}" for part in (f"nn{os.sep}modules", f"nn{os.sep}utils", f"ao{os.sep}nn"))
"""Modules of torch: the location of calls in a model without source of its own."""
_LINE = re.compile(r'File "([^"]+)", line (\d+)')


def where(start: FrameType | None) -> str:
    """`file:line` of the model's source that is running; of torch's module in a model without source of its own."""
    frame, part = start, ""
    while frame is not None and frame.f_code.co_filename != _RUN:
        path = frame.f_code.co_filename
        if path.startswith(GENERATED):
            return place(frame)
        if not path.startswith(LIBRARY) and not path.startswith("<"):
            return f"{short(path)}:{frame.f_lineno}"
        if not part and path.startswith(_PARTS) and frame.f_code.co_name not in _CALLS:
            part = f"{short(path)}:{frame.f_lineno}"
        frame = frame.f_back
    return part


def reader(start: FrameType | None) -> FrameType | None:
    """The frame of the model's source that makes the running call directly; None if a function of torch makes it."""
    frame = start
    while frame is not None and frame.f_code.co_filename.startswith(_PASSES_ON):
        frame = frame.f_back
    return None if frame is None or frame.f_code.co_filename.startswith(_TORCH) else frame


_PASSES_ON = (_OWN, f"{_TORCH}overrides.py", f"{_TORCH}_tensor.py")
"""Files that pass a call of the model's source on to torch."""
_CALLS = frozenset({"_call_impl", "_wrapped_call_impl", "__call__", "inner"})


def place(frame: FrameType) -> str:
    """`file:line` of the source that the running line of a graph module was captured from, or the node's name."""
    module = frame.f_locals.get("self")
    numbers = getattr(module, "_lineno_map", None)
    if not isinstance(module, fx.GraphModule) or not numbers:
        return ""
    start = getattr(module, "_prologue_start", None)
    first = 0 if start is None else int.__add__(start, 0)  # tracked, like all integers of a module in a run
    at = numbers.get(frame.f_lineno - first)
    nodes = list(module.graph.nodes)
    return _source(nodes[at]) if at is not None and at < len(nodes) else ""


def _source(node: fx.Node) -> str:
    frames = _LINE.findall(node.meta.get("stack_trace") or "")
    model_frames = [(path, line) for path, line in frames if not path.startswith(LIBRARY)]
    return f"{short(model_frames[-1][0])}:{model_frames[-1][1]}" if model_frames else node.name
