"""Fusion of activations for models that `torch.fx` cannot trace, found in one eager run of the model.

A layer and an activation module can be fused if exactly one operation of the run reads the output of the layer, inside
the activation module, and the model does not return that output.
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

from prunella.model.forward import forward
from prunella.model.trees import tensors
from prunella.runtime.fx.fuse import activation_of
from prunella.types import Inputs


def eager_fusions(model: nn.Module, layers: Mapping[str, nn.Module], example: Inputs) -> dict[str, str]:
    """Layer -> path of the activation module that is the only reader of its output."""
    acts = {name: module for name, module in model.named_modules() if activation_of(module) is not None}
    acts = {
        name: module for name, module in acts.items() if not module._forward_hooks and not module._forward_pre_hooks
    }
    log = _ReadLog()
    with _recording(log, layers, acts), torch.no_grad(), log:
        output = forward(model, example)
    for tensor in tensors(output):
        log.read(tensor, "")
    fusions = {}
    for name in layers:
        readers = log.readers[name]
        if log.calls[name] == 1 and len(readers) == 1 and readers[0] in acts and log.calls[readers[0]] == 1:
            fusions[name] = readers[0]
    return fusions


class _ReadLog(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records in which activation module each output of a layer is read; "" is any other place."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.producers: dict[int, str] = {}
        self.readers: dict[str, list[str]] = {}
        self.calls = Counter[str]()
        self.inside: list[str] = []
        self.alive: list[Tensor] = []  # so that no two outputs share an address

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tensors((args, kwargs or {})):
            self.read(tensor, self.inside[-1] if self.inside else "")
        return func(*args, **(kwargs or {}))

    def read(self, tensor: Tensor, where: str) -> None:
        name = self.producers.get(_address(tensor))
        if name is not None:
            self.readers[name].append(where)

    def produced(self, name: str, output: Any) -> None:
        self.calls[name] += 1
        self.readers.setdefault(name, [])
        if isinstance(output, Tensor):
            self.producers[_address(output)] = name
            self.alive.append(output)


def _address(tensor: Tensor) -> int:
    return 0 if tensor.is_meta else tensor.untyped_storage().data_ptr()


@contextmanager
def _recording(log: _ReadLog, layers: Mapping[str, nn.Module], acts: Mapping[str, nn.Module]) -> Iterator[None]:
    def produced(name: str, module: nn.Module, args: Any, output: Any) -> None:
        log.produced(name, output)

    def enter(name: str, module: nn.Module, args: Any) -> None:
        log.calls[name] += 1
        log.inside.append(name)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        log.inside.pop()

    handles = [layer.register_forward_hook(partial(produced, name)) for name, layer in layers.items()]
    for name, act in acts.items():
        handles += [act.register_forward_pre_hook(partial(enter, name)), act.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        log.alive.clear()
