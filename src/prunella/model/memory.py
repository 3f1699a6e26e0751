"""Bytes that tensors and models take."""

from __future__ import annotations

from torch import Tensor, nn


def inner_tensors(tensor: Tensor) -> list[Tensor]:
    """What a tensor is made of in memory: itself, or the inner tensors of a quantized one."""
    names = getattr(tensor, "__tensor_flatten__", None)
    if type(tensor.data) is Tensor or names is None:
        return [tensor]
    return [part for name in names()[0] for part in inner_tensors(getattr(tensor, name))]


def stored_size(model: nn.Module) -> int:
    """Of parameters and buffers, tied ones once; of quantized ones what they are made of."""
    return sum(part.nbytes for tensor in (*model.parameters(), *model.buffers()) for part in inner_tensors(tensor))
