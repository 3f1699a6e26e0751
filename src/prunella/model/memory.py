"""Bytes of tensors and models in memory."""

from __future__ import annotations

from torch import Tensor, nn


def inner_tensors(tensor: Tensor) -> list[Tensor]:
    """The tensors in memory behind a tensor: itself, or the inner tensors of a quantized tensor."""
    names = getattr(tensor, "__tensor_flatten__", None)
    if type(tensor.data) is Tensor or names is None:
        return [tensor]
    return [part for name in names()[0] for part in inner_tensors(getattr(tensor, name))]


def stored_size(model: nn.Module) -> int:
    """Bytes of parameters and buffers. Tied tensors count once, quantized tensors by their inner tensors."""
    return sum(part.nbytes for tensor in (*model.parameters(), *model.buffers()) for part in inner_tensors(tensor))
