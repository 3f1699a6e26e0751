"""Units that are one number for every input: what they add to the layers that read them goes into a bias.

A layer reads the constant `c_j` of unit `j` at every position, so that without the unit `sum_j W_ij c_j` is missing. It
goes into the bias of the layer, or into the mean of the batch normalization behind it. Where a convolution pads with
zeros, fewer positions read the constant at the border: no bias is that, and the unit stays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from prunella.graph.data import Group
from prunella.graph.double import as_double
from prunella.model.copying import copied
from prunella.model.forward import forward
from prunella.model.state import untouched

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass
class _Reader:
    """What a layer has read: the number of each channel, nan where it is not one; and the norm that reads the layer."""

    values: Tensor
    norm: str = ""
    outputs: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Constants:
    """What the layers of a model read on the example, in float64. names: module -> its path."""

    readers: Mapping[str, _Reader]
    modules: Mapping[str, nn.Module]

    def fold(self, group: Group, units: Tensor) -> dict[str, Tensor] | str:
        """Parameter or buffer -> what is to be added without these units; or why nothing makes up for them."""
        shifts: dict[str, Tensor] = {}
        for member in group.members:
            if member.role != "in":
                continue
            path, _, name = member.entity.rpartition(".")
            module, reader = self.modules.get(path), self.readers.get(path)
            fault = _unfit(module, name, member.axis)
            if fault or module is None or reader is None:
                return f"{member.entity} {fault or 'is read by no call of its layer'}"
            positions = torch.from_numpy(member.index)[units[torch.from_numpy(member.unit)]]
            values = reader.values[positions]
            if bool(values.isnan().any()):
                return f"{path or 'the layer'} reads them as several numbers"
            weight: Tensor = module.weight.detach().double().cpu()  # type: ignore[operator]
            shift = weight[:, positions].reshape(len(weight), len(positions), -1).sum(-1) @ values
            place, sign = _place(path, module, reader)
            if not place:
                return f"{path or 'the layer'} has no bias, and no batch normalization reads it"
            shifts[place] = shifts.get(place, torch.zeros_like(shift)) + sign * shift
        return shifts or "no layer reads them"


def _place(path: str, module: nn.Module, reader: _Reader) -> tuple[str, int]:
    """The vector that a constant behind the layer goes into, and its sign; an empty name if there is none."""
    prefix = f"{path}." if path else ""
    if module._parameters.get("bias") is not None:
        return f"{prefix}bias", 1
    return (f"{reader.norm}.running_mean", -1) if reader.norm else ("", 0)


def _unfit(module: nn.Module | None, name: str, axis: int) -> str:
    """Why a layer does not read a constant as one number per output; empty if it does."""
    if name != "weight" or axis != 1 or not isinstance(module, nn.Linear | _ConvNd) or isinstance(module, _TRANSPOSED):
        return "is read in a form that is not that of a linear layer or a convolution"
    if isinstance(module, nn.Linear):
        return ""
    if module.groups != 1:
        return "is that of a grouped convolution"
    wide = any(size > 1 for size in module.kernel_size)
    pads = module.padding == "same" or (not isinstance(module.padding, str) and any(module.padding))
    if pads and (wide or module.padding != "same") and module.padding_mode == "zeros":
        return "pads with zeros, so that fewer positions read the constant at the border"
    return ""


def constants_read(model: nn.Module, groups: Sequence[Group], inputs: Any) -> Constants | None:
    """What the readers of these groups read on the example; None if the model does not run in float64."""
    replica = copied(model).eval().double()
    modules = dict(replica.named_modules())
    paths = {member.entity.rpartition(".")[0] for group in groups for member in group.members if member.role == "in"}
    readers: dict[str, _Reader] = {}
    with ExitStack() as stack:
        stack.enter_context(untouched(replica, 0))
        stack.enter_context(torch.no_grad())
        for path in paths & modules.keys():
            module = modules[path]
            if isinstance(module, nn.Linear | _ConvNd):
                stack.enter_context(module.register_forward_hook(_noting(readers, path)))
        for path, module in modules.items():
            if isinstance(module, _BatchNorm) and module.running_mean is not None:
                stack.enter_context(module.register_forward_pre_hook(_following(readers, path)))
        try:
            forward(replica, as_double(inputs))
        except (RuntimeError, ValueError, TypeError):
            return None
    return Constants(readers, modules)


def _noting(readers: dict[str, _Reader], path: str) -> Any:
    def note(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        x = args[0].detach()
        axis = -1 if isinstance(module, nn.Linear) else x.dim() - module.weight.dim() + 1  # type: ignore[operator]
        lines = x.movedim(axis, 0).flatten(1).cpu()
        values = torch.where((lines == lines[:, :1]).all(1), lines[:, 0], torch.nan)
        if path in readers:
            known = readers[path]
            known.values = torch.where(known.values == values, values, torch.nan)
            known.outputs.append(output)
        else:
            readers[path] = _Reader(values, outputs=[output])

    return note


def _following(readers: dict[str, _Reader], path: str) -> Any:
    def note(_: nn.Module, args: tuple[Any, ...]) -> None:
        for reader in readers.values():
            if any(output is args[0] for output in reader.outputs):
                reader.norm = path

    return note
