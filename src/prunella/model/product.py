"""One product in a call: an operand that may be a weight, its input, and its form; `model/reads.py` has the table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from prunella.model.calls import called
from prunella.model.forms import Form


class NotReadable(Exception):
    """Raised for arguments under which no matrix describes the weight; the message is the reason."""


def operation(func: Any) -> str:
    """The name of a call in the table: `matmul` for `Tensor.__matmul__`, `addmm` for `aten.addmm.default`."""
    name = called(func)
    return _SPELLINGS.get(name, name)


_SPELLINGS = {"__matmul__": "matmul", "__rmatmul__": "rmatmul", "grouped_mm_fallback": "grouped_mm"}
_SPELLINGS |= {"_grouped_mm": "grouped_mm", "_convolution": "convolution", "linalg_matmul": "matmul"}


@dataclass(frozen=True)
class Product:
    """One product in a call: an operand that may be a weight, its input, and its form.

    given: returns the input, computed on first use. bias: added to the outputs, one number for each output of all
    matrices. output: selects the output of the product from the result of the call.
    """

    operand: Tensor
    given: Callable[[], Tensor]
    form: Form
    bias: Tensor | None = None
    output: Callable[[Any], Tensor] = lambda result: result

    @cached_property
    def x(self) -> Tensor:
        """The input."""
        return self.given()


def product_of(x: Tensor, weight: Tensor, form: Form, bias: Any = None) -> Product:
    bias = bias if isinstance(bias, Tensor) and bias.numel() == _outputs(form, weight) else None
    return Product(weight, lambda: x, form, bias)


def _outputs(form: Form, weight: Tensor) -> int:
    groups, out, _ = form.sizes(weight.shape)
    return groups * out
