"""Parameters, bytes, zeros and multiply-adds, counted on the model itself: an oracle for the numbers of a plan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from prunella.errors import RequestError
from prunella.measure.text import byte_size, exact_count, percent
from prunella.model.forward import forward
from prunella.model.memory import inner_tensors
from prunella.model.state import mode
from prunella.model.torch_masks import with_plain_weights
from prunella.types import Inputs

Scope = Literal["weights", "parameters"]
_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@dataclass(frozen=True)
class Count:
    """Tied parameters count once. bytes: of parameters and buffers of the state dict, as a file stores them.

    nonzero, total: elements that are not zero, and all elements, of the `scope`: `weights` are the parameters with at
    least two axes (what pruning means by sparsity), `parameters` are all of them.
    """

    params: int
    bytes: int
    nonzero: int
    total: int
    scope: Scope

    @property
    def sparsity(self) -> float:
        """Fraction of the scope that is zero."""
        return 1 - self.nonzero / self.total if self.total else 0.0

    def __str__(self) -> str:
        zero = f"{percent(self.sparsity)} of the {self.scope} are zero"
        return f"{exact_count(self.params)} parameters, {byte_size(self.bytes)}, {zero}"


def count(model: nn.Module, *, scope: Scope = "weights") -> Count:
    """Parameters, bytes and zeros of a model, from its tensors alone."""
    model = with_plain_weights(model)
    if scope not in ("weights", "parameters"):
        raise RequestError(f"unknown scope {scope!r}", "known are weights, parameters", "weights have two axes or more")
    parameters = list(model.parameters())  # torch gives tied ones once
    looked_at = [p for p in parameters if scope == "parameters" or p.dim() >= 2]
    return Count(
        params=sum(p.numel() for p in parameters),
        bytes=sum(part.nbytes for t in _once(model.state_dict(keep_vars=True).values()) for part in inner_tensors(t)),
        nonzero=sum(int(torch.count_nonzero(_values(p))) for p in looked_at),
        total=sum(p.numel() for p in looked_at),
        scope=scope,
    )


def _values(parameter: Tensor) -> Tensor:
    """A quantised weight as the numbers it stands for."""
    return parameter if type(parameter.data) is Tensor else parameter.detach().dequantize()


def compression(before: float, after: float) -> float:
    """`before / after`: 4 means a quarter remains."""
    if after <= 0:
        raise RequestError(
            "nothing remains", f"{after:g} after, {before:g} before", "a ratio needs something that is left"
        )
    return before / after


def measured_macs(model: nn.Module, inputs: Inputs) -> int:
    """Multiply-adds of one forward pass, by torch's own counter of floating-point operations, halved.

    Matrix products, convolutions and attention are counted, elementwise work is not: what a layer costs by its
    formula, `out * (in / groups) * kernel * positions`. Independent of `Graph.macs`, which it is compared with.
    """
    return sum(macs_by_module(model, inputs).values())


def macs_by_module(model: nn.Module, inputs: Inputs) -> dict[str, int]:
    """Multiply-adds of one forward pass by the innermost module that does them; "" is the model itself."""
    counter = FlopCounterMode(display=False, custom_mapping={_CPU_ATTENTION: _attention_flops})
    with mode(model, training=False), torch.no_grad(), counter:
        forward(model, inputs)
    return _innermost(counter.get_flop_counts(), type(model).__name__)


def _innermost(counts: Mapping[str, Mapping[Any, int]], root: str) -> dict[str, int]:
    """The counter adds a module's operations to all that contain it; take from each what its children have."""
    total = {name: sum(ops.values()) for name, ops in counts.items()}
    own: dict[str, int] = {}
    for name, flops in total.items():
        if name == "Global":
            inside = sum(v for k, v in total.items() if k != "Global" and "." not in k)
            rest, label = flops - inside, ""
        else:
            inside = sum(v for k, v in total.items() if k.startswith(name + ".") and "." not in k[len(name) + 1 :])
            rest, label = flops - inside, name.removeprefix(root).removeprefix(".")
        if rest:
            own[label] = own.get(label, 0) + rest // 2
    return own


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    """Two products of a batch of matrices; torch knows the kernels of the GPU, not the one of the CPU."""
    batch, heads, rows, width = query
    return int(2 * batch * heads * rows * key[-2] * (width + value[-1]))


def _once(values: Iterable[object]) -> Iterator[Tensor]:
    seen: set[int] = set()
    for value in values:
        if isinstance(value, Tensor) and id(value) not in seen:
            seen.add(id(value))
            yield value
