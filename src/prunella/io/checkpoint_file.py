"""Checkpoints of torch, read as tensors and plain data only, after a check of their sizes."""

from __future__ import annotations

import argparse
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prunella.errors import BadInput
from prunella.io.files import reading
from prunella.io.kind_of_path import refuse_other_kind
from prunella.io.untrusted import check_archive, check_regular, unreadable

_DEEPEST = 100
"""Lists and mappings inside each other; what walks through them further on may do so by calls of itself."""
_UNKNOWN = re.compile(r"GLOBAL ([\w.]+)")


def load_tensors_only(file: Path) -> Any:
    """The content of a file of `torch.save`. Errors: BadInput for anything but tensors and plain data.

    An `argparse.Namespace` is plain data too. A tensor that is larger than its bytes in the file is refused: `expand`
    costs nothing until somebody copies it.
    """
    what = f"cannot read {file} as tensors and plain data"
    todo = "save model.state_dict() alone, without the model or other objects"
    if not _is_checkpoint(check_regular(file, what)):
        give = "give a file that torch.save wrote of model.state_dict()"
        refuse_other_kind(file, "torch", "object", what=what, give=give)
    check_archive(file, todo="save it again with torch.save")
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # about the types of old files
            value = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises whatever a broken file makes it raise
        if unknown := _UNKNOWN.search(str(error)):
            raise BadInput(what, f"it holds a pickled {unknown[1]}", todo) from None
        if "weights_only" in str(error):  # torch's advice is to read it with all that it may run
            raise unreadable(ValueError("torch finds no tensors and plain data in it"), file, what, todo) from None
        raise unreadable(error, file, what, "fetch or write it again") from None
    for name, tensor in _tensors(value, what):
        _check(tensor, name, what)
    return value


def _is_checkpoint(file: Path) -> bool:
    """Whether the file begins like one of torch.save. The reader checks its contents."""
    with reading(file), file.open("rb") as opened:
        head = opened.read(2)
    return head[:1] == b"\x80"


def _check(tensor: Tensor, name: str, what: str) -> None:
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
        kind = "meta" if tensor.is_meta else "quantized" if tensor.is_quantized else str(tensor.layout)[6:]
        raise BadInput(what, f"{name} is a {kind} tensor, which need not have its values in the file", "save it dense")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        why = f"{name} has {tensor.numel()} values in {tensor.untyped_storage().nbytes()} bytes of the file"
        raise BadInput(what, why, "save a tensor of its own: tensor.contiguous()")


def _tensors(value: Any, what: str) -> Iterator[tuple[str, Tensor]]:
    """Every tensor with the keys that lead to it, each list and mapping once. Errors: BadInput for ones too deep."""
    seen = set[int]()
    level: list[tuple[tuple[Any, ...], Any]] = [((), value)]
    while level:
        path, item = level.pop()
        if isinstance(item, Tensor):
            yield ".".join(map(str, path)) or "it", item
        elif isinstance(item, Mapping | list | tuple | set) and id(item) not in seen:
            if len(path) == _DEEPEST:
                raise BadInput(what, f"more than {_DEEPEST} lists or mappings are inside each other", "save it flatter")
            seen.add(id(item))
            entries = item.items() if isinstance(item, Mapping) else enumerate(item)
            level += [((*path, key), inner) for key, inner in entries]
