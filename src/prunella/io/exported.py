"""Open an exported program (`.pt2`) without running code from the file.

`torch.export.load` falls back to full unpickling for some parts and evaluates shape expressions, so a file from a
stranger can run code. The parts are checked first: raw tensors, JSON and tensor-only samples pass, all else is refused.
"""

from __future__ import annotations

import importlib
import io
import logging
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from prunella.errors import BadInput
from prunella.graph.program.literals import module_of
from prunella.io.json import LARGEST, decode
from prunella.io.kind_of_path import described_path, refuse_other_kind
from prunella.io.untrusted import check_archive, check_regular, unreadable

# torch logs each part it reads at warning level
_LOGGERS = ("torch.export", "torch.export.pt2_archive._package", "torch._export.serde.serialize")
_PLAIN = re.compile(r"/(archive_format|archive_version|byteorder|\.data/[a-z_]+|.*\.json|data/weights/weight_\d+)$")
_SAMPLES = re.compile(r"/data/sample_inputs/[^/]+\.pt$")
_CONSTANT = re.compile(r"/data/constants/tensor_\d+$")
# what a shape expression needs; no quotes, no attributes, no double underscores
# a named size, and the size of an input: all that an expression may hold in quotes or look up
_READS = re.compile(
    r"Symbol\('\w+'(, \w+=(True|False))*\)"
    r"|L\['\w+'\](\['\w+'\]|\[\d+\])*(\.(size|stride|storage_offset)\(\)(\[\d+\])?)?"
)
# names of modules in an input structure, which the reader would import
_IMPORTS = ("__enum__", "default_factory_module")
_DEEPEST = 300
"""Deepest nesting of the JSON: programs contain programs."""
_EXPRESSION = re.compile(r"(?!.*__)(?!.*\.\s*[A-Za-z_])[\w\s+\-*/%().,<>=!&|~]*")


def load_exported(path: Path, *, allow_pickle: bool = False) -> tuple[nn.Module, tuple[Any, ...] | None]:
    """The program as a module whose sizes can follow a cut, and the example inputs it was exported with.

    Errors: BadInput for a file that is truncated, is not a program, or holds pickles (unless `allow_pickle`).
    """
    if not path.is_file():
        raise BadInput(f"no file at {path}", described_path(path), "give a .pt2 file written by torch.export.save")
    refuse_other_kind(path, "program", what=f"cannot read {path}", give="give a .pt2 file written by torch.export.save")
    check_archive(check_regular(path, f"cannot read {path}"), todo="export it again")
    if not allow_pickle:
        _refuse_pickles(path)
    program = _read(path)
    example = program.example_inputs
    return module_of(program), tuple(example[0]) if example and example[0] and not example[1] else None


def _read(path: Path) -> ExportedProgram:
    if _names(path, b"transformers.modeling_outputs."):
        importlib.import_module("transformers.modeling_outputs")  # makes its output classes known to the reader
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        return torch.export.load(str(path))
    except Exception as error:  # the reader has no error type of its own
        raise unreadable(error, path, f"cannot read {path}", "export it again with this version of torch") from None


def _names(path: Path, word: bytes) -> bool:
    """Whether a JSON part of the archive has this word."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(word in _part(archive, name) for name in archive.namelist() if name.endswith(".json"))


def _refuse_pickles(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
            suspects = [name for name in archive.namelist() if not _harmless(archive, name)]
    except (zipfile.BadZipFile, ValueError, EOFError, OSError, NotImplementedError) as error:
        raise BadInput(f"cannot read {path}", f"truncated or damaged: {error}", "export it again") from error
    if damaged:
        raise BadInput(f"cannot read {path}", f"{damaged} is damaged", "export it again")
    if suspects:
        why = f"it holds pickles or expressions that can run code when read: {', '.join(suspects[:3])}"
        raise BadInput(f"refused to read {path}", why, "give --allow-pickle if you trust it")


def _harmless(archive: zipfile.ZipFile, name: str) -> bool:
    tail = "/" + name.partition("/")[2]
    if tail.endswith(".json"):
        # A duplicate key could mean one value here and another to torch's reader.
        return _harmless_json(decode(_part(archive, name), deepest=_DEEPEST, allow_nan=True))
    if _SAMPLES.search(tail):
        return _tensors_only(archive.read(name))
    return bool(_PLAIN.search(tail) or _CONSTANT.search(tail))


def _part(archive: zipfile.ZipFile, name: str) -> bytes:
    with archive.open(name) as part:
        return part.read(LARGEST + 1)  # a small archive can hold a part of any size


def _harmless_json(value: Any) -> bool:
    if isinstance(value, dict):
        if value.get("use_pickle") is True:
            return False
        spoken = [_READS.sub("0", str(text)) for text in (value.get("expr_str", ""), *(value.get("guards_code") or ()))]
        return all(map(_EXPRESSION.fullmatch, spoken)) and all(map(_harmless_json, value.values()))
    if isinstance(value, list):
        return all(map(_harmless_json, value))
    return not (isinstance(value, str) and any(word in value for word in _IMPORTS))


def _tensors_only(data: bytes) -> bool:
    if not data:  # exported without an example
        return True
    try:
        torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except Exception:  # a part that cannot be read this way is refused
        return False
    return True
