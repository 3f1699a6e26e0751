"""Checkpoints whose tensors have other names or another layout than the model, such as one tensor per expert.

The conversions are those of transformers; here they are applied to single tensors, when one is read.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from prunella.errors import BadInput
from prunella.io.tensor_file import StoredTensor


@dataclass(frozen=True)
class Converted:
    """A tensor of the model that is converted from tensors of the checkpoint when it is read."""

    name: str
    group: ConversionGroup
    dtype: torch.dtype
    shape: tuple[int, ...]
    size: int

    def read(self) -> Tensor:
        """The tensor, in memory of its own."""
        converted = self.group.convert({key: stored.read() for key, stored in self.group.sources.items()})
        return converted[self.name].contiguous()


@dataclass(frozen=True)
class ConversionGroup:
    """Tensors of the checkpoint that are converted together, named after the first tensor that results.

    patterns: the source pattern of the conversion that each name matches.
    """

    name: str
    conversion: Any
    sources: Mapping[str, StoredTensor]
    patterns: Mapping[str, str]

    def convert(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of the model. Errors: BadInput if a tensor is missing or its shape differs from the others."""
        conversion = copy.deepcopy(self.conversion)
        for key, value in values.items():
            conversion.add_tensor(self.name, key, self.patterns[key], value)
        try:
            converted = conversion.convert(self.name)
        except (RuntimeError, ValueError, KeyError) as error:
            what = f"the tensors that make up {self.name} do not fit together"
            why = f"{next(iter(values))} and {len(values) - 1} others: {error}".splitlines()[0]
            raise BadInput(what, why, "fetch the folder again") from error
        return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}


class Files:
    """The tensors of a checkpoint: `stored` by their names in the model, `raw` by their names in the files.

    names: for each name in the files the names in the model. back: whether the conversion can be reverted, so that
    tensors are written with the names and the layout of the files.
    """

    def __init__(self, model: nn.Module, raw: Mapping[str, StoredTensor]) -> None:
        self._model, self.raw = model, raw
        self._table = _table(model)
        self.stored, self.names = self.read(raw)
        self.back = self._table is not None and self._reverts()

    def read(
        self, raw: Mapping[str, StoredTensor]
    ) -> tuple[dict[str, StoredTensor | Converted], dict[str, tuple[str, ...]]]:
        """The tensors by their names in the model, and for each name in the files the names in the model."""
        if self._table is None:
            return dict(raw), {key: (key,) for key in raw}
        renamings, converters, loading = self._table
        tensors: dict[str, StoredTensor | Converted] = {}
        names: dict[str, tuple[str, ...]] = {}
        groups: dict[str, tuple[Any, dict[str, str]]] = {}
        expected = dict.fromkeys(self._model.state_dict())
        for key in sorted(raw, key=loading.dot_natural_key):
            prefix = self._model.base_model_prefix
            name, pattern = loading.rename_source_key(key, renamings, converters, prefix, {k: k for k in expected})
            if key in expected or pattern is None:
                name = key if key in expected else name
                tensors[name], names[key] = raw[key], (name,)
            else:
                conversion = next(c for c in converters if pattern in c.source_patterns)
                groups.setdefault(name, (conversion, {}))[1][key] = pattern
        for name, (conversion, patterns) in groups.items():
            group = ConversionGroup(name, conversion, {key: raw[key] for key in patterns}, patterns)
            virtual = {k: torch.empty(s.shape, dtype=s.dtype, device="meta") for k, s in group.sources.items()}
            converted = group.convert(virtual)
            for other, like in converted.items():
                size = like.numel() * like.element_size()
                tensors[other] = Converted(other, group, like.dtype, tuple(like.shape), size)
            names |= dict.fromkeys(patterns, tuple(converted))
        return tensors, names

    def written(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of the model with the names and the layout of the files."""
        if not self.back or self._table is None:
            return dict(values)
        reverted: dict[str, Tensor] = self._table[2].revert_weight_conversion(self._model, dict(values))
        return reverted

    def _reverts(self) -> bool:
        virtual = {k: torch.empty(s.shape, dtype=s.dtype, device="meta") for k, s in self.stored.items()}
        self.back = True
        return set(self.written(virtual)) == set(self.raw)


def _table(model: nn.Module) -> tuple[list[Any], list[Any], Any] | None:
    """The renamings and conversions of transformers for this model, and the module that applies them, or None."""
    try:
        loading = import_module("transformers.core_model_loading")
        mapping = import_module("transformers.conversion_mapping").get_model_conversion_mapping(model)
    except (ImportError, AttributeError):  # an older version, or no model of transformers
        return None
    renamings = [one for one in mapping if isinstance(one, loading.WeightRenaming)]
    converters = [one for one in mapping if isinstance(one, loading.WeightConverter)]
    return renamings, converters, loading
