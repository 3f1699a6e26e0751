"""Checks of the request and of the model before any work."""

from __future__ import annotations

import inspect
from typing import get_args

import torch
from torch import Tensor, nn

from prunella.errors import BadInput, RequestError
from prunella.granularity import Fixed, Granularity, Masking, Structural, Vocabulary
from prunella.model.device import check_float64
from prunella.model.traceable import check_traceable
from prunella.registry.controlled import Controlled, name_of, plain_function
from prunella.registry.method import REGISTRY, MethodKind, needs_of
from prunella.targets import Bytes, MACs, Params, Sparsity, Target, Threshold


def check_function(function: object, kind: MethodKind) -> None:
    """Errors: RequestError for anything but a function of that kind, and for unknown knobs."""
    method = next((m for m in REGISTRY.values() if m.function is plain_function(function)), None)
    if not callable(function) or isinstance(function, type) or (method and method.kind != kind):
        why = f"{method.name} is of kind {method.kind}" if method else f"{function!r} is not a function"
        raise RequestError(f"Recipe({kind}=) takes a function of that kind", why, f"see `prunella methods` for {kind}s")
    if isinstance(plain_function(function), Controlled) and not isinstance(function, Controlled):
        raise RequestError(
            f"{name_of(function)} takes no knobs itself",
            "the criterion that it is made of has them",
            "bind them inside: inverted(partial(magnitude, p=2))",
        )
    try:
        inspect.signature(function)
    except (TypeError, ValueError) as error:
        raise RequestError(f"{kind} {name_of(function)} does not have these knobs", str(error)) from error
    if kind == "criterion" and not needs_of(function):
        todo = "name at least one statistic as a positional parameter, as `def mine(weight): ...`"
        raise RequestError(f"the criterion {name_of(function)} asks for no statistic", "", todo)


def check_granularity(granularities: tuple[Granularity, ...]) -> None:
    """Errors: RequestError for anything but granularities, and for several that cannot share a ranking."""
    unknown = [entry for entry in granularities if not isinstance(entry, get_args(Granularity))]
    if not granularities or unknown:
        why = f"{unknown[0]!r} is none" if unknown else "there is none"
        todo = "for example Channel(), (Channel(), Head()), Element(), NM(2, 4)"
        raise RequestError("Recipe(granularity=) takes granularity objects", why, todo)
    names = [type(entry).__name__ for entry in granularities]
    structural = all(isinstance(entry, Structural) for entry in granularities)
    if len(granularities) > 1 and (len(set(names)) < len(names) or not structural):
        raise RequestError(
            f"{' and '.join(names)} do not go together",
            "several granularities share one ranking of different units of structure",
            "for masks give one; make a second plan for the other",
        )


def check_numbers(
    granularities: tuple[Granularity, ...], *, min_density: float, round_to: int, seed: int, min_units: int
) -> None:
    """Errors: RequestError for a number out of range, or one that does not go with the granularity."""
    masks = isinstance(granularities[0], Masking)
    if not 0 <= min_density < 1:
        raise RequestError(f"min_density={min_density!r} is out of range", "a fraction of each group, 0 <= d < 1")
    if not isinstance(round_to, int) or round_to < 1:
        raise RequestError(f"round_to={round_to!r} is out of range", "a whole number of at least 1")
    if round_to > 1 and masks:
        raise RequestError("round_to= is for widths of channels", "masks do not change widths", "use Block(rows, cols)")
    check_seed(seed)
    if min_units not in (0, 1):
        raise RequestError(f"min_units={min_units!r} is out of range", "0 or 1", "use min_density= to keep more")
    if min_units == 0 and isinstance(granularities[0], Structural):
        raise RequestError("min_units=0 is for masks", "a layer needs at least one unit", "leave it at 1")


def check_seed(seed: object) -> None:
    """Errors: RequestError for anything but an integer that every random generator accepts."""
    if not isinstance(seed, int) or not 0 <= seed < 2**31:
        raise RequestError(f"seed={seed!r} is out of range", "a whole number, 0 <= seed < 2**31")


def checked_target(granularities: tuple[Granularity, ...], target: Target | None) -> Target | None:
    """The target: the sparsity of a fixed pattern, None for `Vocabulary` alone, where the tokens are given.

    Errors: RequestError when it is missing, has no unit or does not fit.
    """
    pattern = granularities[0]
    if all(isinstance(entry, Vocabulary) for entry in granularities):
        if target is not None:
            raise RequestError(
                f"Vocabulary cannot meet {target}", "its tokens determine what is removed", "leave target= out"
            )
        return None
    if isinstance(pattern, Fixed):
        fixed = Sparsity(pattern.sparsity)
        if target is not None and not (_prunable(target) and abs(target.value - fixed.value) < 1e-9):
            todo = f"leave target= out, or ask for Sparsity({fixed.value:g})"
            raise RequestError(f"{pattern.title} cannot meet {target}", f"it gives {fixed}", todo)
        return fixed
    if not isinstance(target, Target):
        what = "target= is missing" if target is None else f"target={target!r} has no unit"
        raise RequestError(what, "a budget needs its unit", "for example target=MACs(0.5) or target=Sparsity(0.9)")
    return target


def check_threshold(target: Target | None, *, equal_widths: bool) -> None:
    """Errors: RequestError for a threshold together with equal widths, which would move units past it."""
    if isinstance(target, Threshold) and equal_widths:
        why = "a threshold decides each unit by its own score"
        raise RequestError("equal_widths does not go with a threshold", why, "leave one of them out")


def _prunable(target: Target) -> bool:
    return isinstance(target, Sparsity) and target.of == "prunable"


def foreign_weights(model: nn.Module) -> tuple[str, ...]:
    """A remark on weights that are not pruned because only their own library reads them; empty without such weights."""
    kinds = {n: type(p.data).__name__ for n, p in model.named_parameters() if type(p.data) is not Tensor}
    for name, module in model.named_modules():
        if type(module).__module__.startswith("torch.ao.nn.quantized") and hasattr(module, "_weight_bias"):
            kinds[name] = f"quantized {type(module).__name__}"
    shown = ", ".join(f"{name} ({kind})" for name, kind in [*kinds.items()][:6])
    more = f" and {len(kinds) - 6} more" if len(kinds) > 6 else ""
    return (f"not pruned, since only their own library reads them: {shown}{more}",) if kinds else ()


def small_number(target: Target | None) -> tuple[str, ...]:
    """A remark on a target such as `MACs(50)`: it was met as a number, and 50 % may have been meant."""
    if not isinstance(target, MACs | Params | Bytes) or not target.hint:
        return ()
    return (f"{target} is a number in all, no percentage: {target.hint}",)


@torch.no_grad()
def check_finite(model: nn.Module) -> None:
    """Check that the model can be traced and proven, and that its tensors hold values.

    Errors: those of `check_traceable` and `check_float64`; BadInput that names the first tensor with NaN or infinity,
    or without values.
    """
    check_traceable(model)
    check_float64(model)
    for name, tensor in model.named_parameters():
        if tensor.is_meta:
            raise BadInput(f"{name} has no values", "it is on the meta device", "load the weights first")
        if type(tensor.data) is not Tensor:  # only its own library reads it, and its layer is not pruned
            continue
        if not tensor.is_floating_point() and not tensor.is_complex():
            continue
        if not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise BadInput(f"{name} has {bad} values that are not finite", "NaN or infinity", "check the checkpoint")
    for name, buffer in model.named_buffers():
        # Infinity is common in buffers: attention masks.
        if buffer.is_floating_point() and not buffer.is_meta and bool(torch.isnan(buffer).any()):
            raise BadInput(f"the buffer {name} holds NaN", "", "check the checkpoint")
