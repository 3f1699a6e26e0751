"""`--device`: where models and data of a verb are. What is chosen here holds for the verb that runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

CPU = "cpu"
_CHOSEN: ContextVar[str] = ContextVar("device", default=CPU)


@contextmanager
def on(device: str) -> Iterator[None]:
    """Everything that the verb loads is put there. Errors: those of `check_device`, before any work."""
    if device != CPU:
        check_device(device)
    token = _CHOSEN.set(device)
    try:
        yield
    finally:
        _CHOSEN.reset(token)


def chosen() -> str:
    """The device of the verb that runs."""
    return _CHOSEN.get()


def check_device(device: str) -> None:
    """Errors: RequestError for an unknown device, NotSupported for one that is not available here."""
    import torch

    from prunella.errors import NotSupported, RequestError

    try:
        named = torch.device(device)
    except RuntimeError as error:
        why = str(error).splitlines()[0]
        raise RequestError(f"there is no device {device!r}", why, "for example --device cuda:0") from None
    what, todo = f"the device {device} cannot be used here", "leave --device out: everything runs on the CPU"
    if named.type == "meta":
        raise NotSupported(what, "tensors have no numbers there", todo)
    if named.type == "cuda" and torch.cuda.is_available() and (named.index or 0) >= torch.cuda.device_count():
        raise NotSupported(what, f"there are {torch.cuda.device_count()}, from cuda:0", todo)
    try:
        torch.ones(1, device=named).add(1).item()
    except Exception as error:  # each backend fails in its own way
        why = f"torch {torch.__version__} says: {str(error).strip().splitlines()[0]}"
        raise NotSupported(what, why, todo) from None


def only_on_cpu(what: str) -> None:
    """Errors: NotSupported if another device was chosen for what runs on the CPU alone."""
    from prunella.errors import NotSupported

    if chosen() != CPU:
        raise NotSupported(f"{what} does not run on {chosen()}", "it is written for the CPU", "leave --device out")


def placed(model: nn.Module) -> nn.Module:
    """The model on the device."""
    return model if chosen() == CPU else model.to(chosen())


def moved(value: Any) -> Any:
    """Tensors in nested data, on the device."""
    if chosen() == CPU:
        return value
    from prunella.model.trees import each

    device = chosen()
    return each(value, lambda tensor: tensor.to(device))


def moved_batches(batches: Iterable[Any]) -> Iterable[Any]:
    """The batches, each moved when it is read; a loader keeps its length and its dataset."""
    if chosen() == CPU:
        return batches
    return [moved(batch) for batch in batches] if isinstance(batches, list | tuple) else _Moved(batches, chosen())


class _Moved:
    """A loader whose batches come to a device."""

    def __init__(self, loader: Iterable[Any], device: str) -> None:
        self._loader, self._device = loader, device

    def __iter__(self) -> Iterator[Any]:
        with on(self._device):
            yield from (moved(batch) for batch in self._loader)

    def __len__(self) -> int:
        length: int = len(self._loader)  # type: ignore[arg-type]
        return length

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
