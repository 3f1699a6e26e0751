"""Statistics of the inputs of a weight.

Products are observed below autograd. There every product, from any module or function, is one of the few operations of
the table in `prunella.model.reads`. A weight is identified by its memory, so that transposed views, slices and the
copies of autocast count as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from prunella.model.observed_reads import Homes, Unread, View
from prunella.model.product import NotReadable, Product, operation
from prunella.model.reads import products, unreadable
from prunella.model.trees import tensors
from prunella.stats.subject import Subject

Totals = Mapping[tuple[str, View], Tensor]
"""(entity, view of the entity) -> a total over the tokens that broadcasts to the view."""


class InputNorm:
    """`input_norm`: L2 norm over all tokens of the input that each weight multiplies, by entity, in the weight's shape.

    Convolutions: over all patches, padding included. Transposed convolutions: over all positions of the input.
    Sums are in float64, so that many batches and one large batch agree. A weight that never ran is absent.
    """

    def __init__(self, subject: Subject) -> None:
        layers = [subject.layer_of[name] for name in subject.scored if name in subject.layer_of]
        self._weights = {layer.entity: subject.parameters[layer.entity] for layer in layers}
        self._sums: dict[tuple[str, View], Tensor] = {}
        self.unread: dict[str, Unread] = {}

    def watch(self) -> AbstractContextManager[object]:
        """Watch one forward pass."""
        return ActivationWatch(self._weights, self._add, self.unread)

    def add(self, grads: object) -> None:
        """Unused: this statistic needs no gradients."""

    def result(self) -> dict[str, Tensor]:
        """By entity."""
        return {name: self._norms(name) for name in self._weights if any(key[0] == name for key in self._sums)}

    def _add(self, name: str, view: View, product: Product) -> None:
        squares = total(product, _squares(product.x))
        previous = self._sums.get((name, view))
        self._sums[name, view] = squares if previous is None else previous + squares

    def _norms(self, name: str) -> Tensor:
        return lay_out(self._weights[name], name, self._sums).sqrt().to(torch.float32)


def lay_out(weight: Tensor, name: str, totals: Totals) -> Tensor:
    """Sum of the totals of all views of a weight, each at the place of the view: float64, shaped as the weight."""
    flat = torch.zeros(weight.numel(), dtype=torch.float64, device=weight.device)
    places = torch.arange(weight.numel(), device=weight.device)
    for (owner, (size, stride, offset)), total in totals.items():
        if owner == name:
            at = places.as_strided(size, stride, offset).reshape(-1)
            flat.index_add_(0, at, total.expand(size).reshape(-1))
    return flat.as_strided(weight.shape, weight.stride(), 0)


class ActivationWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Report every product with one of `weights`; `unread` collects the calls that cannot be read, by entity."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the check against the compiler would import dynamo, which takes seconds

    def __init__(
        self, weights: dict[str, Tensor], report: Callable[[str, View, Product], None], unread: dict[str, Unread]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._report, self._unread, self._homes = report, unread, Homes()
        self._copies: list[Tensor] = []
        for name, weight in weights.items():
            self._homes.settle(name, weight)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = operation(func)
        with suppress(NotReadable):
            for product in products(name, args, kwargs):
                home = self._homes.of(product.operand)
                if home is not None:
                    self._report(*home, product)
        if unreadable(name):
            homes = filter(None, map(self._homes.of, tensors([args, kwargs or {}])))
            self._unread.update({entity: Unread(name, unreadable(name)) for entity, _ in homes})
        if func.overloadpacket is torch.ops.aten._to_copy:
            self._follow(args[0], out)
        return out

    def _follow(self, source: Tensor, copy: Tensor) -> None:
        """Register a copy of a full weight in another precision. Keeping the copy prevents reuse of its memory."""
        home = self._homes.of(source)
        if home is not None and source.stride() == copy.stride() and not home[1].offset:
            self._homes.settle(home[0], copy)
            self._copies.append(copy)


def total(product: Product, values: Tensor, *, once: bool = False) -> Tensor:
    """Totals over tokens of values in the shape of the input, in a shape that broadcasts to the operand."""
    return product.form.total(values, product.operand.shape, once=once)


def _squares(values: Tensor) -> Tensor:
    return values.detach().to(torch.promote_types(values.dtype, torch.float32)).square()
