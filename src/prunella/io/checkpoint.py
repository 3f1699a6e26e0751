"""Checkpoints of training loops: the entry with the weights, and the prefixes of their names.

A file may hold one state dict, or several, next to an epoch, an optimizer and settings. Names may share a prefix
(`module.`, `model.`) and contain segments added by torch's wrappers. Every choice is reported to the caller, and
ambiguous checkpoints are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from prunella.errors import BadInput, RequestError
from prunella.io.checkpoint_file import load_tensors_only
from prunella.io.kind_of_path import refuse_other_kind
from prunella.model.unwrap import WRAPPER_SEGMENTS

Tell = Callable[[str], None]
"""Receives one line for the user."""
_COUNTERS = frozenset(("n_averaged",))
"""Buffers that a wrapper adds to those of the model."""


def read_pickled(file: Path, *, allow_pickle: bool) -> Any:
    """The content of a torch file as tensors and plain data; an `argparse.Namespace` is plain data too.

    Errors: BadInput for a file that may not be read, is damaged, or holds other classes.
    """
    if not allow_pickle:
        what = f"refused to read {file}"
        refuse_other_kind(file, "torch", what=what, give="give a safetensors file, or one that torch.save wrote")
        why = f"{file.suffix or 'this'} is not a safetensors file; a pickle can run code when read"
        todo = "convert it, or allow it (--allow-pickle, allow_pickle=True): tensors and plain data only are read"
        raise BadInput(what, why, todo)
    return load_tensors_only(file)


def weight_sets(content: Mapping[Any, Any]) -> dict[str, dict[str, Tensor]]:
    """Entry -> the state dict in it; the entry "" if the checkpoint itself is a state dict."""
    inner = {str(key): _tensors(value) for key, value in content.items() if isinstance(value, Mapping)}
    found = {key: tensors for key, tensors in {"": _tensors(content), **inner}.items() if tensors}
    return found or _nested_twice(content)


def _nested_twice(content: Mapping[Any, Any]) -> dict[str, dict[str, Tensor]]:
    """The same one level further in: `checkpoint.model`."""
    outer = {key: value for key, value in content.items() if isinstance(value, Mapping)}
    inner = {f"{a}.{b}": _tensors(v) for a, value in outer.items() for b, v in value.items() if isinstance(v, Mapping)}
    return {key: tensors for key, tensors in inner.items() if tensors}


def pick_weights(content: Any, own: Mapping[str, Tensor], *, where: str, key: str, tell: Tell) -> dict[str, Tensor]:
    """The state dict of a checkpoint that fits the tensors `own` of a model, under the names of the model.

    key: the entry that holds it, with dots for entries in entries; empty to look for it. Errors: BadInput where there
    is none, RequestError for a wrong key, or where several entries fit equally.
    """
    sets = sets_at(content, key, where)
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
    names = {entry: Names.of(tensors, frozenset(own)) for entry, tensors in sets.items()}
    fits = {e: sum(shapes.get(names[e].read(n)) == tuple(t.shape) for n, t in sets[e].items()) for e in sets}
    best = max(fits, key=lambda entry: (fits[entry], len(sets[entry])))
    equal = [entry for entry in sets if fits[entry] == fits[best] > 0]
    if len(equal) > 1:
        raise _several(equal, where)
    if best and not key:
        tell(f"{where}: the weights are those of its entry {best!r}")
    if said := names[best].said:
        tell(f"{where}: {said}")
    return names[best].renamed(sets[best], where)


def only_weights(content: Mapping[Any, Any], where: str) -> dict[str, Tensor]:
    """The single state dict of a checkpoint, without a model to compare with. Errors: as for `pick_weights`."""
    sets = sets_at(content, "", where)
    most = max(len(tensors) for tensors in sets.values())
    largest = [entry for entry, tensors in sets.items() if len(tensors) == most]
    if len(largest) > 1:
        raise _several(largest, where)
    return sets[largest[0]]


def sets_at(content: Any, key: str, where: str) -> dict[str, dict[str, Tensor]]:
    """`weight_sets` of a checkpoint or of an entry of it. Errors: BadInput where there is none, RequestError."""
    inner = entry_of(content, key, where) if key else content
    sets = weight_sets(inner) if isinstance(inner, Mapping) else {}
    if not sets:
        held = ", ".join(map(repr, list(inner)[:6])) if isinstance(inner, Mapping) else f"a {type(inner).__name__}"
        what = f"there are no tensors in {where}" + (f" at {key!r}" if key else "")
        raise BadInput(what, f"it holds {held or 'nothing'}", "give model.state_dict()")
    return sets


def _several(entries: list[str], where: str) -> RequestError:
    shown = [repr(entry) if entry else "the checkpoint itself" for entry in entries]
    why = f"{', '.join(shown[:-1])} and {shown[-1]} fit equally"
    todo = f"say which one: --weights-key {next(filter(None, entries))} (key= in Python)"
    return RequestError(f"{where} holds several sets of weights", why, todo)


@dataclass(frozen=True)
class Names:
    """The mapping from names of a checkpoint to names of a model. fit: number of names that the model has."""

    taken_off: str = ""
    put_on: str = ""
    wrapped: bool = False
    fit: int = 0

    @classmethod
    def of(cls, names: Iterable[str], own: frozenset[str]) -> Names:
        """The renaming with the most names of the model; the simplest among equal ones."""
        names = tuple(names)
        renamings = [cls(wrapped=wrapped) for wrapped in (False, True)]
        for wrapped in (False, True):
            bare = [cls(wrapped=wrapped).read(name) for name in names]
            renamings += [cls(prefix, "", wrapped) for prefix in _prefixes(bare)]
            renamings += [cls("", prefix, wrapped) for prefix in _prefixes(own)]
        scored = [cls(w.taken_off, w.put_on, w.wrapped, sum(w.read(n) in own for n in names)) for w in renamings]
        return max(scored, key=lambda renaming: renaming.fit)

    def read(self, name: str) -> str:
        """A name of the checkpoint as a name of the model."""
        if self.wrapped:
            name = ".".join(part for part in name.split(".") if part not in WRAPPER_SEGMENTS)
        return self.put_on + name.removeprefix(self.taken_off)

    @property
    def said(self) -> str:
        """A line that says what was changed; empty if nothing was."""
        parts = ["the segments of torch's wrappers"] if self.wrapped else []
        parts += [f"the prefix {self.taken_off!r}"] if self.taken_off else []
        line = f"took {' and '.join(parts)} off the names" if parts else ""
        return line or (f"put the prefix {self.put_on!r} before the names" if self.put_on else "")

    def renamed(self, tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
        """The tensors under the model's names, without the counters of wrappers. Errors: BadInput for a clash."""
        weights = {n: v for n, v in tensors.items() if not (n.rpartition(".")[2] in _COUNTERS and v.dim() == 0)}
        renamed = {self.read(name): value for name, value in weights.items()}
        if len(renamed) < len(weights):
            why = "they differ only in the segments of wrappers"
            raise BadInput(f"two names of {where} mean one weight", why, "save the bare model's state_dict()")
        return renamed


def _prefixes(names: Iterable[str]) -> list[str]:
    """Prefixes of whole segments, the shortest first, that the most names begin with."""
    counts: dict[str, int] = {}
    for name in names:
        parts = name.split(".")
        for k in range(1, min(len(parts), 6)):
            prefix = ".".join(parts[:k]) + "."
            counts[prefix] = counts.get(prefix, 0) + 1
    common = max(counts.values(), default=0)
    return [prefix for prefix, count in sorted(counts.items(), key=lambda item: len(item[0])) if 2 * count > common]


def _tensors(value: Mapping[Any, Any]) -> dict[str, Tensor]:
    """The named tensors of a state dict; none if it also holds mappings or lists, as an optimizer's state does."""
    return {str(name): entry for name, entry in value.items() if isinstance(entry, Tensor) and isinstance(name, str)}


def entry_of(content: Any, key: str, where: str) -> Any:
    """The entry `key` of a checkpoint; dots lead to entries in entries. Errors: RequestError if there is none."""
    inner = content
    for part in (key,) if isinstance(content, Mapping) and key in content else key.split("."):
        if not isinstance(inner, Mapping) or part not in inner:
            known = ", ".join(map(repr, list(inner)[:8])) if isinstance(inner, Mapping) else f"a {type(inner).__name__}"
            raise RequestError(f"{where} has no entry {key!r}", f"it holds {known}", "give the name of an entry")
        inner = inner[part]
    return inner
