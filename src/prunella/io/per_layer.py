"""The entries of a configuration that differ from layer to layer: `per_layer_config`, as transformers writes it.

The search for uniform configurations is applied to one layer. It shows the relevant entries, and the axis and tensor
that follow each entry; the entries of the other layers are read from their shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any, NamedTuple

from torch import nn

from prunella.errors import PruningError
from prunella.io.huggingface import built_shapes, search_part
from prunella.planning.config_search import Change, ConfigPath, Shapes, Sizes, changed

PerLayer = dict[str, dict[str, int]]


class PerLayerReader(NamedTuple):
    """An entry of the configuration is `ratio` times the size of `axis` of the tensor `name` of a layer."""

    path: ConfigPath
    name: str
    axis: int
    ratio: Fraction


def per_layer_config(
    origin: Mapping[str, Any], model: nn.Module, small: Shapes, sizes: Sizes, kept: frozenset[ConfigPath]
) -> PerLayer:
    """Number of each layer -> entries of the configuration that differ there. Empty if the search fails.

    kept: entries that are changed only if no other change explains the shapes.
    """
    stack = _stack(model)
    if stack is None:
        return {}
    layers = [{n: s for n, s in small.items() if n.startswith(f"{stack}.{k}.")} for k in range(_count(model, stack))]
    dense = built_shapes(origin, origin["config"], f"{stack}.")
    probe = max(range(len(layers)), key=lambda k: sum(dense.get(n) != s for n, s in layers[k].items()))
    searched = search_part(origin, small, sizes, kept, f"{stack}.{probe}.")
    if searched is None or not searched[1]:
        return {}
    readers = list(_readers(origin, searched, dense, f"{stack}.{probe}."))
    return {
        str(k): values
        for k in range(len(layers))
        if (values := dict(_read(origin["config"], readers, layers[k], f"{stack}.{k}.")))
    }


def _stack(model: nn.Module) -> str | None:
    """The list of modules with the most parameters."""
    lists = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 1
    }
    return max(lists, key=lambda name: lists[name], default=None)


def _count(model: nn.Module, stack: str) -> int:
    return len(list(model.get_submodule(stack).children()))


def _readers(
    origin: Mapping[str, Any], searched: tuple[dict[str, Any], tuple[ConfigPath, ...]], dense: Shapes, layer: str
) -> Iterator[PerLayerReader]:
    """The axis that follows each changed entry: the first whose size differs when this change is left out."""
    config, paths = searched
    full = built_shapes(origin, config, layer)
    for path in paths:
        old, new = _at(origin["config"], path), _at(config, path)
        for name, axis in _moved(full, _without(origin, config, path, old, layer) or dense):
            if old and Fraction(full[name][axis], dense[name][axis]) == Fraction(new, old):
                yield PerLayerReader(path, name.removeprefix(layer), axis, Fraction(old, dense[name][axis]))
                break


def _without(
    origin: Mapping[str, Any], config: Mapping[str, Any], path: ConfigPath, old: Any, layer: str
) -> dict[str, tuple[int, ...]] | None:
    """The shapes when all changes but this one are made; None if that cannot be built."""
    try:
        return built_shapes(origin, changed(config, Change(path, old)), layer)
    except PruningError:
        return None


def _moved(one: Shapes, other: Shapes) -> Iterator[tuple[str, int]]:
    return ((n, a) for n, shape in one.items() for a, size in enumerate(shape) if size != other[n][a])


def _read(
    config: Mapping[str, Any], readers: list[PerLayerReader], layer: Shapes, prefix: str
) -> Iterator[tuple[str, int]]:
    for path, name, axis, ratio in readers:
        shape = layer.get(prefix + name)
        value = shape[axis] * ratio if shape else Fraction(1, 2)
        if value.denominator == 1 and value != _at(config, path):
            yield ".".join(path), int(value)


def _at(config: Mapping[str, Any], path: ConfigPath) -> Any:
    value: Any = config
    for key in path:
        value = value[key]
    return value
