"""Learned masks: gates are torch parametrizations of weights during training, and `merge_gates_` removes them.

While gates are attached, `model.weight` is the gated weight; the trained parameters are
`parametrizations.weight.original` and those of the gate. The model can be copied, saved by its state dict and trained
by any loop. `merge_gates_` leaves plain weights with their former names and order; `plan_zeros` then plans the removal
of zero units.
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
    """A module that multiplies or thresholds a weight; several slices may share one gate."""

    @abstractmethod
    def cost(self, weight: Tensor) -> Tensor:
        """The gate's term in `gate_penalty`, one number. weight: the parameter under the gate."""


class Noisy(ABC):
    """A gate that draws new noise before each pass of the model in training mode."""

    @abstractmethod
    def draw(self) -> None:
        """New noise, from torch's global generator."""


class Scheduled(ABC):
    """A gate that closes along a schedule."""

    @abstractmethod
    def set_progress(self, progress: float) -> None:
        """Set the progress of training, in [0, 1]."""


def gate_penalty(model: nn.Module) -> Tensor:
    """Sum of the costs of all gates on `model`: expected weights, scores, divergences. RequestError without gates."""
    return torch.stack([gate.cost(weight) for gate, weight in gates_of(model)]).sum()


def step_gates_(model: M, progress: float) -> M:
    """Set the progress of training, in [0, 1], of all gates with a schedule.

    Call it after each step: `finetune(..., on_step=lambda step, *_: step_gates_(model, (step + 1) / steps))`.
    Errors: RequestError for a progress out of range.
    """
    if not 0 <= progress <= 1:
        raise RequestError(f"progress={progress:g} is out of range", "it runs from 0 to 1", "pass (step + 1) / steps")
    for gate, _ in gates_of(model):
        if isinstance(gate, Scheduled):
            gate.set_progress(progress)
    return model


def gates_of(model: nn.Module) -> list[tuple[Gate, Tensor]]:
    """Every gate once, with its weight; a gate that several weights share comes with the first one."""
    gates: dict[int, tuple[Gate, Tensor]] = {}
    for module in unwrap(model).modules():
        if isinstance(module, parametrize.ParametrizationList):
            for gate in module.modules():
                if isinstance(gate, Gate):
                    gates.setdefault(id(gate), (gate, module.original))
    if not gates:
        why = "they were never attached, or merge_gates_ removed them"
        raise RequestError("the model carries no gates", why, "for example l0_gates_(model, units)")
    return list(gates.values())


def attach_(model: M, gates: Mapping[str, list[nn.Module]]) -> M:
    """Attach gates to parameters by name, in place. Errors: RequestError for tied, masked or parametrized weights."""
    root = unwrap(model)
    _check_plain(root, gates)
    for name, modules in gates.items():
        module, leaf = _place(root, name)
        module.__dict__.setdefault(_ORDER, tuple(module._parameters))
        for gate in modules:
            gate.train(module.training)
            parametrize.register_parametrization(module, leaf, gate)
    if _draw not in root._forward_pre_hooks.values():
        root.register_forward_pre_hook(_draw)
    return model


def merge_gates_(model: M) -> M:
    """Merge all gates into their weights, in place: each weight becomes its gated value in evaluation mode.

    Schedules are set to their end. Parameters and state-dict keys get their former names and order. The output in
    evaluation mode does not change, unless a schedule was not at its end. RequestError without gates.
    """
    step_gates_(model, 1.0)
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
    """Draw noise once before each pass: all slices of a shared gate, and all reads of a weight, see the same noise."""
    if model.training:
        for module in model.modules():
            if isinstance(module, Noisy):
                module.draw()


def _reorder(module: nn.Module, order: Sequence[str]) -> None:
    """Restore this order of parameters: torch appends a restored parameter at the end, and optimizers use the order."""
    present = dict(module._parameters)
    module._parameters.clear()
    module._parameters.update({leaf: present[leaf] for leaf in order if leaf in present} | present)


def _place(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    prefix, _, leaf = name.rpartition(".")
    return root.get_submodule(prefix), leaf


def _check_plain(root: nn.Module, gates: Mapping[str, list[nn.Module]]) -> None:
    """RequestError unless gates can be attached to these parameters."""
    names: dict[int, list[str]] = {}
    for name, parameter in root.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    if any(isinstance(module, Gate) for module in root.modules()):
        raise RequestError("the model carries gates already", "one kind at a time", "call merge_gates_(model) first")
    if next(records(root), None) is not None:
        raise RequestError("the model carries masks", "gates would bypass them", "call prunella.finalize(model) first")
    for name in gates:
        tied = next((aliases for aliases in names.values() if name in aliases), [])
        if len(tied) != 1 or parametrize.is_parametrized(_place(root, name)[0]) or ".parametrizations." in name:
            why = f"it is tied: {' = '.join(tied)}" if len(tied) > 1 else "it is not a plain parameter of this model"
            raise RequestError(
                f"a gate cannot be attached to {name}", why, f"leave it out: coupled_units(..., skip=[{name!r}])"
            )


# -- parametrizations of one kind, attached by name and removed completely --------------------------------------------


def weights(model: nn.Module, only: Sequence[str]) -> list[tuple[str, nn.Parameter]]:
    """Parameters of at least two dimensions whose name matches a pattern. RequestError if none, or if one is tied."""
    root = unwrap(model)
    named = [
        (name, parameter)
        for name, parameter in root.named_parameters()
        if parameter.dim() > 1 and any(fnmatchcase(name, pattern) for pattern in only)
    ]
    if not named:
        raise RequestError(
            f"{list(only)!r} names no weight of the model",
            "weights have at least two dimensions",
            "the patterns match names of parameters, such as 'layer1.*.weight'",
        )
    for name, parameter in named:
        owners = [p for p, m in root.named_modules() for own in m._parameters.values() if own is parameter]
        if len(owners) > 1:
            why = "each use would get a mask of its own"
            raise RequestError(f"{name} is shared by {' and '.join(owners)}", why, "untie it, or leave it out")
    return named


def put_on(model: nn.Module, names: Sequence[str], make: Callable[[nn.Parameter], P]) -> list[P]:
    """Attach to each parameter of these names the parametrization that `make` returns for it."""
    root = unwrap(model)
    order = {id(module): tuple(module._parameters) for module in root.modules()}
    attached = []
    for name in names:
        owner, _, leaf = name.rpartition(".")
        module, parameter = root.get_submodule(owner), root.get_parameter(name)
        parametrization = make(parameter)
        parametrization.__dict__[_ORDER] = order[id(module)]
        parametrize.register_parametrization(module, leaf, parametrization)
        attached.append(parametrization)
    return attached


def take_off(model: nn.Module, kind: type[P]) -> Iterator[tuple[nn.Parameter, P]]:
    """Remove every parametrization of that kind: the plain parameter keeps its bits, and all keys are as before."""
    for module in list(unwrap(model).modules()):
        if not parametrize.is_parametrized(module):
            continue
        assert isinstance(module.parametrizations, nn.ModuleDict)
        for leaf, chain in list(module.parametrizations.items()):
            assert isinstance(chain, nn.ModuleList)
            parametrization = next((part for part in chain if isinstance(part, kind)), None)
            if parametrization is None:
                continue
            parametrize.remove_parametrizations(module, leaf, leave_parametrized=False)
            _reorder(module, parametrization.__dict__[_ORDER])
            parameter = module._parameters[leaf]
            assert parameter is not None
            yield parameter, parametrization
