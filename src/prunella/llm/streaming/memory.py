"""Predict the memory of a run before it starts.

No method is known by name: a block runs on fake tensors, the solver runs on a smaller layer of the same proportions,
and the bytes of all live tensors are counted.
"""

from __future__ import annotations

import math
import re
import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from prunella.errors import RequestError
from prunella.granularity import NM, Block, Element
from prunella.llm.blocks import BlockCall
from prunella.llm.recipe import OneShot
from prunella.measure.text import byte_size

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_SMALL = 192
"""The largest side of the layer on which a solver is measured."""
MARGIN = 1.2
"""Factor for the workspace of operations, and for freed memory that is not reused."""
BUFFERS = 64_000_000
"""Bytes that the libraries allocate on first use and keep: 45 MB were measured for matrix products in one thread."""


def parse_bytes(text: str | int) -> int:
    """`4GB` is 4 * 10^9, `4GiB` 4 * 2^30, a number is bytes. Errors: RequestError for anything else, and for 0."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?B?)\s*", str(text).upper())
    unit = match[2] + "B" if match and match[2] and not match[2].endswith("B") else match[2] if match else "?"
    if match is None or unit not in _UNITS or not float(match[1]):
        raise RequestError(f"cannot read the amount of memory {text!r}", "a number and a unit", "for example 4GB")
    return int(float(match[1]) * _UNITS[unit])


def resident() -> int:
    """Resident bytes of this process; their peak if the system does not report the current value."""
    status = Path("/proc/self/statm")
    if status.is_file():
        import resource

        return int(status.read_text().split()[1]) * resource.getpagesize()
    return most_resident()


def most_resident() -> int:
    """Peak resident bytes of this process; 0 on Windows.

    On Linux not by `getrusage`: there a process inherits the peak of the process that started it.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    if sys.platform == "win32":
        return 0
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of live tensors that were allocated inside; `peak` is the largest sum."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._seen: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in pytree.tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):  # tensors from before, and views of them, do not count
                self._note(tensor, 0)
        result = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor, tensor.untyped_storage().nbytes())
        return result

    def _note(self, tensor: Tensor, size: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return

        def freed(_: Any) -> None:
            self.now -= size
            self._seen.pop(key, None)

        self._seen[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


def forward_bytes(block: nn.Module, call: BlockCall, *, trained: bool) -> int:
    """Peak bytes of one pass of the block without weights and inputs; trained: with activations for gradients."""
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:

        def fake_like(tensor: Tensor) -> Tensor:
            return torch.empty(
                tensor.shape, dtype=tensor.dtype, requires_grad=trained and tensor.is_floating_point(), device="cpu"
            )

        state = {name: fake_like(t) for name, t in [*block.named_parameters(), *block.named_buffers()]}
        args, kwargs = pytree.tree_map_only(Tensor, fake_like, (call.args, call.kwargs))
        with Live() as live, torch.set_grad_enabled(trained):
            outputs = torch.func.functional_call(block, state, args, kwargs)
        del outputs
    assert fake is not None
    return int(live.peak)


def solver_bytes(how: OneShot, rows: int, columns: int) -> int:
    """Peak bytes of solving a layer, with its weight and Gram matrix in float32, extrapolated from a smaller layer."""
    unit = math.lcm(16, how.pattern.m if isinstance(how.pattern, NM) else 1)
    pattern = Element() if isinstance(how.pattern, Block) else how.pattern
    scale = max(1.0, max(rows, columns) / _SMALL)
    small = [max(unit, round(size / scale / unit) * unit) for size in (rows, columns)]
    random = torch.Generator().manual_seed(0)
    inputs = torch.randn(2 * small[1], small[1], generator=random, device="cpu")
    with Live() as live:
        weight = torch.randn(*small, generator=random, device="cpu")
        gram = inputs.T @ inputs
        how.method(weight, gram, pattern, sparsity=0.5)
    return math.ceil(int(live.peak) * max(rows * columns / math.prod(small), (columns / small[1]) ** 2))


@dataclass(frozen=True)
class Peak:
    """Bytes in use at one moment of a run, by purpose."""

    parts: Mapping[str, int]
    on_disk: bool = False

    @property
    def bytes(self) -> int:
        """The sum."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{what} {byte_size(part)}" for what, part in self.parts.items() if part)
        return f"{byte_size(self.bytes)} ({parts})"


def largest(moments: Callable[[bool], list[Peak]], budget: int | None) -> Peak:
    """The peak with the hidden states in memory if it is within the budget, else with the hidden states on disk.

    Errors: RequestError with the numbers if both exceed the budget.
    """
    for on_disk in (False, True):
        peak = max(moments(on_disk), key=lambda moment: moment.bytes)
        if budget is None or peak.bytes <= budget:
            return peak
    why = f"it would take {peak}, with the hidden states on disk"
    todo = f"give at least {byte_size(peak.bytes * 1.02)}, or smaller batches, or a solver that takes less (by_score)"
    raise RequestError(f"{byte_size(budget or 0)} of memory are not enough", why, todo)
