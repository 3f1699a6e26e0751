"""The class of the object in a pickle, read from its instructions: nothing is built, imported or run."""

from __future__ import annotations

import pickletools

_PLAIN = ("collections", "torch", "torch._utils", "torch.storage", "builtins", "numpy", "argparse", "_codecs")
"""Modules that the pickles of tensors and plain data name."""
_MARKS = ("MARK", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE")


def class_in(data: bytes) -> str:
    """`package.module.Class` if a pickle first builds an object of a class; empty for plain data.

    data: its first bytes. A file of torch before 1.6 is several pickles, and the numbers at its start are passed over.
    """
    start = 0
    while start < len(data):
        held, length = _first(data[start:])
        if held or not length:
            return held
        start += length
    return ""


def _first(data: bytes) -> tuple[str, int]:
    """The class, and the length of the pickle if it holds only a number or a small mapping."""
    texts: list[str] = []
    depth = 0
    try:
        for opcode, value, place in pickletools.genops(data):
            if opcode.name == "STOP":
                return "", (place or 0) + 1
            if opcode.name in _MARKS:
                depth += 1
            if isinstance(value, str):
                texts.append(value)
            named = value if opcode.name == "GLOBAL" else None
            if opcode.name == "STACK_GLOBAL" and len(texts) > 1:
                named = f"{texts[-2]} {texts[-1]}"
            if named is not None:
                module, _, name = str(named).partition(" ")
                return ("" if module in _PLAIN or depth > 1 else f"{module}.{name}"), 0
    except (ValueError, EOFError, UnicodeDecodeError, OverflowError):  # cut off after the first bytes, or no pickle
        return "", 0
    return "", 0
