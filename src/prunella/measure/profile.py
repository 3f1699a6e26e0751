"""Time per layer and peak memory of a forward pass."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from prunella.measure.clock import now
from prunella.model.device import devices_of, synchronize
from prunella.model.forward import forward
from prunella.model.hooks import removed_after
from prunella.model.state import mode
from prunella.model.trees import own, tensors
from prunella.types import Inputs

OTHER = "(between layers)"
"""Time outside leaf modules: attention products, additions, views, Python itself."""


def peak_memory(model: nn.Module, inputs: Inputs) -> int:
    """Peak bytes of all live tensors in one forward pass: parameters, buffers, inputs, activations.

    The bytes are counted, not sampled: every new storage is added and every freed storage is subtracted, so the number
    is the same on every machine. Scratch memory inside kernels is not counted. On CUDA the number is torch's own
    `max_memory_allocated`, where other tensors on the device count too.
    """
    device = next((t.device for t in [*model.parameters(), *model.buffers()]), torch.device("cpu"))
    inputs = own(inputs)
    with mode(model, training=False), torch.no_grad():
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            forward(model, inputs, copy=False)
            torch.cuda.synchronize(device)
            return int(torch.cuda.max_memory_allocated(device))
        resident = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in _all_tensors(model, inputs)}
        with _Storages(set(resident)) as storages:
            forward(model, inputs, copy=False)
    return int(sum(resident.values()) + storages.peak)


def time_by_layer(
    models: Mapping[str, nn.Module], inputs: Inputs, *, repeats: int = 10, warmup: int = 2
) -> dict[str, dict[str, float]]:
    """Median seconds that each leaf module takes in one pass, for several models measured in turn.

    Hooks cost about a microsecond per layer, so the numbers are for shares; `compare_latency` is for times. `OTHER`
    holds the rest of the pass. A layer that is called several times in a pass counts with the sum.
    """
    inputs = own(inputs)
    times_by_model: dict[str, dict[str, list[float]]] = {name: {} for name in models}
    with ExitStack() as stack, torch.no_grad():
        for model in models.values():
            stack.enter_context(mode(model, training=False))
        for repeat in range(warmup + repeats):
            for name, model in models.items():
                spent = _one_pass(model, inputs)
                for layer, seconds in spent.items() if repeat >= warmup else ():
                    times_by_model[name].setdefault(layer, []).append(seconds)
    return {name: {layer: median(times) for layer, times in layers.items()} for name, layers in times_by_model.items()}


def _one_pass(model: nn.Module, inputs: Inputs) -> dict[str, float]:
    spent: dict[str, float] = {}
    with _clocks(model, spent):
        start = _now(model)
        forward(model, inputs, copy=False)
        total = _now(model) - start
    spent[OTHER] = max(0.0, total - sum(spent.values()))
    return spent


@contextmanager
def _clocks(model: nn.Module, spent: dict[str, float]) -> Iterator[None]:
    started: dict[str, float] = {}
    handles = []
    for name, module in model.named_modules():
        if next(module.children(), None) is not None:
            continue

        def start(_: nn.Module, __: Any, *, name: str = name) -> None:
            started[name] = _now(model)

        def stop(_: nn.Module, __: Any, ___: Any, *, name: str = name) -> None:
            spent[name] = spent.get(name, 0.0) + _now(model) - started[name]

        handles += [module.register_forward_pre_hook(start), module.register_forward_hook(stop)]
    with removed_after(handles):
        yield


def _now(model: nn.Module) -> float:
    synchronize(devices_of(model))
    return now()


def _all_tensors(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    return [*model.parameters(), *model.buffers(), *tensors(inputs)]


class _Storages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the live storages of operations, and their peak."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the guard against the compiler would import it, which takes seconds

    def __init__(self, known: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known = known
        self._seen: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tensors(out):
            self._add(tensor.untyped_storage())
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or key in self._seen:
            return

        def freed(_: object) -> None:
            self.live -= size
            self._seen.pop(key, None)

        self._seen[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)
