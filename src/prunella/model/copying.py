"""One way to copy a model: also where `copy.deepcopy` alone gives up."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from types import BuiltinFunctionType, FunctionType, GeneratorType, MethodType, ModuleType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from prunella.errors import NotSupported
from prunella.model.unwrap import unwrap

M = TypeVar("M", bound=nn.Module)
Memo = dict[int, Any]

_LOCK, _RLOCK = type(threading.Lock()), type(threading.RLock())
_SHARED = (ModuleType, GeneratorType, io.IOBase, threading.Thread)
"""What a copy uses together with the original: it stands for something outside the model, which there is once."""

_ATOMS = (type(None), bool, int, float, complex, str, bytes, type, torch.dtype, torch.device, torch.Size)


def copied(model: M, *, shared: Iterable[Tensor] = ()) -> M:
    """A copy of the bare model with its hooks, parametrizations, ties and training flags, and without `.grad`.

    Tensors that a forward pass left on a module are copied without their history, locks are fresh ones, and the copy
    shares open files, Python generators, modules of Python and threads with the original. Inside
    `torch.inference_mode()` too the copy has ordinary tensors, which can be trained.

    shared: parameters and buffers that the copy uses as they are. Errors: NotSupported names the attribute that cannot
    be copied.
    """
    bare = cast(M, unwrap(model))  # of the same kind, unless it was wrapped
    memo: Memo = {id(tensor): tensor for tensor in shared}
    with torch.inference_mode(False):
        try:
            return copy.deepcopy(bare, dict(memo))
        except (MemoryError, torch.cuda.OutOfMemoryError):
            raise
        except Exception:  # an attribute may raise anything; what is known to fail is replaced, and the rest named
            memo |= {id(found): new for found in _reached(bare) if (new := _substitute(found)) is not None}
            try:
                return copy.deepcopy(bare, dict(memo))
            except Exception as error:
                raise _refusal(bare, memo, error) from error


def frozen_copy(model: M) -> M:
    """A copy of the bare model in evaluation mode and without gradients."""
    return copied(model).eval().requires_grad_(False)


def _substitute(value: Any) -> Any:
    """What stands for a value that `copy.deepcopy` cannot copy; None for everything else."""
    if isinstance(value, Tensor):
        return None if value.is_leaf else value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, torch.Generator):
        return value.clone_state()
    if isinstance(value, _LOCK):
        return threading.Lock()
    if isinstance(value, _RLOCK):
        return threading.RLock()
    return value if isinstance(value, _SHARED) else None


def _reached(root: object) -> Iterator[object]:
    """Everything that a deep copy of `root` meets, each once; what is shared or made anew is not entered."""
    seen, stack = set[int](), [root]
    while stack:
        value = stack.pop()
        if id(value) in seen or isinstance(value, _ATOMS):
            continue
        seen.add(id(value))
        yield value
        if not isinstance(value, _SHARED):
            stack.extend(_parts(value))


def _parts(value: object) -> Iterator[object]:
    if isinstance(value, Mapping):
        yield from value.values()
    elif isinstance(value, list | tuple | set | frozenset):
        yield from value
    elif isinstance(value, MethodType):
        yield value.__self__
    elif isinstance(value, partial):
        yield from (*value.args, *value.keywords.values())
    if not isinstance(value, FunctionType | BuiltinFunctionType):
        yield from getattr(value, "__dict__", {}).values()
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        yield from (getattr(value, name, None) for name in ((slots,) if isinstance(slots, str) else slots))


def _refusal(model: nn.Module, memo: Memo, error: Exception) -> NotSupported:
    """The error that names the first attribute of the model that cannot be copied by itself."""
    memo = memo | {id(part): part for part in (*model.modules(), *model.parameters(), *model.buffers())}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            try:
                copy.deepcopy(value, dict(memo))
            except Exception as fault:
                where = f"attribute {path}.{name}".replace(" .", " ")
                why = f"it is a {type(value).__name__}: {fault}".splitlines()[0]
                return NotSupported(
                    f"{where} of the model cannot be copied", why, "delete it, or give its class a __deepcopy__ method"
                )
    why = f"{type(error).__name__}: {error}".splitlines()[0]
    return NotSupported(f"the model ({type(model).__name__}) cannot be copied", why, "give it a __deepcopy__ method")
