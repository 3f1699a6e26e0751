"""An oracle that knows nothing of the tool: what was cut is read off the values of the smaller model.

Every parameter of the zoo is random, so that a slice is known by its numbers. Whatever was removed is set to zero in
the dense model, and in float64 both must give the same output.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

Cut = dict[int, Tensor]
"""Axis -> positions that were kept."""


class Unreadable(Exception):
    """The smaller model holds values that the dense one does not have."""


def settle(model: nn.Module, *, seed: int = 0) -> nn.Module:
    """Eval mode, with every constant parameter and running statistic made random: nothing is trivially zero or one."""
    generator = torch.Generator().manual_seed(seed)
    stats = {id(m.running_var) for m in model.modules() if getattr(m, "running_var", None) is not None}
    means = {id(m.running_mean) for m in model.modules() if getattr(m, "running_mean", None) is not None}
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if not tensor.is_floating_point() or not tensor.numel():
                continue
            noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)
            if id(tensor) in stats:
                tensor.copy_(0.5 + noise)
            elif id(tensor) in means:
                tensor.copy_(noise - 0.5)
            elif isinstance(tensor, nn.Parameter) and bool((tensor == tensor.flatten()[0]).all()):
                tensor.add_(noise - 0.4)
            elif isinstance(tensor, nn.Parameter) and tensor.unique().numel() < tensor.numel():
                tensor.add_((noise - 0.5) * 0.02 * tensor.abs().mean())  # slices must be told apart by their values
    return model.eval()


def clone(model: nn.Module) -> nn.Module:
    """A deep copy; some packages keep static methods in attributes, which Python does not copy."""
    kept = [v for m in model.modules() for v in vars(m).values() if isinstance(v, staticmethod | classmethod)]
    return copy.deepcopy(model, {id(value): value for value in kept})


def run(model: nn.Module, inputs: Any) -> list[Tensor]:
    """All floating-point tensors of the output, in order. What the model draws, it draws from one seed."""
    torch.manual_seed(0)
    with torch.no_grad():
        if isinstance(inputs, Mapping):
            output = model(**inputs)
        else:
            output = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    return [tensor for tensor in tensors(output) if tensor.is_floating_point()]


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested mappings and sequences."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)


def double(value: Any) -> Any:
    """Floating-point tensors of nested inputs in float64."""
    return tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, value)


class _Wide(TorchDispatchMode):
    """Keeps float64 where a source casts to float32, so that rounding does not hide an error or look like one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") == torch.float32 and args and getattr(args[0], "dtype", None) == torch.float64:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def run_wide(model: nn.Module, inputs: Any) -> list[Tensor]:
    """`run` in float64; `inputs` and a copy of the model are cast."""
    with _Wide():
        return run(clone(model).double(), double(inputs))


def distance(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Largest difference over the largest reference, the worst over the outputs; infinite for other shapes."""
    if [t.shape for t in found] != [t.shape for t in wanted]:
        return float("inf")
    if not any(t.numel() for t in wanted):
        return float("inf")  # nothing was compared
    worst = 0.0
    for a, b in zip(found, wanted, strict=True):
        finite = torch.isfinite(b)
        if not torch.equal(finite, torch.isfinite(a)):
            return float("inf")
        if finite.any():
            gap = (a[finite].double() - b[finite].double()).abs().max()
            worst = max(worst, float(gap / b[finite].double().abs().max().clamp_min(1e-30)))
    return worst


def removed(dense: nn.Module, small: nn.Module) -> dict[str, Cut]:
    """Parameter -> axis -> positions that are still there. `Unreadable` where values are not those of the dense one."""
    after = dict(small.named_parameters(remove_duplicate=False))
    found = {}
    for name, before in dense.named_parameters(remove_duplicate=False):
        if name not in after:
            raise Unreadable(f"{name} is gone")
        cut = _kept(name, before.detach(), after[name].detach())
        if cut:
            found[name] = cut
    return found


def _kept(name: str, before: Tensor, after: Tensor) -> Cut:
    if before.dim() != after.dim():
        raise Unreadable(f"{name} has another number of axes")
    if before.shape == after.shape:
        if not torch.equal(before, after):
            raise Unreadable(f"{name} has other values")
        return {}
    peak = torch.unravel_index(after.abs().argmax(), after.shape)
    for place in (before == after[peak]).nonzero():
        cut = {}
        for axis in range(before.dim()):
            if before.shape[axis] != after.shape[axis]:
                at = tuple(slice(None) if k == axis else int(p) for k, p in enumerate(place))
                to = tuple(slice(None) if k == axis else int(p) for k, p in enumerate(peak))
                cut[axis] = _subsequence(before[at].tolist(), after[to].tolist())
        if all(len(kept) == after.shape[axis] for axis, kept in cut.items()) and torch.equal(take(before, cut), after):
            return cut
    raise Unreadable(f"{name} holds values that are not in the dense model")


def _subsequence(whole: list[float], part: list[float]) -> Tensor:
    """The first positions of `whole` that read `part`."""
    kept, wanted = [], iter(part)
    value = next(wanted, None)
    for position, number in enumerate(whole):
        if number == value:
            kept.append(position)
            value = next(wanted, None)
    return torch.tensor(kept, dtype=torch.int64)


def take(tensor: Tensor, cut: Cut) -> Tensor:
    """The kept positions."""
    for axis, kept in cut.items():
        tensor = tensor.index_select(axis, kept)
    return tensor


def masked(model: nn.Module, cuts: Mapping[str, Cut], axes: str = "all") -> nn.Module:
    """A copy with zeros where something was removed: along all axes, the `first` one only, or the `others`."""
    replica = clone(model)
    parameters = dict(replica.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, cut in cuts.items():
            for axis, kept in cut.items():
                if axes == "all" or (axis == 0) == (axes == "first"):
                    gone = torch.ones(parameters[name].shape[axis], dtype=torch.bool)
                    gone[kept] = False
                    parameters[name].index_fill_(axis, gone.nonzero().flatten(), 0)
    return replica


def runs_wide(model: nn.Module, inputs: Any) -> bool:
    """Whether the model runs in float64: some sources name float32."""
    try:
        run_wide(model, inputs)
    except RuntimeError:
        return False
    return True


def _run_copy(model: nn.Module, inputs: Any) -> list[Tensor]:
    """`run` of a copy: some models keep what they meet first."""
    return run(clone(model), inputs)


def error(dense: nn.Module, small: nn.Module, inputs: Any, *, wide: bool) -> float:
    """How far the smaller model is from the masked one, relative; `wide`: in float64 if the dense model can.

    Where zeros in all places give no finite number (a weight that is normalized in the forward pass) only readers, or
    else only makers, are zeroed.
    """
    cuts = removed(dense, small)
    answer = run_wide if wide and runs_wide(dense, inputs) else _run_copy
    found = answer(small, inputs)
    worst = float("inf")
    for axes in ("all", "others", "first"):
        wanted = answer(masked(dense, cuts, axes), inputs)
        if all(bool(torch.isfinite(t).all()) for t in wanted) or axes == "first":
            worst = min(worst, distance(found, wanted))
            if worst <= 1e-4:
                break
    return worst
