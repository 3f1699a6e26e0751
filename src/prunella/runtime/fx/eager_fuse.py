"""Which activation modules are the only readers of a layer's output, seen in one run of the model.

For models that `torch.fx` cannot follow. Every operation of a run is watched: a pair counts if one operation reads the
output of the layer, once, inside the activation module, and the model does not return it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from prunella.model.forward import forward, tensors
from prunella.runtime.fx.fuse import activation_of
from prunella.types import Inputs


def pairs(model: nn.Module, layers: Mapping[str, nn.Module], example: Inputs) -> dict[str, str]:
    """Layer -> path of the activation module that alone reads what it gives."""
    acts = {name: module for name, module in model.named_modules() if activation_of(module) is not None}
    acts = {
        name: module for name, module in acts.items() if not module._forward_hooks and not module._forward_pre_hooks
    }
    seen = _Seen()
    with _watched(seen, layers, acts), torch.no_grad(), seen:
        out = forward(model, example)
    for tensor in tensors(out):
        seen.read(tensor, "")
    found = {}
    for name in layers:
        readers = seen.readers[name]
        if seen.calls[name] == 1 and len(readers) == 1 and readers[0] in acts and seen.calls[readers[0]] == 1:
            found[name] = readers[0]
    return found


class _Seen(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes in which activation each output of a layer is read; "" is anywhere else."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: dict[int, str] = {}
        self.readers: dict[str, list[str]] = {}
        self.calls = Counter[str]()
        self.inside: list[str] = []
        self.kept: list[Tensor] = []  # so that no address is used twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tensors((args, kwargs or {})):
            self.read(tensor, self.inside[-1] if self.inside else "")
        return func(*args, **(kwargs or {}))

    def read(self, tensor: Tensor, where: str) -> None:
        name = self.made.get(_address(tensor))
        if name is not None:
            self.readers[name].append(where)

    def given(self, name: str, output: Any) -> None:
        self.calls[name] += 1
        self.readers.setdefault(name, [])
        if isinstance(output, Tensor):
            self.made[_address(output)] = name
            self.kept.append(output)


def _address(tensor: Tensor) -> int:
    return 0 if tensor.is_meta else tensor.untyped_storage().data_ptr()


@contextmanager
def _watched(seen: _Seen, layers: Mapping[str, nn.Module], acts: Mapping[str, nn.Module]) -> Iterator[None]:
    def gave(name: str, module: nn.Module, args: Any, output: Any) -> None:
        seen.given(name, output)

    def enter(name: str, module: nn.Module, args: Any) -> None:
        seen.calls[name] += 1
        seen.inside.append(name)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        seen.inside.pop()

    handles = [layer.register_forward_hook(partial(gave, name)) for name, layer in layers.items()]
    for name, act in acts.items():
        handles += [act.register_forward_pre_hook(partial(enter, name)), act.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        seen.kept.clear()
