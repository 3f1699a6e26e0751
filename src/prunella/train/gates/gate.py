"""Learned masks: gates sit on weights as parametrizations of torch while the model trains, and `bake_` takes them off.

With gates on, `model.weight` is the gated weight, what trains is `parametrizations.weight.original` and the gate. The
model can be copied, saved by its state dict and trained by any loop. `bake_` leaves plain weights with the names and
the order that they had before; `plan_zeros` then says what is gone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from prunella.errors import RequestError
from prunella.model.masks import records
from prunella.model.state import mode
from prunella.model.unwrap import unwrap

M = TypeVar("M", bound=nn.Module)
P = TypeVar("P", bound=nn.Module)
_ORDER = "_prunella_order"


class Gate(nn.Module, ABC):
    """What sits on a weight, or is shared by the slices that do."""

    @abstractmethod
    def cost(self, weight: Tensor) -> Tensor:
        """One number for the loss, `weight` being what the gate sits on: what `gate_penalty` sums."""


class Noisy(ABC):
    """A gate that draws new noise before each pass of the model in training mode."""

    @abstractmethod
    def draw(self) -> None:
        """New noise, from torch's global generator."""


class Scheduled(ABC):
    """A gate that closes along a schedule."""

    @abstractmethod
    def advance(self, progress: float) -> None:
        """Training has come so far, in [0, 1]."""


def gate_penalty(model: nn.Module) -> Tensor:
    """The sum of what the gates on `model` cost: expected weights, scores, divergences. RequestError without gates."""
    return torch.stack([gate.cost(weight) for gate, weight in gates_of(model)]).sum()


def advance_(model: M, progress: float) -> M:
    """Tell gates with a schedule how far training is, in [0, 1].

    After each step: `finetune(..., on_step=lambda step, *_: advance_(model, (step + 1) / steps))`.
    """
    if not 0 <= progress <= 1:
        raise RequestError(f"progress={progress:g} is out of range", "it runs from 0 to 1", "pass (step + 1) / steps")
    for gate, _ in gates_of(model):
        if isinstance(gate, Scheduled):
            gate.advance(progress)
    return model


def gates_of(model: nn.Module) -> list[tuple[Gate, Tensor]]:
    """Every gate once with the weight that it sits on, with the first of them where several share it."""
    found: dict[int, tuple[Gate, Tensor]] = {}
    for some in unwrap(model).modules():
        if isinstance(some, parametrize.ParametrizationList):
            for gate in some.modules():
                if isinstance(gate, Gate):
                    found.setdefault(id(gate), (gate, some.original))
    if not found:
        raise RequestError("the model carries no gates", "they were never put on, or bake_ took them off", "l0_gates_")
    return list(found.values())


def attach_(model: M, gates: Mapping[str, list[nn.Module]]) -> M:
    """Put gates on parameters by name, in place. Errors: RequestError for tied, masked or parametrized weights."""
    root = unwrap(model)
    _free(root, gates)
    for name, some in gates.items():
        module, leaf = _place(root, name)
        module.__dict__.setdefault(_ORDER, tuple(module._parameters))
        for gate in some:
            gate.train(module.training)
            parametrize.register_parametrization(module, leaf, gate)
    if _draw not in root._forward_pre_hooks.values():
        root.register_forward_pre_hook(_draw)
    return model


def bake_(model: M) -> M:
    """Take all gates off, in place: weights become what the gates make of them in evaluation mode, closed for good.

    Schedules are at their end. The names and the order of parameters and state-dict keys are those from before the
    gates. The output in evaluation mode stays the same, where no schedule moved. RequestError without gates.
    """
    advance_(model, 1.0)
    root = unwrap(model)
    with mode(root, training=False):
        for module in [module for module in root.modules() if _ORDER in module.__dict__]:
            for leaf in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, str(leaf), leave_parametrized=True)
            _reorder(module, module.__dict__.pop(_ORDER))
    for key, hook in list(root._forward_pre_hooks.items()):
        if hook is _draw:
            del root._forward_pre_hooks[key]
    return model


def _draw(model: nn.Module, args: Any) -> None:
    """Before each pass, so that a gate shared by several slices, or a weight that is read twice, sees one noise."""
    if model.training:
        for module in model.modules():
            if isinstance(module, Noisy):
                module.draw()


def _reorder(module: nn.Module, order: Sequence[str]) -> None:
    """Parameters in this order again: torch puts one back behind the others, and optimizers go by the order."""
    present = dict(module._parameters)
    module._parameters.clear()
    module._parameters.update({leaf: present[leaf] for leaf in order if leaf in present} | present)


def _place(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    prefix, _, leaf = name.rpartition(".")
    return root.get_submodule(prefix), leaf


def _free(root: nn.Module, gates: Mapping[str, list[nn.Module]]) -> None:
    names: dict[int, list[str]] = {}
    for name, parameter in root.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    if any(isinstance(module, Gate) for module in root.modules()):
        raise RequestError("the model carries gates already", "one kind at a time", "call bake_(model) first")
    if next(records(root), None) is not None:
        raise RequestError("the model carries masks", "gates would bypass them", "call prunella.finalize(model) first")
    for name in gates:
        alike = next((some for some in names.values() if name in some), [])
        if len(alike) != 1 or parametrize.is_parametrized(_place(root, name)[0]) or ".parametrizations." in name:
            why = f"it is tied: {' = '.join(alike)}" if len(alike) > 1 else "it is not a plain parameter of this model"
            raise RequestError(f"a gate cannot sit on {name}", why, f"leave it out: coupled(..., skip=[{name!r}])")


# -- parametrizations of one kind, put on by name and taken off without a trace ---------------------------------------


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
        step.__dict__[_ORDER] = order[id(module)]
        parametrize.register_parametrization(module, leaf, step)
        made.append(step)
    return made


def take_off(model: nn.Module, kind: type[P]) -> Iterator[tuple[nn.Parameter, P]]:
    """Remove every parametrization of that kind: the bare parameter has its bits, and all keys are as before."""
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
            _reorder(module, step.__dict__[_ORDER])
            parameter = module._parameters[leaf]
            assert parameter is not None
            yield parameter, step
