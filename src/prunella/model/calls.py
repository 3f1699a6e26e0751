"""The name of a call, of Python or of an operation below autograd."""

from __future__ import annotations

from typing import Any

import torch


def called(func: Any) -> str:
    """The name of a call: `view` for `Tensor.view` and for the operation `aten.view.default` of a program."""
    if isinstance(func, torch._ops.OpOverload):
        namespace, _, name = func._schema.name.partition("::")
        return _SYMBOLIC.get(name, name) if namespace == "aten" else name
    return getattr(func, "__name__", "")


_SYMBOLIC = {"sym_size": "size", "sym_numel": "numel", "sym_stride": "stride"}
