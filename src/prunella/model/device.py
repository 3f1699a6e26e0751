"""Where numbers live: the one rule of devices, and the calls of torch that depend on the type of a device.

Sums and factors are in float64: on the device of their operands if it has float64, else on the CPU (`wide`). A duration
is read only after `synchronize`, since an accelerator works on after a call has returned. The table of the rule is in
`docs/devices.md`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prunella.errors import ACCELERATOR_FULL, NotSupported, OutOfResources
from prunella.model.trees import each, tensors

CPU = torch.device("cpu")
NO_FLOAT64 = frozenset({"mps"})
"""Types of devices without float64, in which cuts are proven."""


def has_float64(device: torch.device) -> bool:
    """Whether a tensor on this device can be in float64."""
    return device.type not in NO_FLOAT64


def home_of_sums(device: torch.device) -> torch.device:
    """Where sums of tensors of this device are, in float64: there if the device has float64, else on the CPU."""
    return device if has_float64(device) else torch.device("cpu")


def wide(tensor: Tensor) -> Tensor:
    """The tensor in float64, where sums of it are."""
    return tensor.to(home_of_sums(tensor.device)).double()


@contextmanager
def full_float32() -> Iterator[None]:
    """Inside, products of float32 are products of float32, although a program allows shorter numbers: TF32 on CUDA,
    bfloat16 in oneDNN. A solver divides by small pivots, and would carry their rounding on.
    """
    short = [backend for backend in _products() if backend.fp32_precision not in ("none", "ieee")]
    before = [backend.fp32_precision for backend in short]
    for backend in short:
        backend.fp32_precision = "ieee"
    try:
        yield
    finally:
        for backend, precision in zip(short, before, strict=True):
            backend.fp32_precision = precision


def _products() -> list[Any]:
    """The backends of torch whose products of float32 can be shortened; older versions of torch have none by name."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn, torch.backends.mkldnn)
    parts = (getattr(backend, name, None) for backend in backends[1:] for name in ("matmul", "conv", "rnn"))
    return [part for part in (backends[0], *parts) if hasattr(part, "fp32_precision")]


def check_float64(model: nn.Module, what: str = "cuts are proven") -> None:
    """Errors: NotSupported for a model on a device that has no float64. what: is done in it."""
    for name, tensor in model.named_parameters():
        if not has_float64(tensor.device):
            why = f"{what} in float64, which this device does not have"
            todo = "move the model to the CPU, prune it, and move the smaller model back"
            raise NotSupported(f"{name} is on the device {tensor.device}", why, todo)


def device_of(model: nn.Module) -> torch.device:
    """The device of the first parameter or buffer; the CPU for a model without them."""
    return next((tensor.device for tensor in _state(model)), torch.device("cpu"))


def device_name(device: torch.device) -> str:
    """What torch calls this device, such as its product's name."""
    if device.type in ("cuda", "xpu"):
        return str(torch.get_device_module(device).get_device_name(device))
    return str(device)


def devices_of(*models: nn.Module) -> str:
    """All devices of the models, as `synchronize` takes them: `cpu`, or `cuda:0, cuda:1`."""
    names = dict.fromkeys(str(tensor.device) for model in models for tensor in _state(model))
    return ", ".join(names) or "cpu"


def synchronize(devices: torch.device | str) -> None:
    """Wait until these devices have done all their work; nothing for those that work within the call.

    devices: one, or several as `devices_of` lists them.
    """
    if str(devices) == "cpu":  # timed calls end here: keep it fast
        return
    accelerator = torch.accelerator.current_accelerator()
    for name in str(devices).split(", ") if accelerator is not None else ():
        if torch.device(name).type == getattr(accelerator, "type", ""):
            torch.accelerator.synchronize(torch.device(name))


def on_accelerator(devices: torch.device | str) -> bool:
    """Whether one of the devices works on after a call has returned: its work is no time of a thread."""
    return any(torch.device(name).type != "cpu" for name in str(devices).split(", "))


def short_of_memory(error: BaseException) -> bool:
    """Whether an accelerator is out of memory; for the memory of the machine Python and torch raise other errors."""
    if isinstance(error, OutOfResources) and error.__cause__ is not None:
        return short_of_memory(error.__cause__)
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(part in text for part in ACCELERATOR_FULL)
    )


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on an accelerator; None where its backend does not say."""
    report = getattr(torch.get_device_module(device), "mem_get_info", None) if device.type in ("cuda", "xpu") else None
    return None if report is None else int(report(device)[0])


def free_cached_memory() -> None:
    """Give memory that torch has cached on an accelerator back, before a smaller attempt."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None and torch.accelerator.is_available():
        torch.get_device_module(accelerator).empty_cache()


def device_is_full(error: BaseException, what: str) -> OutOfResources:
    """The typed error of an accelerator that is out of memory, after every smaller attempt."""
    why = str(error).strip().splitlines()[0] if str(error).strip() else "torch says no more"
    return OutOfResources(what, why, "give smaller batches, or run on the CPU; other programs may hold the memory")


def placed_if_they_fit(models: Iterable[nn.Module], device: torch.device | str) -> torch.device:
    """Move models to a device, all of them or, where its memory is too small, none; returns where they are."""
    moved = list(models)
    try:
        for model in moved:
            model.to(device)
        return torch.device(device)
    except RuntimeError as error:
        if not short_of_memory(error):
            raise
    for model in moved:
        model.to(CPU)
    free_cached_memory()
    return CPU


def halves(batch: Any) -> list[Any]:
    """Two batches of half the samples; the batch alone if it has one sample, or axes of different lengths."""
    batched = [tensor for tensor in tensors(batch) if tensor.dim()]
    sizes = {tensor.shape[0] for tensor in batched}
    size = next(iter(sizes)) if len(sizes) == 1 else 1
    if size < 2:
        return [batch]
    middle = size // 2
    parts: Iterable[Callable[[Tensor], Tensor]] = (lambda t: t[:middle], lambda t: t[middle:])
    return [each(batch, lambda t, part=part: part(t) if t.dim() else t) for part in parts]  # type: ignore[misc]


def halved(data: Iterable[Any]) -> list[Any] | None:
    """Every batch in halves; None if none can be halved."""
    before = list(data)
    after = [half for batch in before for half in halves(batch)]
    return after if len(after) > len(before) else None


def _state(model: nn.Module) -> Iterable[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
