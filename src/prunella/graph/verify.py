"""The oracle of every cut: in float64, the smaller module has the outputs of the masked model.

In the masked model removed positions are zero, and a dropped block returns its first input tensor as its first output.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from prunella.errors import CheckFailed, NotSupported
from prunella.graph.cut.block_surgery import bypassed
from prunella.graph.cut.changes import Along, Changes, changes
from prunella.graph.cut.surgery import change_
from prunella.graph.data import Graph
from prunella.graph.solve.tokens import each, known_only, renumber
from prunella.graph.trace.source import called
from prunella.model.copying import copied
from prunella.model.forward import forward, tensors
from prunella.model.state import untouched
from prunella.types import Keep

TOLERANCE = 1e-9
"""Largest allowed difference, relative to the largest output, in float64."""
SINGLE = 1e-4
"""`TOLERANCE` for models that run only in their own precision."""


@dataclass(frozen=True)
class Verification:
    """Error of the smaller module against the masked model: largest difference / largest output, over all outputs."""

    error: float
    tolerance: float
    outputs: int
    dtype: str = "float64"

    @property
    def exact(self) -> bool:
        """Whether the error is within the tolerance."""
        return self.error <= self.tolerance

    def __str__(self) -> str:
        word = "equals" if self.exact else "differs from"
        return f"shrunk {word} masked: relative error {self.error:.1e} ({self.dtype}, tolerance {self.tolerance:.0e})"


def check(dense: nn.Module, small: nn.Module, applied: Changes, inputs: Any, *, example: int = 0) -> Verification:
    """`verify`, with `CheckFailed` if the outputs differ. On the meta device only shapes are checked."""
    verification = verify(dense, small, applied, inputs, example=example)
    if not verification.exact:
        raise CheckFailed(
            "the smaller model does not compute what the masked model computes",
            f"relative error {verification.error:.2e} where {verification.tolerance:.0e} is allowed",
            "please report the model; skip= excludes the layers that you name",
        )
    return verification


def verify(dense: nn.Module, small: nn.Module, done: Changes, inputs: Any, *, example: int = 0) -> Verification:
    """Compare `small` with `dense` with zeros in the removed units, in float64 and eval mode, on one batch.

    example: the number of the example that this batch is, or is like.
    """
    done = done.on(example)
    if any(p.device.type == "meta" for p in dense.parameters()):
        shapes = [tuple(t.shape) for t in _run(dense, inputs)], [tuple(t.shape) for t in _run(small, inputs)]
        return Verification(0.0 if shapes[0] == shapes[1] else float("inf"), TOLERANCE, len(shapes[0]))
    try:
        return _compare(dense, small, done, inputs, double=True)
    except _DenseFailed:
        return _compare(dense, small, done, inputs, double=False)


def unproven(model: nn.Module, graph: Graph, keep: Keep, inputs: Any, others: Sequence[Any] = ()) -> dict[str, str]:
    """Group name -> why its cut cannot be proven. Empty when the model cut by `keep` passes the oracle.

    others: further examples, which it has to pass too. Bisection finds the groups at fault: a set that fails is tried
    in two halves, down to single groups. If only the full set fails, all of its groups are named.
    """
    names = [name for name, mask in keep.items() if not bool(mask.all())]
    reason = _fault(model, graph, {name: keep[name] for name in names}, (inputs, *others))
    if reason is None:
        return {}
    half = len(names) // 2
    faults: dict[str, str] = {}
    for part in (names[:half], names[half:]) if half else ():
        faults |= unproven(model, graph, {name: keep[name] for name in part}, inputs, others)
    return faults or dict.fromkeys(names, reason)


def _fault(model: nn.Module, graph: Graph, keep: Keep, examples: Sequence[Any]) -> str | None:
    """The objection of the oracle to a cut; None if the cut passes on all examples."""
    applied, small = changes(graph, keep), copied(model)
    change_(small, applied)
    for number, inputs in enumerate(examples):
        try:
            verification = verify(model, small, applied, inputs, example=number)
        except NotSupported as error:
            return f"the smaller model does not run: {error.why}"
        if not verification.exact:
            return f"the cut cannot be proven: relative error {verification.error:.1e} to the masked model"
    return None


class _DenseFailed(Exception):
    """The masked model itself does not run or gives nan: the cause is the precision, not the cut."""


def _compare(dense: nn.Module, small: nn.Module, done: Changes, inputs: Any, *, double: bool) -> Verification:
    batch = known_only(as_double(inputs) if double else inputs, done.renumbered)
    try:
        reference = _reference(dense, done, batch, double=double)
        if not all(torch.isfinite(t).all() for t in reference):
            reference = _reference(dense, done, batch, double=double, consumers=True)
        if double and any(torch.isnan(t).any() for t in reference):
            raise _DenseFailed
    except NotSupported as error:
        if not double:
            raise
        raise _DenseFailed from error
    outputs = _run(_precise(copied(small), double), renumber(batch, done.renumbered))
    worst = relative_error(reference, outputs)
    return Verification(worst, TOLERANCE if double else SINGLE, len(outputs), "float64" if double else "own precision")


def _reference(dense: nn.Module, done: Changes, batch: Any, *, double: bool, consumers: bool = False) -> list[Tensor]:
    """The outputs of the masked model with its dropped blocks bypassed, at the kept positions."""
    masked_model = _precise(masked(dense, done, consumers=consumers), double)
    with bypassed(masked_model, done.dropped):
        outputs = _run(masked_model, batch, done.along)
    for entry in done.renumbered:
        for number, axis in entry.outputs:
            outputs[number] = outputs[number].index_select(axis, entry.kept.to(outputs[number].device))
    return outputs


def _precise(model: nn.Module, double: bool) -> nn.Module:
    return model.double() if double else model


def masked(model: nn.Module, done: Changes, *, consumers: bool = False) -> nn.Module:
    """A copy with zeros at the removed positions of every parameter; with `consumers`, along every axis but the first.

    `consumers` zeroes only the readers of a unit. Parameters that are normalized in the forward pass need it, since a
    slice of zeros would divide zero by zero.
    """
    masked_model = copied(model)
    parameters = dict(masked_model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, axes in done.cuts.items():
            for axis, kept in axes.items():
                if name in parameters and not (consumers and axis == 0):
                    removed = torch.ones(parameters[name].shape[axis], dtype=torch.bool)
                    removed[kept] = False
                    parameters[name].index_fill_(axis, removed.nonzero().flatten().to(parameters[name].device), 0)
    return masked_model


def relative_error(reference: list[Tensor], outputs: list[Tensor]) -> float:
    """Largest |difference| over the largest |reference|, over all tensors; infinite if they do not match in shape."""
    if [t.shape for t in reference] != [t.shape for t in outputs]:
        return float("inf")
    worst = 0.0
    for a, b in zip(reference, outputs, strict=True):
        if a.numel():
            a, b = a.double(), b.double()
            gap = torch.where(a == b, 0.0, (a - b).abs()).max().item()
            scale = a[torch.isfinite(a)].abs().max().item() if torch.isfinite(a).any() else 1.0
            worst = max(worst, gap / max(scale, 1e-30) if gap == gap else float("inf"))
    return worst


def as_double(tree: Any) -> Any:
    """Floating-point tensors of an input tree in float64."""
    return each(tree, lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)


class _NoDownCast(TorchFunctionMode):
    """Keeps float64 where a model's source casts to float32, so that rounding cannot hide a wrong cut."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), called(func)
        narrow = {torch.float32, torch.float16, torch.bfloat16}
        if name in {"float", "half", "bfloat16"} and args and args[0].dtype == torch.float64:
            return args[0]
        written = isinstance(func, torch._ops.OpOverload) and name in _MAKERS  # a program has literal types
        if kwargs.get("dtype") in narrow and (written or (args and _double(args[0]))):
            kwargs["dtype"] = torch.float64
        ends = kwargs.get("offs", args[2] if len(args) > 2 else None)
        if name in {"grouped_mm", "_grouped_mm"} and _double(args[0]) and ends is not None:
            return _grouped_product(args[0], args[1], ends)
        if name in {"to", "type", "softmax", "log_softmax", "sum", "mean", "cumsum"} and args and _double(args[0]):
            args = tuple(torch.float64 if isinstance(a, torch.dtype) and a in narrow else a for a in args)
        return func(*args, **kwargs)


_MAKERS = frozenset("zeros ones full empty arange scalar_tensor eye linspace new_zeros new_ones new_full".split())
"""Operations that create a tensor of a given type."""


def _grouped_product(tokens: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """`grouped_mm` in float64, which torch does not support."""
    products = tokens.new_zeros(len(tokens), weights.shape[2])
    start = 0
    for expert, end in enumerate(ends.tolist()):
        products[start:end] = tokens[start:end] @ weights[expert]
        start = end
    return products


def _double(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.float64


class _Restricted(TorchFunctionMode):
    """Restricts the calls in `along` to the kept positions, as in the smaller model."""

    def __init__(self, along: Sequence[Along]) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.at: dict[tuple[str, int], list[Along]] = {}
        for call in along:
            self.at.setdefault((call.name, call.number), []).append(call)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = called(func)
        number, kwargs = self.count[name], kwargs or {}
        self.count[name] += 1
        for call in self.at.get((name, number), ()):
            kept = call.kept.to(args[0].device)
            if name in _CHOICES:
                removed = torch.ones(args[0].shape[call.axis], dtype=torch.bool, device=kept.device)
                removed[kept] = False
                args = (_hidden(args[0], removed, call.axis), *args[1:])
            elif name == "mean":
                args = (args[0].index_select(call.axis, kept), *args[1:])
            else:
                return _normed(func, args, kwargs, kept)
        return func(*args, **kwargs)


_CHOICES = frozenset({"softmax", "topk"})


def _hidden(values: Tensor, removed: Tensor, axis: int) -> Tensor:
    """Values in which removed positions can never be chosen."""
    shape = [-1 if k == axis else 1 for k in range(values.dim())]
    return values.masked_fill(removed.reshape(shape), -torch.inf)


def _normed(func: Any, args: Any, kwargs: Any, kept: Tensor) -> Tensor:
    """A norm of the last axis over the kept positions; zero elsewhere."""
    names = ("input", "normalized_shape", "weight", "bias", "eps") if called(func) == "layer_norm" else _RMS
    arguments = {**dict(zip(names, args, strict=False)), **kwargs}
    affine = {k: arguments[k].index_select(0, kept) for k in ("weight", "bias") if arguments.get(k) is not None}
    value = arguments["input"]
    narrow = func(
        value.index_select(-1, kept), (len(kept),), **affine, eps=arguments.get("eps", _EPS.get(called(func)))
    )
    return torch.zeros_like(value).index_copy(-1, kept, narrow)


_RMS = ("input", "normalized_shape", "weight", "eps")
_EPS = {"layer_norm": 1e-5}


def _run(model: nn.Module, inputs: Any, along: Sequence[Along] = ()) -> list[Tensor]:
    try:
        with untouched(model), torch.no_grad(), _NoDownCast(), _Restricted(along):
            return tensors(forward(model, inputs))
    except (RuntimeError, ValueError, AssertionError, LookupError, TypeError, AttributeError) as error:
        raise NotSupported(
            "the smaller model does not run",
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}",
            "a size in its source does not follow the cut; skip= excludes the layers that you name",
        ) from error
