"""Parametrisations that come off again: a weight computed from a parameter, and the plain module after it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import nn
from torch.nn.utils import parametrize

from prunella.errors import RequestError
from prunella.model.unwrap import unwrap

P = TypeVar("P", bound=nn.Module)


def weights(model: nn.Module, only: Sequence[str]) -> list[tuple[str, nn.Parameter]]:
    """Parameters of at least two dimensions whose name matches a pattern. RequestError if none, or if one is tied."""
    root = unwrap(model)
    found = [
        (name, parameter)
        for name, parameter in root.named_parameters()
        if parameter.dim() > 1 and any(fnmatchcase(name, pattern) for pattern in only)
    ]
    if not found:
        raise RequestError(
            f"{list(only)!r} names no weight of the model",
            "weights have at least two dimensions",
            "patterns are of names of parameters, such as 'layer1.*.weight'",
        )
    for name, parameter in found:
        owners = [p for p, m in root.named_modules() for own in m._parameters.values() if own is parameter]
        if len(owners) > 1:
            why = "each use would get a mask of its own"
            raise RequestError(f"{name} is shared by {' and '.join(owners)}", why, "untie it, or leave it out")
    return found


def put_on(model: nn.Module, names: Sequence[str], make: Callable[[nn.Parameter], P]) -> list[P]:
    """Compute each parameter of these names through a module that `make` gives for it."""
    root = unwrap(model)
    order = {id(module): tuple(module._parameters) for module in root.modules()}
    made = []
    for name in names:
        owner, _, leaf = name.rpartition(".")
        module, parameter = root.get_submodule(owner), root.get_parameter(name)
        step = make(parameter)
        step.__dict__["_prunella_order"] = order[id(module)]
        parametrize.register_parametrization(module, leaf, step)
        made.append(step)
    return made


def take_off(model: nn.Module, kind: type[P]) -> Iterator[tuple[nn.Parameter, P]]:
    """Remove every parametrisation of that kind: the bare parameter has its bits, and all keys are as before."""
    for module in list(unwrap(model).modules()):
        if not parametrize.is_parametrized(module):
            continue
        assert isinstance(module.parametrizations, nn.ModuleDict)
        for leaf, chain in list(module.parametrizations.items()):
            assert isinstance(chain, nn.ModuleList)
            step = next((part for part in chain if isinstance(part, kind)), None)
            if step is None:
                continue
            parametrize.remove_parametrizations(module, leaf, leave_parametrized=False)
            place = {key: index for index, key in enumerate(step.__dict__["_prunella_order"])}
            ordered = sorted(module._parameters.items(), key=lambda item: place.get(item[0], len(place)))
            module._parameters.clear()
            module._parameters.update(ordered)
            parameter = module._parameters[leaf]
            assert parameter is not None
            yield parameter, step
