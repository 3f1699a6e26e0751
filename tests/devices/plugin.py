"""The tests of other folders on the second device: `python -m pytest -p tests.devices.plugin tests/train`.

What a test makes lies on the second device, as if its author had written `.to("cuda")` everywhere; what the library
makes lies where the library puts it. A test may then compare its own tensors over two devices; the library may not.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from tests.devices import second
from tests.devices.second import DEVICE, Made, SecondDevice

_ROOT = Path(__file__).parents[2]
_OURS, _TESTS = str(_ROOT / "src" / "prunella"), str(_ROOT / "tests")
_HERE = str(Path(__file__).parent)
_FACTORIES = frozenset(
    getattr(torch, name)
    for name in "empty zeros ones full rand randn randint randperm arange eye linspace tensor as_tensor from_numpy "
    "empty_strided logspace tril_indices triu_indices scalar_tensor empty_permuted".split()
)


def by_a_test(frame: FrameType | None) -> bool:
    """Whether the call comes from a test, and not from the library that the test calls."""
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(_OURS):
            return False
        if file.startswith(_TESTS) and not file.startswith(_HERE):
            return True
        frame = frame.f_back
    return False


class Elsewhere(TorchFunctionMode):
    """Tensors that a test makes without a device are made on the second device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FACTORIES and kwargs.get("device") is None and by_a_test(sys._getframe(1)):
            made = func(*args, **{k: v for k, v in kwargs.items() if k != "requires_grad"})
            if isinstance(made, torch.Tensor) and made.device.type == "cpu":
                far = second.Far(made)
                return far.requires_grad_() if kwargs.get("requires_grad") else far
            return made
        return func(*args, **kwargs)


def pytest_configure(config: pytest.Config) -> None:
    """Enter the device for the whole run, the import of the tests included, in all threads."""
    second.strict = lambda: not by_a_test(sys._getframe(1))
    plain = threading.Thread.run

    def run_there(thread: threading.Thread) -> None:
        with SecondDevice(), Made():
            plain(thread)

    threading.Thread.run = run_there  # type: ignore[method-assign]
    modes = (SecondDevice(), Made(), Elsewhere())
    for mode in modes:
        mode.__enter__()
    leave: list[Callable[..., Any]] = [mode.__exit__ for mode in reversed(modes)]
    config.add_cleanup(lambda: [exit_(None, None, None) for exit_ in leave] and None)
    assert torch.zeros(1).device.type == "cpu" and DEVICE.type == "lazy"
