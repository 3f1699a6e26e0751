"""Statistics of what a weight multiplies.

The multiplications are watched below autograd, where every one of them, whatever module or function it came from, is
one of a few operations of the table in `prunella.model.reads`. A weight is known by its memory, so that transposed and
sliced views of it, and the copies that autocast makes, count as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from prunella.model.forward import tensors
from prunella.model.reads import NotReadable, Product, operation, products, unreadable
from prunella.model.watch import Homes, Unread, View
from prunella.stats.subject import Subject

Totals = Mapping[tuple[str, View], Tensor]
"""Entity and view of it -> a total over the tokens that broadcasts to the view."""


class InputNorm:
    """`input_norm`: L2 norm over all tokens of the input that each weight multiplies, by entity, in the weight's shape.

    Convolutions: over all patches, padding included. Transposed convolutions: over all positions of the input.
    Sums are kept in float64, so that many batches and one large batch agree. A weight that never ran is absent.
    """

    def __init__(self, subject: Subject) -> None:
        layers = [subject.layer_of[name] for name in subject.scored if name in subject.layer_of]
        self._weights = {layer.entity: subject.parameters[layer.entity] for layer in layers}
        self._sums: dict[tuple[str, View], Tensor] = {}
        self.unread: dict[str, Unread] = {}

    def watch(self) -> AbstractContextManager[object]:
        """Watch one forward pass."""
        return Watch(self._weights, self._add, self.unread)

    def add(self, grads: object) -> None:
        """Gradients say nothing of inputs."""

    def result(self) -> dict[str, Tensor]:
        """By entity."""
        return {name: self._norms(name) for name in self._weights if any(key[0] == name for key in self._sums)}

    def _add(self, name: str, view: View, product: Product) -> None:
        squares = total(product, _squares(product.x))
        known = self._sums.get((name, view))
        self._sums[name, view] = squares if known is None else known + squares

    def _norms(self, name: str) -> Tensor:
        return lay_out(self._weights[name], name, self._sums).sqrt().to(torch.float32)


def lay_out(weight: Tensor, name: str, totals: Totals) -> Tensor:
    """Write the totals of every view of a weight where the view lies in it, and add up: float64, as the weight."""
    flat = torch.zeros(weight.numel(), dtype=torch.float64, device=weight.device)
    places = torch.arange(weight.numel(), device=weight.device)
    for (owner, (size, stride, offset)), total in totals.items():
        if owner == name:
            at = places.as_strided(size, stride, offset).reshape(-1)
            flat.index_add_(0, at, total.expand(size).reshape(-1))
    return flat.as_strided(weight.shape, weight.stride(), 0)


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Report every multiplication by one of `weights`; `unread` takes the calls that cannot be read, by entity."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the guard against the compiler would import it, which takes seconds

    def __init__(
        self, weights: dict[str, Tensor], report: Callable[[str, View, Product], None], unread: dict[str, Unread]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._report, self._unread, self._homes = report, unread, Homes()
        self._held: list[Tensor] = []
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
        """A whole weight in another precision is still that weight. Held, so that its memory is not used again."""
        home = self._homes.of(source)
        if home is not None and source.stride() == copy.stride() and not home[1].offset:
            self._homes.settle(home[0], copy)
            self._held.append(copy)


def total(product: Product, values: Tensor, *, once: bool = False) -> Tensor:
    """Totals over tokens of values in the shape of the input, in a shape that broadcasts to what is read."""
    return product.form.total(values, product.operand.shape, once=once)


def _squares(values: Tensor) -> Tensor:
    return values.detach().to(torch.promote_types(values.dtype, torch.float32)).square()
