"""The parameters from which a tensor is computed by views, norms or fake quantization, without the model's inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Names = frozenset[str]
NONE: Names = frozenset()
FORMS = frozenset(
    "view _unsafe_view reshape _reshape_alias permute t transpose squeeze unsqueeze expand clone detach alias _to_copy "
    "slice select split split_with_sizes unbind lift_fresh contiguous unsafe_split cat stack".split()
)
"""Operations that change the form of a parameter without computing with it."""


class Sources:
    """The parameters behind the tensors of one run, by memory and by the operations that made them.

    entities: parameters and buffers by name. A buffer, and a tensor made from nothing, is computed from no parameter.
    """

    def __init__(self, entities: Mapping[str, Tensor], parameters: Iterable[str]) -> None:
        self._made: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._at: dict[int, list[tuple[int, int, Names]]] = {}
        self._active: set[int] = set()
        """Memory that holds activations, including newly created tensors that are filled in place."""
        names = set(parameters)
        for name, tensor in entities.items():
            key, own = memory(tensor), frozenset({name}) if name in names else NONE
            if key is None:
                self._made[tensor] = own
            else:
                self._at.setdefault(key, []).append((int(tensor.storage_offset()), tensor.numel(), own))

    def of(self, tensor: Tensor) -> Names | None:
        """The names of the parameters; None for an activation."""
        if memory(tensor) in self._active:
            return None
        if tensor in self._made:
            names: Names = self._made[tensor]
            return names
        return self._held(tensor)

    def held(self, tensor: Tensor) -> Names:
        """The parameter whose memory this tensor shows; empty for any other tensor."""
        return self._held(tensor) or NONE

    def _held(self, tensor: Tensor) -> Names | None:
        key = memory(tensor)
        for start, size, names in self._at.get(key, ()) if key is not None else ():
            if start <= tensor.storage_offset() < start + size:
                return names
        return None

    def note(self, arguments: Iterable[Tensor], results: Sequence[Tensor]) -> Names | None:
        """Record one operation; returns the parameters of its results, None for activations."""
        parts = [self.of(tensor) for tensor in arguments]
        keys = {key for key in map(memory, results) if key is not None}
        if any(part is None for part in parts):
            self._active |= keys
            return None
        names = NONE.union(*(part for part in parts if part))
        self._active -= keys
        for tensor in results:
            self._made[tensor] = names
        return names

    def read(self, tensors: Iterable[Tensor]) -> Names:
        """The parameters that some of these tensors are computed from."""
        return NONE.union(*(part for part in map(self.of, tensors) if part))


def memory(tensor: Tensor) -> int | None:
    """A number that all views of the same memory share; None for layouts without one."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError, TypeError):
        return None


def by_memory(named: Mapping[str, Tensor]) -> dict[int, str]:
    """The number of its memory -> the name, of each tensor that has one."""
    return {number: name for name, tensor in named.items() if (number := memory(tensor)) is not None}
