"""A second device without a second device: tensors that say `lazy` and keep their values on the CPU.

Most faults of a program on an accelerator show without one: an operand that stayed on the CPU, a random number drawn by
the generator of the other device, a mask made where nobody asked for it. `SecondDevice` finds these. A tensor on it is
a wrapper whose device is `lazy` (autograd runs such tensors in the thread of the caller, as it does for the CPU). Each
operation runs on the CPU, so that a result can be compared with that of the CPU to the last bit. Operands on two
devices raise what torch raises on CUDA, with the same exceptions: tensors without axes, indices, and copies.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from prunella.model import device

DEVICE = torch.device("lazy", 0)
OTHER = torch.device("lazy", 1)
"""Another device of the same type, for models over several."""
_aten = torch.ops.aten
_BETWEEN = {_aten._to_copy, _aten.copy_, _aten.copy, _aten.set_}
"""Operations whose operands may lie on two devices."""
_INDEXED = {_aten.index, _aten.index_put, _aten.index_put_, _aten._index_put_impl_, _aten._unsafe_index}
"""Operations whose indices may lie on the CPU."""


MISSING: set[torch.dtype] = set()
"""Types of numbers that the device does not have; see `without_float64`."""


def strict() -> bool:
    """Whether operands on two devices are an error; the plugin allows them to tests."""
    return True


class Far(Tensor):
    """A tensor of the second device. `near` holds its values."""

    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor, device: torch.device = DEVICE) -> Far:
        far: Far = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            near.shape,
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
            device=device,
        )
        far.near = near
        return far

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return Far(self.near.detach(), self.device)

    @data.setter
    def data(self, value: Tensor) -> None:
        self.near = value.near if isinstance(value, Far) else value
        Tensor.data.__set__(self, Far(self.near, self.device))  # type: ignore[attr-defined]

    def untyped_storage(self) -> torch.UntypedStorage:
        """That of the values: two views of one tensor share it, as they do on a real device."""
        return self.near.untyped_storage()

    def new_tensor(self, data: Any, **options: Any) -> Tensor:
        return Far(self.near.new_tensor(data, **options), self.device)

    def tolist(self) -> Any:
        return self.near.tolist()

    def data_ptr(self) -> int:
        return self.near.data_ptr()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """As a plain tensor: a parameter is copied without its gradient."""
        if id(self) not in memo:
            replica = Far(self.near.detach().clone(), self.device)
            parameter = nn.Parameter(replica, self.requires_grad) if isinstance(self, nn.Parameter) else replica
            memo[id(self)] = parameter.requires_grad_(self.requires_grad)
        return memo[id(self)]  # type: ignore[no-any-return]

    def __getitem__(self, index: Any) -> Tensor:
        return super().__getitem__(_indices(index))  # type: ignore[no-any-return]

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_indices(index), value)  # type: ignore[no-untyped-call]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Far({self.near})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The operation on the values of its operands; what it returns is where torch would put it."""
    operands = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    asked = kwargs.get("device")
    if not any(isinstance(x, Far) for x in operands) and (asked is None or torch.device(asked).type != DEVICE.type):
        return func(*args, **kwargs)
    packet = func.overloadpacket
    if packet not in _BETWEEN:
        _refuse_two_devices(packet, args, operands)
    if packet is _aten.copy_ and not isinstance(args[0], Far):
        return func(args[0], _near(args[1]), *args[2:])
    _refuse_foreign_generator(kwargs)
    place = _place(asked, operands)
    if asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    result = func(*tree_map(_near, args), **tree_map(_near, kwargs))
    same = {id(_near(x)): x for x in operands}
    return tree_map(lambda x: _returned(x, same, place), result)


def _place(asked: Any, operands: list[Tensor]) -> torch.device | None:
    """The second device on which a result is; None for the CPU."""
    if asked is None:
        return next(x.device for x in operands if isinstance(x, Far))
    named = torch.device(asked)
    return torch.device(DEVICE.type, named.index or 0) if named.type == DEVICE.type else None


def _indices(index: Any) -> Any:
    """Lists of numbers as tensors on the CPU: torch would move them to the device by itself."""
    if isinstance(index, tuple):
        return tuple(_indices(part) for part in index)
    if isinstance(index, list):
        return torch.tensor(index, device="cpu") if index else torch.zeros(0, dtype=torch.long)
    return index


def _near(value: Any) -> Any:
    return value.near if isinstance(value, Far) else value


def _returned(value: Any, same: dict[int, Tensor], place: torch.device | None) -> Any:
    if not isinstance(value, Tensor):
        return value
    if place is not None and value.dtype in MISSING:
        raise TypeError(f"Cannot convert a {DEVICE.type} tensor to {value.dtype}: the device does not have it")
    if id(value) in same:
        return same[id(value)]
    return value if place is None else Far(value, place)


def _refuse_two_devices(packet: Any, args: tuple[Any, ...], operands: list[Tensor]) -> None:
    if packet in _INDEXED:
        operands = [x for x in operands if not any(x is index for index in tree_leaves(args[1]))]
    places = {str(x.device) for x in operands if x.ndim}
    places |= {str(x.device) for x in operands if isinstance(x, Far)}
    if len(places) > 1 and strict():
        found = " and ".join(sorted(places))
        raise RuntimeError(f"Expected all tensors to be on the same device, but found two: {found} ({packet})")


def _refuse_foreign_generator(kwargs: dict[str, Any]) -> None:
    if kwargs.get("generator") is not None and strict():
        raise RuntimeError(f"Expected a '{DEVICE.type}' device type for generator but found 'cpu'")


class SecondDevice(TorchDispatchMode):
    """While it is active, tensors can be made on, and moved to, `DEVICE`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


class Made(TorchFunctionMode):
    """Tensors of Python's numbers, which torch makes below the reach of `SecondDevice`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        asked = kwargs.get("device")
        if func not in (torch.tensor, torch.as_tensor) or asked is None or torch.device(asked).type != DEVICE.type:
            return func(*args, **kwargs)
        rest = {name: value for name, value in kwargs.items() if name not in ("device", "requires_grad")}
        if isinstance(args[0], Tensor):
            return args[0].to(asked)
        plain = func(*args, **rest, device="cpu")
        place = torch.device(DEVICE.type, torch.device(asked).index or 0)
        return Far(plain, place).requires_grad_(bool(kwargs.get("requires_grad")))


@contextmanager
def second_device() -> Iterator[torch.device]:
    """The device, for the length of the block, in this thread and in those that start in it."""
    plain = threading.Thread.run

    def run_there(thread: threading.Thread) -> None:
        with SecondDevice(), Made():
            plain(thread)

    with SecondDevice(), Made(), mock.patch.object(threading.Thread, "run", run_there):
        yield DEVICE


@contextmanager
def without_float64() -> Iterator[torch.device]:
    """The device, without float64, as MPS is."""
    MISSING.update((torch.float64, torch.complex128))
    try:
        with mock.patch.object(device, "NO_FLOAT64", frozenset({DEVICE.type})), second_device():
            yield DEVICE
    finally:
        MISSING.clear()


def far(value: Any, device: torch.device = DEVICE) -> Any:
    """The value with all of its tensors on the second device."""
    return tree_map(lambda x: Far(x.detach().clone(), device) if isinstance(x, Tensor) else x, value)


def near(value: Any) -> Any:
    """The value with all of its tensors on the CPU."""
    return tree_map(lambda x: x.detach().near if isinstance(x, Far) else x, value)


def move_(model: nn.Module, place: Callable[[Any], Any] = far) -> nn.Module:
    """The model with its tensors on the second device; tied tensors stay tied."""
    moved: dict[int, Tensor] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in moved:
                    moved[id(parameter)] = nn.Parameter(place(parameter.detach()), parameter.requires_grad)
                module._parameters[name] = moved[id(parameter)]  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                moved.setdefault(id(buffer), place(buffer))
                module._buffers[name] = moved[id(buffer)]
    return model
