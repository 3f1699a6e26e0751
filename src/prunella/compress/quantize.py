"""Integer weights with an exact zero: pruned weights remain zero in the quantized model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from prunella.errors import CheckFailed, RequestError
from prunella.model.unwrap import unwrap
from prunella.registry.method import compression
from prunella.types import Loss


@dataclass(frozen=True)
class Quantized:
    """Whole numbers and one scale for each row: `weight ~ codes * scale`. bits: of a code, sign included."""

    codes: Tensor
    scale: Tensor
    bits: int

    def weight(self) -> Tensor:
        """The decoded weight, in the type of the scale."""
        return self.codes.to(self.scale.dtype) * self.scale

    @property
    def stored_bits(self) -> int:
        """Bits of the codes and the scales."""
        return self.codes.numel() * self.bits + self.scale.numel() * self.scale.element_size() * 8


@compression(
    source="Han et al. 2016, arXiv:1510.00149 (after pruning); Krishnamoorthi 2018, arXiv:1806.08342 (per channel)"
)
def quantize_weight(weight: Tensor, *, bits: int = 8) -> Quantized:
    """Round a weight to whole numbers, symmetrically, with one scale for each position on its first axis.

    `q = round(w / s)` with `s = max |w| / (2^(bits - 1) - 1)` over the row: 0 becomes exactly 0, the largest weight of
    a row is represented exactly, the error is at most `s / 2`. A row of zeros gets the scale 1. N:M patterns, blocks
    and masks are preserved, since zeros are; small weights may be rounded to further zeros.

    weight: at least one axis. bits: 2 to 8.

    Data: none.
    Errors: RequestError for bits out of range, or a weight that is not finite.

    Use: for weights of linear layers and convolutions, after pruning. Avoid: below 4 bits without training
    (`quantization_aware`).
    """
    if not 2 <= bits <= 8:
        raise RequestError(f"bits={bits} is out of range", "codes are kept in 8 bits", "bits from 2 to 8")
    if not bool(torch.isfinite(weight).all()):
        raise RequestError("the weight is not finite", "NaN or infinity has no code", "look at the training run")
    top = 2 ** (bits - 1) - 1
    value = weight.detach()
    largest = value.abs().amax(dim=tuple(range(1, value.dim())), keepdim=True) if value.dim() > 1 else value.abs()
    scale = torch.where(largest / top > 0, largest / top, torch.ones_like(largest))
    codes = (value / scale).round().clamp(-top, top).to(torch.int8)
    return Quantized(codes, scale, bits)


@dataclass(frozen=True)
class Rounded:
    """The effect on one weight. error: relative, `|w - w'| / |w|`. zeros: before. new_zeros: added by rounding."""

    name: str
    weights: int
    zeros: int
    new_zeros: int
    error: float
    bits: int

    def __str__(self) -> str:
        more = f" and {self.new_zeros} more that were small" if self.new_zeros else ""
        return f"{self.name}: {self.zeros} of {self.weights} are zero{more}, error {self.error:.2%}"


@compression(source="Han et al. 2016, arXiv:1510.00149; Krishnamoorthi 2018, arXiv:1806.08342")
def round_weights_(model: nn.Module, *, bits: int = 8, only: Sequence[str] = ("*",)) -> tuple[Rounded, ...]:
    """Replace the weights by their quantized values, in place, and return the rounding errors.

    Simulated quantization: every parameter with at least two axes is rounded as by `quantize_weight`. Types, shapes and
    names do not change, so that accuracy can be measured, masks remain in force and the model is saved as usual; it is
    not smaller in memory. `to_int8_` stores integers.

    bits: 2 to 8. only: patterns of parameter names.

    Data: none.

    Example:

        >>> import torch, prunella as pr
        >>> layer = torch.nn.Linear(4, 2)
        >>> pr.compress.round_weights_(layer, bits=2)[0].name
        'weight'
        >>> [len(row.unique()) <= 3 for row in layer.weight]
        [True, True]

    Use: measuring the effect of quantization on a pruned model, and as the last step after `quantization_aware`. Avoid:
    a smaller or faster model: take `to_int8_`.
    """
    rounded = []
    with torch.no_grad():
        for name, parameter in _weights(model, only):
            value = quantize_weight(parameter, bits=bits).weight()
            rounded.append(compare(name, parameter, value, bits))
            parameter.copy_(value)
    return tuple(rounded)


@compression(source="Jacob et al. 2018, arXiv:1712.05877; Bengio et al. 2013, arXiv:1308.3432 (straight-through)")
def quantization_aware(loss: Loss, *, bits: int = 8, only: Sequence[str] = ("*",)) -> Loss:
    """A loss of the model with rounded weights, while the optimizer updates the weights before rounding.

    `L(Q(w))` with `Q` of `quantize_weight`; the gradient passes the rounding unchanged (straight-through). Parameters,
    names and masks are those of the model, so that `finetune` and `Pruner` work as usual, masked weights remain 0, and
    `Q(0) = 0`. `round_weights_` at the end gives the trained function.

    loss: of (model, batch). bits: 2 to 8. only: patterns of parameter names; weights with at least two axes are
    rounded.

    Data: what the loss needs.
    Errors: RequestError for bits out of range.

    Use: when rounding alone loses too much, at 4 bits and below. Avoid: at 8 bits, where it is rarely worth the
    training.
    """
    if not 2 <= bits <= 8:
        raise RequestError(f"bits={bits} is out of range", "codes are kept in 8 bits", "bits from 2 to 8")

    def rounded(model: nn.Module, batch: Any) -> Tensor:
        values = {p: _straight_through(p, bits) for _, p in _weights(model, only)}
        with _replaced(model, values):
            return loss(model, batch)

    return rounded


def compare(name: str, before: Tensor, after: Tensor, bits: int) -> Rounded:
    """The row of one weight. `CheckFailed` if a zero of it is no longer zero."""
    zero = before == 0
    revived = int(torch.count_nonzero(after[zero]))
    if revived:
        raise CheckFailed(
            f"{revived} zeros of {name} are not zero after quantization",
            "the format has an offset, so that zero has no code",
            "use a symmetric format",
        )
    size = float(before.detach().double().norm())
    error = float((before.detach().double() - after.detach().double()).norm()) / size if size else 0.0
    zeros = int(zero.sum())
    return Rounded(name, before.numel(), zeros, int((after == 0).sum()) - zeros, error, bits)


def _weights(model: nn.Module, only: Sequence[str]) -> list[tuple[str, nn.Parameter]]:
    """Parameters with two axes or more under these patterns, tied ones once."""
    if isinstance(only, str):
        raise RequestError("only= is one text", "a list of patterns is needed", f"only=[{only!r}]")
    every = [(n, p) for n, p in unwrap(model).named_parameters() if p.dim() > 1 and p.is_floating_point()]
    matching = [(n, p) for n, p in every if any(fnmatchcase(n, pattern) for pattern in only)]
    if not matching:
        names = ", ".join(n for n, _ in every[:3]) or "there are none"
        raise RequestError(
            f"only={list(only)!r} names no weight", f"weights are like {names}", "`*` stands for anything"
        )
    return matching


def _straight_through(parameter: nn.Parameter, bits: int) -> Tensor:
    rounded = quantize_weight(parameter, bits=bits).weight()
    return parameter + (rounded - parameter).detach()


@contextmanager
def _replaced(model: nn.Module, values: dict[nn.Parameter, Tensor]) -> Iterator[None]:
    """Inside, modules read these tensors in place of their parameters."""
    owners = [
        (m, leaf, p) for m in model.modules() for leaf, p in m._parameters.items() if p is not None and p in values
    ]
    lists = [(m, list(flat)) for m in model.modules() if isinstance(flat := getattr(m, "_flat_weights", None), list)]
    for module, leaf, parameter in owners:
        module._parameters[leaf] = values[parameter]  # type: ignore[assignment]
    for module, flat in lists:  # recurrent layers read their weights from a list
        module._flat_weights = [values.get(parameter, parameter) for parameter in flat]  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, flat in lists:
            module._flat_weights = flat  # type: ignore[assignment]
        for module, leaf, parameter in owners:
            module._parameters[leaf] = parameter
