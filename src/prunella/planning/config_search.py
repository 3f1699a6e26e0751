"""Search the configuration of a smaller model, by changing integers of the dense model's configuration.

There is no table of architectures. A candidate counts only if a model built from it has exactly the tensor shapes of
the smaller model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import nn

from prunella.errors import PruningError
from prunella.graph.solve.tokens import names_token
from prunella.graph.verify import relative_error
from prunella.model.forward import outputs_of
from prunella.model.state import mode

Sizes = Mapping[int, frozenset[int]]
Shapes = Mapping[str, tuple[int, ...]]
ConfigPath = tuple[str, ...]
Build = Callable[[Mapping[str, Any]], Shapes]
"""Gives the tensor shapes of the model of a configuration. Errors: PruningError if the model cannot be built."""


class Change(NamedTuple):
    """One entry of the configuration set to `value`, which is `ratio` times the old value."""

    path: ConfigPath
    value: int
    ratio: Fraction | None = None


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor in the state dict."""
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def changed_sizes(dense: Shapes, small: Shapes, pairs: Iterator[tuple[int, int]]) -> Sizes:
    """Old size -> new sizes: of the axes of tensors that differ, and of `pairs` (heads, attributes)."""
    sizes: dict[int, set[int]] = {}
    axes = ((a, b) for name in dense.keys() & small.keys() for a, b in zip(dense[name], small[name], strict=False))
    for old, new in [*axes, *pairs]:
        if old != new:
            sizes.setdefault(old, set()).add(new)
    return {old: frozenset(new) for old, new in sizes.items()}


def shallower(
    config: Mapping[str, Any], sizes: Mapping[tuple[str, str], Any], lists: Mapping[tuple[str, str], tuple[int, ...]]
) -> dict[str, Any]:
    """The configuration with the plan's number of blocks, if the configuration belongs to the full model."""
    shallow = copy.deepcopy(dict(config))
    for (owner, name), value in sizes.items():
        if owner == ":config" and name in shallow:
            shallow[name] = value
    for (owner, name), removed in lists.items():
        entries = shallow.get(name)
        if owner == ":config" and isinstance(entries, list):
            shallow[name] = [entry for k, entry in enumerate(entries) if k not in removed]
    return shallow


def with_tokens(config: Mapping[str, Any], live: Any) -> dict[str, Any]:
    """A configuration with the token ids of the live configuration, which change with a cut of the vocabulary."""
    renumbered = dict(config)
    for key, value in config.items():
        if isinstance(value, dict) and hasattr(live, key):
            renumbered[key] = with_tokens(value, getattr(live, key))
        elif names_token(key) and hasattr(live, key):
            renumbered[key] = getattr(live, key)
    return renumbered


def steady(model: nn.Module, config: Mapping[str, Any], inputs: Any) -> frozenset[ConfigPath]:
    """Entries that do not change in the smaller model: its modules store that integer, and compute with it."""
    homes: dict[str, list[nn.Module]] = {}
    for module in model.modules():
        for name, value in vars(module).items():
            if type(value) is int and config.get(name) == value:
                homes.setdefault(name, []).append(module)
    return frozenset((name,) for name, holders in homes.items() if _matters(model, holders, name, inputs))


def _matters(model: nn.Module, homes: list[nn.Module], name: str, inputs: Any) -> bool:
    """Whether another integer there changes the outputs of the model or makes it fail."""
    with mode(model, training=False), torch.no_grad():
        expected = outputs_of(model, inputs)
        old = getattr(homes[0], name)
        for module in homes:
            setattr(module, name, old + 1)
        try:
            return relative_error(expected, outputs_of(model, inputs)) > 0
        except Exception:  # a probe: on any error the integer is used
            return True
        finally:
            for module in homes:
                setattr(module, name, old)


def uniform_configs(
    build: Build,
    dense: Mapping[str, Any],
    small: Shapes,
    sizes: Sizes,
    kept: frozenset[ConfigPath] = frozenset(),
) -> Iterator[dict[str, Any]]:
    """Configurations that build exactly the shapes `small`; a caller takes the first that also computes the same.

    Right shapes do not imply the right model (fewer heads, or narrower heads). After the first solution the search
    therefore continues with one of its changes excluded. A configuration has one width for all layers, so it describes
    only uniform cuts. Entries in `kept` are changed only if no other change explains the shapes.
    """
    first = search(build, dense, small, sizes, kept) or (search(build, dense, small, sizes) if kept else None)
    if first is None:
        return
    yield first[0]
    for path in first[1]:
        other = search(build, dense, small, sizes, frozenset([path]))
        if other is not None:
            yield other[0]


def search(
    build: Build, dense: Mapping[str, Any], small: Shapes, sizes: Sizes, without: frozenset[ConfigPath] = frozenset()
) -> tuple[dict[str, Any], tuple[ConfigPath, ...]] | None:
    """Repeat the change that corrects the most shapes, until all are right or none helps."""
    config, taken = copy.deepcopy(dict(dense)), list[ConfigPath]()
    right, useless, is_undone = _right(build, config, small), set[Change](), False
    while right < len(small):
        singles = [c for c in _candidates(config, sizes) if c not in useless and c.path not in {*without, *taken}]
        scores = [(_right(build, changed(config, c), small), (c,)) for c in singles]
        useless.update(change[0] for score, change in scores if 0 <= score <= right)
        # Sizes that depend on each other (heads and key-value heads) are invalid alone: two of one ratio together.
        invalid = [change[0] for score, change in scores if score < 0]
        pairs = [(a, b) for i, a in enumerate(invalid) for b in invalid[i + 1 :] if a.ratio == b.ratio]
        scores += [(_right(build, changed(config, *pair), small), pair) for pair in pairs]  # type: ignore[misc]
        best = max(scores, key=lambda entry: entry[0], default=(right, ()))
        if best[0] <= right and is_undone:
            useless, is_undone = (
                set(),
                False,
            )  # earlier changes may help now, with the other axis of their tensors corrected
            continue
        if best[0] <= right:
            return None
        is_undone = True
        right, config = best[0], changed(config, *best[1])
        taken += [change.path for change in best[1]]
    return config, tuple(taken)


def changed(config: Mapping[str, Any], *changes: Change) -> dict[str, Any]:
    """The configuration with these entries changed."""
    new = copy.deepcopy(dict(config))
    for change in changes:
        place = new
        for key in change.path[:-1]:
            place = place[key]
        place[change.path[-1]] = change.value
    return new


def _right(build: Build, config: Mapping[str, Any], small: Shapes) -> int:
    """The number of tensors of this configuration with the wanted shape; -1 if the model cannot be built."""
    try:
        built = build(config)
    except PruningError:
        return -1
    if built.keys() != small.keys():
        return -1
    return sum(built[name] == shape for name, shape in small.items())


def _candidates(config: Mapping[str, Any], sizes: Sizes, path: ConfigPath = ()) -> Iterator[Change]:
    """Every integer that equals or divides an old size, and every unset entry, with each new value it could take."""
    every = sorted({new for options in sizes.values() for new in options})
    for key, value in config.items():
        here = (*path, key)
        if isinstance(value, dict):
            yield from _candidates(value, sizes, here)
        elif isinstance(value, int) and not isinstance(value, bool) and not key.endswith("_id"):
            yield from (Change(here, new, Fraction(new, value)) for new in _scaled(value, sizes))
        elif value is None and key.rpartition("_")[2] in ("dim", "inner", "size", "heads", "width"):
            yield from (Change(here, new) for new in every)


def _scaled(value: int, sizes: Sizes) -> list[int]:
    """The new values of an entry that is a changed size, or a count of its equal parts (heads of size 64)."""
    pairs = [(old, new) for old, options in sizes.items() for new in options]
    values = {value * new // old for old, new in pairs if value and old % value == 0 and value * new % old == 0}
    return sorted(values - {value, 0})
