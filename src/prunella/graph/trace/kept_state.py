"""The state of a model between calls in plain Python, such as a counter or a size, and whether a run changes it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn

from prunella.graph.data import Setting
from prunella.graph.trace.tracked_int import bare, holder, holders, space_of
from prunella.model.beside import NUMBERS, beside
from prunella.model.unread import is_elsewhere

_MACHINERY = frozenset({"_parameters", "_modules", "training"})
_CONTAINERS = (dict, list, set, deque)


@dataclass(frozen=True)
class KeptChange:
    """A value that a run has changed. owner: as in `Attr.owner`; None outside modules and configurations."""

    owner: str | None
    name: str
    value: Any

    @property
    def number(self) -> bool:
        """Whether it is a number of a module, which may count the calls."""
        return self.owner is not None and type(self.value) in (int, float)


class Snapshot:
    """The plain values of a model at one moment: of modules, their configurations, classes and files of source."""

    def __init__(self, model: nn.Module) -> None:
        self._spaces = list(_spaces(model))
        self._before = [_values(space) for _, space in self._spaces]

    def changes(self) -> list[KeptChange]:
        """The values that have changed, or may have: the position of an iterator cannot be read."""
        changes: list[KeptChange] = []
        for (owner, space), before in zip(self._spaces, self._before, strict=True):
            for name, value in list(space.items()):
                old = before.get(name, _MISSING)
                if name not in _MACHINERY and not is_elsewhere(value) and _differs(old, value):
                    changes.append(KeptChange(owner, name, bare(value) if isinstance(value, NUMBERS) else None))
        return changes


_MISSING = object()


def enter(model: nn.Module, setting: Setting, run: Callable[[Any], object]) -> None:
    """Bring the model into the state of a setting, inside a guard that restores it. run: runs it on a batch."""
    for batch in setting.before:
        run(batch)
    keep(model, setting)


def keep(model: nn.Module, setting: Setting) -> None:
    """Set the kept numbers of a setting."""
    for owner, name, value in setting.kept:
        space_of(holder(model, owner))[name] = value


def _spaces(model: nn.Module) -> Iterator[tuple[str | None, Mapping[str, Any]]]:
    yield from holders(model)
    yield from ((None, vars(holder)) for holder in beside(model))


def _values(space: Mapping[str, Any]) -> dict[str, Any]:
    """Name -> the value, or a copy of its content; for a tensor its version counter."""
    kept = ((name, value) for name, value in space.items() if name not in _MACHINERY and not is_elsewhere(value))
    return {name: _noted(value) for name, value in kept}


def _noted(value: Any) -> Any:
    if isinstance(value, _CONTAINERS):
        return value, [_version(item) for item in (value.values() if isinstance(value, dict) else value)]
    return value, _version(value)[1]


def _version(value: Any) -> tuple[Any, int]:
    return value, value._version if isinstance(value, Tensor) and not value.is_inference() else 0


def _differs(old: Any, value: Any) -> bool:
    if type(value).__module__ in {"itertools", "builtins"} and isinstance(value, Iterator):
        return True
    if old is _MISSING:
        return not isinstance(value, type | ModuleType | FunctionType)
    before, content = old
    if isinstance(value, NUMBERS):
        return not _same(bare(value), bare(before))
    if before is not value:
        return True
    _, now = _noted(value)
    if isinstance(now, list) and isinstance(content, list):
        pairs = zip(now, content, strict=False)
        return len(now) != len(content) or any(a is not b or m != n for (a, m), (b, n) in pairs)
    return bool(now != content)


def _same(value: Any, before: Any) -> bool:
    """Whether both are the same number, text or object; tuples may hold tensors, for which `==` gives no bool."""
    if type(value) is not type(before):
        return False
    if isinstance(value, tuple):
        return len(value) == len(before) and all(map(_same, value, before))
    return value is before or (isinstance(value, NUMBERS) and bool(value == before))
