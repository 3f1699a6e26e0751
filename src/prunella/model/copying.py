"""Copies of models, including models on which `copy.deepcopy` alone fails."""

from __future__ import annotations

import copy
import io
import socket
import sys
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor
from functools import partial
from types import BuiltinFunctionType, FunctionType, GeneratorType, MethodType, ModuleType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from prunella.errors import NotSupported
from prunella.model.unread import is_empty, unread
from prunella.model.unwrap import unwrap

M = TypeVar("M", bound=nn.Module)
Memo = dict[int, Any]

_LOCK, _RLOCK = type(threading.Lock()), type(threading.RLock())
_SHARED = (
    *(ModuleType, GeneratorType, io.IOBase, threading.Thread, socket.socket, Executor),
    *(staticmethod, classmethod),
)
"""Types that a copy shares with the original: they represent unique objects outside the model."""

_ATOMS = (type(None), bool, int, float, complex, str, bytes, type, torch.dtype, torch.device, torch.Size)


def copied(model: M, *, shared: Iterable[Tensor] = ()) -> M:
    """A copy of the bare model with its hooks, parametrizations, ties and training flags, and without `.grad`.

    Tensors that a forward pass stored on a module are copied without their history, and locks are replaced by new ones.
    The copy shares open files, Python generators, Python modules and threads with the original, and large values that
    no forward pass reads, such as a dataset. Also inside `torch.inference_mode()` the copy has ordinary tensors, which
    can be trained.

    shared: parameters and buffers that the copy shares with the original. Errors: NotSupported names the attribute that
    cannot be copied.
    """
    bare = cast(M, unwrap(model, computed=True))  # of the same type, unless it was wrapped
    memo: Memo = {id(tensor): tensor for tensor in shared}
    memo |= _empty_copies(bare) | unread(bare)
    with torch.inference_mode(False):
        try:
            return copy.deepcopy(bare, dict(memo))
        except (MemoryError, torch.cuda.OutOfMemoryError):
            raise
        except Exception:  # an attribute may raise anything: replace known failures, name the others
            memo |= {
                id(value): substitute for value in _reached(bare) if (substitute := _substitute(value)) is not None
            }
            try:
                return copy.deepcopy(bare, dict(memo))
            except Exception as error:
                raise _refusal(bare, memo, error) from error


def _empty_copies(model: nn.Module) -> Memo:
    """Copies of the attributes without content. They are most of a module, and `copy.deepcopy` is slow on each."""
    values = (value for module in model.modules() for value in vars(module).values())
    return {id(value): type(value)() for value in values if is_empty(value)}


def ordinary(model: M) -> M:
    """The model, or a copy of it if it has tensors made in `torch.inference_mode()`, which allow no gradient."""
    made_for_inference = any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers()))
    return copied(model) if made_for_inference else model


def frozen_copy(model: M) -> M:
    """A copy of the bare model in evaluation mode and without gradients."""
    return copied(model).eval().requires_grad_(False)


def _substitute(value: Any) -> Any:
    """The substitute of a value that `copy.deepcopy` cannot copy; None for all other values."""
    if type(value) in weakref.ProxyTypes:  # one of what is gone refuses every question
        return value
    if isinstance(value, Tensor):
        return None if value.is_leaf else value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, torch.Generator):
        return value.clone_state()
    if isinstance(value, _LOCK):
        return threading.Lock()
    if isinstance(value, _RLOCK):
        return threading.RLock()
    return value if isinstance(value, _SHARED) or _is_of_the_process(value) else None


def _is_of_the_process(value: object) -> bool:
    """Whether an object of Python itself refuses to be taken apart: a connection, a queue, what a thread has alone.

    It represents something that exists once, and holds no tensors that are cut. An object of another class that
    refuses may hold them, and is named instead.
    """
    kind = type(value)
    if kind in copy._deepcopy_dispatch or hasattr(kind, "__deepcopy__"):  # type: ignore[attr-defined]
        return False
    if kind.__module__.partition(".")[0] not in sys.stdlib_module_names or kind.__module__ == "__main__":
        return False
    try:
        value.__reduce_ex__(4)
    except Exception:  # each has its own error
        return True
    return False


def _reached(root: object) -> Iterator[object]:
    """Every object that a deep copy of `root` reaches, each once, without the contents of shared objects."""
    seen, stack = set[int](), [root]
    while stack:
        value = stack.pop()
        proxy = type(value) in weakref.ProxyTypes
        if id(value) in seen or (not proxy and isinstance(value, _ATOMS)):
            continue
        seen.add(id(value))
        yield value
        if not proxy and not isinstance(value, _SHARED):
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
    """The error that names the first attribute of the model that cannot be copied."""
    memo = memo | {id(part): part for part in (*model.modules(), *model.parameters(), *model.buffers())}
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            try:
                copy.deepcopy(value, dict(memo))
            except Exception as fault:
                where = f"attribute {path}.{name}".replace(" .", " ")
                why = f"it is a {type(value).__name__}: {fault}".splitlines()[0]
                return NotSupported(
                    f"{where} of the model cannot be copied",
                    why,
                    "delete the attribute, or give its class a __deepcopy__ method",
                )
    why = f"{type(error).__name__}: {error}".splitlines()[0]
    return NotSupported(f"the model ({type(model).__name__}) cannot be copied", why, "give it a __deepcopy__ method")
