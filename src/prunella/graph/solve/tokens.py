"""Tokens: indices of the rows of an embedding, and their renumbering after a removal of rows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prunella.graph.cut.changes import Renumbered
from prunella.graph.trace.tracked_int import holders
from prunella.model.trees import each

Ids = int | tuple[int, ...]


def names_token(attribute: str) -> bool:
    """Whether an attribute of this name holds a token."""
    return attribute == "padding_idx" or (attribute.endswith("token_id") and not attribute.startswith("_"))


def specials(model: nn.Module) -> dict[tuple[str, str], Ids]:
    """(owner, name) -> the token or tokens that an attribute of the model names: `padding_idx`, `eos_token_id`, ...

    A run does not show the meaning of a number. The names are those of torch and transformers.
    """
    tokens: dict[tuple[str, str], Ids] = {}
    for owner, values in holders(model):
        for name, value in values.items():
            if names_token(name):
                many = isinstance(value, list | tuple) and all(type(item) is int for item in value)
                if many or type(value) is int:
                    tokens[owner, name] = tuple(value) if many else value
    return tokens


def known_only(tree: Any, renumbered: Sequence[Renumbered]) -> Any:
    """The inputs, with a kept token in place of each removed token."""

    def known(ids: Tensor, kept: Tensor) -> Tensor:
        return torch.where(torch.isin(ids, kept), ids, kept[ids % len(kept)])

    return _at(tree, renumbered, known)


def renumber(tree: Any, renumbered: Sequence[Renumbered]) -> Any:
    """The inputs with the token ids of the smaller model."""
    return _at(tree, renumbered, lambda ids, kept: torch.searchsorted(kept, ids))


def _at(tree: Any, renumbered: Sequence[Renumbered], change: Callable[[Tensor, Tensor], Tensor]) -> Any:
    """The inputs with `change` applied to the renumbered tensors."""
    for entry in renumbered:
        count = itertools.count()
        tree = each(tree, lambda t: change(t, entry.kept.to(t.device)) if next(count) in entry.inputs else t)  # noqa: B023
    return tree
