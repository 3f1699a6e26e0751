"""What a request has to fulfil before any work is done, and what a model has to be."""

from __future__ import annotations

import inspect
from typing import get_args

import torch
from torch import nn

from prunella.errors import BadInput, RequestError
from prunella.granularity import Fixed, Granularity, Masking, Structural, Vocabulary
from prunella.registry.controlled import Controlled, name_of, plain_function
from prunella.registry.method import REGISTRY, MethodKind, needs_of
from prunella.targets import Sparsity, Target


def check_function(function: object, kind: MethodKind) -> None:
    """Errors: RequestError for what is not a function of that kind, or was given knobs that it does not have."""
    known = next((m for m in REGISTRY.values() if m.function is plain_function(function)), None)
    if not callable(function) or isinstance(function, type) or (known and known.kind != kind):
        found = f"{known.name} is of kind {known.kind}" if known else f"{function!r} is not a function"
        raise RequestError(
            f"Recipe({kind}=) takes a function of that kind", found, f"see `prunella methods` for {kind}s"
        )
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


def check_granularity(grains: tuple[Granularity, ...]) -> None:
    """Errors: RequestError for what is no granularity, and for several that do not share a ranking."""
    unknown = [grain for grain in grains if not isinstance(grain, get_args(Granularity))]
    if not grains or unknown:
        found = f"{unknown[0]!r} is none" if unknown else "there is none"
        todo = "for example Channel(), (Channel(), Head()), Element(), NM(2, 4)"
        raise RequestError("Recipe(granularity=) takes granularity objects", found, todo)
    names = [type(grain).__name__ for grain in grains]
    if len(grains) > 1 and (len(set(names)) < len(names) or not all(isinstance(g, Structural) for g in grains)):
        raise RequestError(
            f"{' and '.join(names)} do not go together",
            "several granularities share one ranking of different units of structure",
            "for masks give one; make a second plan for the other",
        )


def check_numbers(grains: tuple[Granularity, ...], floor: float, align: int, seed: int, least: int) -> None:
    """Errors: RequestError for a floor, align, seed or least out of range."""
    if not 0 <= floor < 1:
        raise RequestError(f"floor={floor!r} is out of range", "a fraction of each group, 0 <= floor < 1")
    if not isinstance(align, int) or align < 1:
        raise RequestError(f"align={align!r} is out of range", "a whole number of at least 1")
    if align > 1 and isinstance(grains[0], Masking):
        raise RequestError("align= is for widths of channels", "masks leave widths alone", "use Block(rows, cols)")
    if not isinstance(seed, int) or not 0 <= seed < 2**31:
        raise RequestError(f"seed={seed!r} is out of range", "a whole number, 0 <= seed < 2**31")
    if least not in (0, 1):
        raise RequestError(f"least={least!r} is out of range", "0 or 1", "use floor= to keep more")
    if least == 0 and isinstance(grains[0], Structural):
        raise RequestError("least=0 is for masks", "a layer without units is no layer", "leave it at 1")


def checked_target(grains: tuple[Granularity, ...], target: Target | None) -> Target:
    """The target, filled in for fixed patterns and for `Vocabulary` alone, where nothing is left to choose.

    Errors: RequestError when it is missing, has no unit or does not fit.
    """
    pattern = grains[0]
    if all(isinstance(grain, Vocabulary) for grain in grains):
        if target is not None:
            raise RequestError(f"Vocabulary cannot meet {target}", "its tokens decide what goes", "leave target= out")
        return Sparsity(0.0)
    if isinstance(pattern, Fixed):
        fixed = Sparsity(pattern.sparsity)
        if target is not None and not (isinstance(target, Sparsity) and abs(target.value - fixed.value) < 1e-9):
            todo = f"leave target= out, or ask for Sparsity({fixed.value:g})"
            raise RequestError(f"{pattern.title} cannot meet {target}", f"it gives {fixed}", todo)
        return fixed
    if not isinstance(target, Target):
        found = "target= is missing" if target is None else f"target={target!r} has no unit"
        raise RequestError(found, "a budget needs its unit", "for example target=MACs(0.5) or target=Sparsity(0.9)")
    return target


def check_finite(model: nn.Module) -> None:
    """Errors: BadInput that names the first tensor with NaN or infinity, or without values."""
    for name, tensor in model.named_parameters():
        if tensor.is_meta:
            raise BadInput(f"{name} has no values", "it is on the meta device", "load the weights first")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise BadInput(f"{name} has {bad} values that are not finite", "NaN or infinity", "check the checkpoint")
    for name, buffer in model.named_buffers():
        # Infinity is common in buffers: attention masks.
        if buffer.is_floating_point() and not buffer.is_meta and bool(torch.isnan(buffer).any()):
            raise BadInput(f"the buffer {name} has NaN in it", "", "check the checkpoint")
