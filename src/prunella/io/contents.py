"""The contents of a value as a stream of bytes into one hash, the same in every process; see `io/identity.py`."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import partial
from hashlib import sha256
from pathlib import Path, PurePath
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset

from prunella.errors import NotSupported
from prunella.io.code import KNOWN, Reads, is_own, members

_CHUNK = 1 << 24
"""Bytes of a tensor that are brought to the CPU at a time."""
_ATOMS = (bool, int, float, complex, str, range, slice, torch.dtype, torch.device, torch.layout, torch.memory_format)
_SETTINGS = (bool, int, float, str, list, tuple, Tensor, np.ndarray)
"""Attributes of a sampler that choose; others are the dataset and generators."""
WriteModel = Callable[["Contents", nn.Module], None]


class Contents:
    """Writes values into `state`, each word with its length, so that different values give different bytes."""

    def __init__(self, write_model: WriteModel) -> None:
        self.state = sha256()
        self._write_model = write_model
        self._open: list[int] = []
        self._code: dict[int, tuple[int, object]] = {}
        self._reads = Reads()

    def put(self, *words: str | bytes) -> None:
        """Write words."""
        for word in words:
            data = word.encode(errors="surrogatepass") if isinstance(word, str) else word
            self.state.update(len(data).to_bytes(8, "little"))
            self.state.update(data)

    def write(self, value: object) -> None:
        """Write a value, its kind first."""
        if value is None or (isinstance(value, _ATOMS) and not isinstance(value, Enum)):
            self.put(type(value).__name__, repr(value))
        elif isinstance(value, bytes | bytearray):
            self.put("bytes", bytes(value))
        elif isinstance(value, PurePath):
            self.put("path", str(value))
        elif isinstance(value, Tensor | np.ndarray | np.generic):
            self._write_array(value)
        else:
            with self._inside(value) as again:
                if again is None:
                    self._write_nested(value)
                else:  # a function that is in its own closure, for example
                    self.put("again", str(again))

    def _write_nested(self, value: object) -> None:
        if isinstance(value, nn.Module):
            self._write_model(self, value)
        elif isinstance(value, list | tuple):
            self._write_items("list" if isinstance(value, list) else "tuple", value)
        elif isinstance(value, Mapping):
            self._write_mapping(value)
        elif isinstance(value, set | frozenset):
            self.put("set", *sorted(self._apart(item) for item in value))
        elif isinstance(value, type) or callable(value):
            self._write_callable(value)
        else:
            self._write_object(value)

    def _write_items(self, kind: str, items: list[Any] | tuple[Any, ...]) -> None:
        self.put(kind, str(len(items)))
        for item in items:
            self.write(item)

    def _write_mapping(self, value: Mapping[Any, Any]) -> None:
        keys = sorted(value) if all(isinstance(key, str) for key in value) else list(value)
        self._write_items("mapping", [(key, value[key]) for key in keys])

    def _write_object(self, value: object) -> None:
        self.put("object", _name(type(value)))
        self._write_class(type(value))
        if isinstance(value, Enum):
            self.put(value.name)
        elif is_dataclass(value):
            self._write_mapping({field.name: getattr(value, field.name) for field in fields(value)})
        elif isinstance(value, torch.Generator):
            self.write(value.get_state())
        elif isinstance(value, DataLoader):
            self._write_loader(value)
        elif isinstance(value, TensorDataset):
            self.write(value.tensors)
        elif isinstance(value, Subset):
            self._write_items("subset", [value.dataset, list(value.indices)])
        else:
            if isinstance(value, Sized):
                with suppress(Exception):  # a loader of a stream has a `__len__` that raises
                    self.put("length", str(len(value)))
            self._write_mapping(self._reads.state_of(value))

    def _write_loader(self, loader: DataLoader[Any]) -> None:
        """Write a loader. Its generator counts by its seed, since its state is another one after each epoch."""
        batched = loader.batch_size is None and loader.batch_sampler is not None  # by a sampler of the user's own
        sampler = loader.batch_sampler if batched else loader.sampler
        held = getattr(sampler, "__dict__", {})
        how = {name: part for name, part in held.items() if isinstance(part, _SETTINGS) and name != "epoch"}
        seed = loader.generator.initial_seed() if isinstance(loader.generator, torch.Generator) else None
        given = [loader.dataset, loader.batch_size, loader.drop_last, _name(type(sampler)), how, loader.collate_fn]
        self._write_items("loader", [*given, seed])

    # -- functions ---------------------------------------------------------------------------------------------------

    def _write_callable(self, value: Any) -> None:
        value = inspect.unwrap(value)
        if isinstance(value, partial):
            self._write_items("partial", [value.func, value.args, value.keywords])
        elif isinstance(value, MethodType):
            self.write(value.__func__)
            self._write_state(value.__self__)
        elif isinstance(value, FunctionType):
            self._write_function(value)
        elif not isinstance(value, type) and isinstance(inspect.unwrap(type(value).__call__), FunctionType):
            self.put("callable", _name(type(value)))
            self.write(type(value).__call__)
            self._write_state(value)
        else:
            self.put("name", _name(value if hasattr(value, "__qualname__") else type(value)))
            if isinstance(value, type):
                self._write_class(value)

    def _write_class(self, kind: type) -> None:
        """Write the methods and constants of a class of the user's own."""
        if is_own(kind.__module__) and not self._is_written(kind):
            for name, member in members(kind):
                self.put(name)
                self.write(member)

    def _is_written(self, code: object) -> bool:
        """Whether a function or class was written before, which then counts by its number; else it has one now."""
        if id(code) in self._code:
            self.put("again", str(self._code[id(code)][0]))
            return True
        self._code[id(code)] = (len(self._code), code)
        return False

    def _write_function(self, function: FunctionType) -> None:
        self.put("function", _name(function))
        if self._is_written(function):
            return
        if str(function.__module__).partition(".")[0] not in KNOWN:  # generated functions have no module
            self._write_code(function.__code__)
        if is_own(function.__module__):
            for name, read in self._reads.globals_of(function).items():
                self.put(name)
                self.write(read)
        self.write((function.__defaults__, function.__kwdefaults__))
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            self.put(name)
            try:
                held = cell.cell_contents
            except ValueError:  # not bound yet
                held = None
            self.write(held)

    def _write_code(self, code: CodeType) -> None:
        """Write instructions, names and constants, without comments and line numbers."""
        self.put("code", code.co_code, *code.co_names, *code.co_varnames)
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                self._write_code(constant)
            else:
                self.write(constant)

    def _write_state(self, value: Any) -> None:
        """Write the class and the attributes of the object to which a method is bound."""
        self._write_class(type(value))
        if isinstance(value, nn.Module):
            self.write(value)
        elif is_dataclass(value):
            self._write_object(value)
        else:
            self._write_mapping(dict(getattr(value, "__dict__", {})))

    # -- arrays ------------------------------------------------------------------------------------------------------

    def _write_array(self, value: Tensor | np.ndarray[Any, Any] | np.generic) -> None:
        if not isinstance(value, Tensor):
            array = np.asarray(value)
            if array.dtype.hasobject:
                self._write_items("array", [str(array.shape), array.tolist()])
                return
            self.put("array", str(array.dtype), str(array.shape))
            self.put(np.ascontiguousarray(array).tobytes())
            return
        self.put("tensor", str(value.dtype), str(tuple(value.shape)))
        for part in _dense_parts(value.detach()):
            self.put("dense", str(part.dtype), str(tuple(part.shape)))
            for chunk in _chunks(part):
                flat = chunk.cpu().contiguous().reshape(-1)
                plain = flat.as_strided(flat.shape, (1,))  # a single number may have any stride
                self.state.update(plain.view(torch.uint8).numpy().data)

    # -- recursion ---------------------------------------------------------------------------------------------------

    @contextmanager
    def _inside(self, value: object) -> Iterator[int | None]:
        """Mark `value` as being written; yields its depth if it already is."""
        again = self._open.index(id(value)) if id(value) in self._open else None
        self._open.append(id(value))
        try:
            yield again
        finally:
            self._open.pop()

    def _apart(self, value: object) -> bytes:
        """The digest of one item of a set, which has no order."""
        apart = Contents(self._write_model)
        apart.write(value)
        return apart.state.digest()


def _dense_parts(value: Tensor) -> Iterator[Tensor]:
    """The plain tensors with the contents of a tensor."""
    if type(value) not in (Tensor, nn.Parameter):
        if not hasattr(value, "__tensor_flatten__"):
            why = f"it is a {type(value).__name__}, with contents that only its own library can read"
            raise NotSupported("a tensor cannot be identified", why, "give it as a plain tensor")
        for name in value.__tensor_flatten__()[0]:
            yield from _dense_parts(getattr(value, name))
    elif value.is_meta:
        return
    elif value.is_quantized:
        yield value.int_repr()
        yield value.dequantize()
    elif value.layout is torch.sparse_coo:
        yield value.coalesce().indices()
        yield value.coalesce().values()
    elif value.layout is not torch.strided:
        raise NotSupported("a tensor cannot be identified", f"its layout is {value.layout}", "make it dense first")
    else:
        yield value.resolve_conj().resolve_neg()


def _chunks(value: Tensor) -> Iterator[Tensor]:
    """The tensor in chunks of a bounded size, in the order of its elements; views, so that nothing large is copied."""
    if value.nbytes <= _CHUNK or (value.is_contiguous() and value.device.type == "cpu"):
        if value.numel():
            yield value
        return
    rows = max(1, _CHUNK * len(value) // value.nbytes)
    for start in range(0, len(value), rows):
        part = value[start : start + rows]
        yield from _chunks(part[0]) if len(part) == 1 and part.dim() > 1 else (part,)


def _name(value: Any) -> str:
    """Module and qualified name; a script has its file's name, whether it was started as `python x.py` or `-m x`."""
    module = str(value.__module__)
    if module == "__main__":
        main: Any = sys.modules["__main__"]
        spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
        module = spec.name if spec else Path(file).stem if file else module
    return f"{module}:{value.__qualname__}"
