"""A model's tensors in a safetensors file and back: tied ones once, unsupported types as bytes, lossless."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunella.errors import BadInput, NotSupported
from prunella.io.json import Fields
from prunella.io.tensor_file import open_tensors
from prunella.io.tensor_writer import save_file

# What every release of safetensors since 0.4 can hold; all else is stored as bytes with its type in the manifest.
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_PLAIN = frozenset((*_FLOATS, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool))


@dataclass(frozen=True)
class State:
    """Tensors by name. `ties`: further name -> the name it shares storage with. `transient`: buffers kept out of
    the model's state dict (`persistent=False`); they are stored too, since a rebuilt model could not compute them."""

    tensors: Mapping[str, Tensor]
    ties: Mapping[str, str]
    transient: tuple[str, ...]

    def described(self) -> dict[str, dict[str, Any]]:
        """Type and shape of every tensor, for the manifest."""
        return {n: {"dtype": str(t.dtype)[6:], "shape": list(t.shape)} for n, t in self.tensors.items()}


def read_state(model: nn.Module) -> State:
    """All parameters and buffers. Errors: BadInput for NaN, NotSupported for anything but dense tensors with data."""
    persistent = model.state_dict(keep_vars=True)
    buffers = dict(model.named_buffers(remove_duplicate=False))
    transient = {name: value for name, value in buffers.items() if name not in persistent}
    tensors: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, value in {**persistent, **transient}.items():
        tensor = _checked(name, value)
        first = seen.setdefault(_identity(tensor, name), name)
        if first == name:
            tensors[name] = tensor
        else:
            ties[name] = first
    return State(tensors, ties, tuple(transient))


def write_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write one safetensors file; the `format` entry lets `from_pretrained` read it."""
    save_file({name: _plain(value) for name, value in tensors.items()}, file, metadata={"format": "pt"})


def read_tensors(file: Path, described: Mapping[str, Fields]) -> dict[str, Tensor]:
    """Read a safetensors file and undo the byte encoding. Errors: BadInput when it is broken or not as described.

    Each tensor has its own memory: tensors of a mapped file may be unaligned, and CPU libraries then choose other
    kernels with other rounding.
    """
    stored = open_tensors(file)
    unknown = next((name for name in stored.tensors if name not in described), None)
    if unknown is not None:
        raise BadInput(f"{file} does not fit its manifest", f"unknown tensor {unknown!r}")
    return {name: _decoded(value, described[name], name) for name, value in stored.read()}


def load_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Errors: BadInput when it is missing, broken or cut short."""
    return dict(open_tensors(file).read())


def fill_(model: nn.Module, state: State) -> None:
    """Load these tensors into the model, and restore ties. Errors: BadInput if a name or a shape does not fit."""
    full = {**state.tensors, **{alias: state.tensors[name] for alias, name in state.ties.items()}}
    own = model.state_dict()
    persistent = OrderedDict((name, value) for name, value in full.items() if name not in state.transient)
    persistent._metadata = own._metadata  # type: ignore[attr-defined]  # versions, which some modules insist on
    _check_fit(own, persistent)
    model.load_state_dict(persistent, strict=True, assign=True)
    for name in state.transient:
        owner, leaf = _place(model, name)
        if leaf not in owner._buffers:
            raise BadInput(f"the artifact has the buffer {name!r}", "the rebuilt model has no such buffer")
        owner._buffers[leaf] = full[name]
    for alias, name in state.ties.items():
        _tie(model, alias, name)
    _check_complete(model)


def has_stray_meta(model: nn.Module) -> bool:
    """Whether a module has a tensor without data as a plain attribute, which no state dict contains."""
    values = (value for module in model.modules() for value in vars(module).values())
    return any(isinstance(value, Tensor) and value.is_meta for value in values)


def _checked(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise NotSupported(f"{name} cannot be saved", f"it is a {type(value).__name__}, not a tensor")
    if type(value.data) is not Tensor:
        why = f"it is a {type(value.data).__name__}, which only its own library reads"
        raise NotSupported(f"{name} cannot be saved", why, "save the model before it is quantized")
    if value.is_meta:
        raise NotSupported(f"{name} cannot be saved", "it is on the meta device and has no data")
    if value.layout is not torch.strided or value.is_quantized:
        raise NotSupported(f"{name} cannot be saved", f"its layout is {value.layout}", "make it dense first")
    if _has_nan(value):
        raise BadInput(f"{name} holds NaN", "a model with NaN in its weights is not saved", "look at the training run")
    if isinstance(value, nn.Parameter) and not name.endswith("mask") and _has_infinity(value):
        why = "a model with infinity in its weights is not saved"
        raise BadInput(f"{name} holds infinity", why, "look at the training run")
    return value.detach()


def _has_infinity(value: Tensor) -> bool:
    if value.itemsize == 1:
        value = value.float()
    floating = value.is_floating_point() or value.is_complex()
    return floating and not bool(torch.isfinite(value.sum())) and bool(torch.isinf(value).any())


def _has_nan(value: Tensor) -> bool:
    if not (value.is_floating_point() or value.is_complex()):
        return False
    if value.itemsize == 1:
        value = value.float()
    # A finite sum has no NaN in it, and is four times as fast; infinities can make one, so look closer then.
    return not bool(torch.isfinite(value.sum())) and bool(torch.isnan(value).any())


def _identity(tensor: Tensor, name: str) -> tuple[Any, ...]:
    if tensor.numel() == 0:
        return (name,)
    return (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), str(tensor.device))


def _plain(tensor: Tensor) -> Tensor:
    value = tensor.cpu().contiguous()
    if value.untyped_storage().nbytes() != value.nbytes:
        value = value.clone()  # a part of a larger storage: safetensors would refuse it or write all of it
    return value if value.dtype in _PLAIN else value.reshape(-1).view(torch.uint8)


def _decoded(value: Tensor, entry: Fields, name: str) -> Tensor:
    dtype, shape = getattr(torch, entry.text("dtype"), None), list(entry.value("shape").integers(low=0))
    if not isinstance(dtype, torch.dtype):
        raise entry.value("dtype").refused("a type of numbers")
    if value.dtype is torch.uint8 and dtype not in _PLAIN and value.numel() != math.prod(shape) * dtype.itemsize:
        raise BadInput(f"the tensor {name!r} does not fit its manifest", f"{value.numel()} bytes for {shape}")
    if dtype not in _PLAIN and value.dtype is torch.uint8 and value.numel() % dtype.itemsize == 0:
        value = value.view(dtype)
    if value.dtype is not dtype or (dtype in _PLAIN and list(value.shape) != shape):
        why = f"the file has {value.dtype} {list(value.shape)}, the manifest {dtype} {shape}"
        raise BadInput(f"the tensor {name!r} does not fit its manifest", why)
    return value.reshape(shape)


def _check_fit(own: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> None:
    missing, extra = own.keys() - stored.keys(), stored.keys() - own.keys()
    if missing or extra:
        name = sorted(missing or extra)[0]
        why = f"{len(missing)} tensors are missing and {len(extra)} are unknown, for example {name!r}"
        raise BadInput("the artifact does not fit the rebuilt model", why, "give the factory it was made with")
    for name, value in stored.items():
        if own[name].shape != value.shape:
            why = f"{name} is {list(value.shape)} in the file and {list(own[name].shape)} in the model"
            raise BadInput("the artifact does not fit the rebuilt model", why, "give the factory it was made with")


def _check_complete(model: nn.Module) -> None:
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.is_meta:
            raise BadInput(f"the artifact holds no values for {name!r}", "", "give the factory it was made with")


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    try:
        return model.get_submodule(path), leaf
    except AttributeError:
        raise BadInput(f"the artifact has {name!r}", "the rebuilt model has no such module") from None


def _tie(model: nn.Module, alias: str, name: str) -> None:
    (owner, leaf), (source, key) = _place(model, alias), _place(model, name)
    if leaf in owner._parameters and key in source._parameters:
        owner._parameters[leaf] = source._parameters[key]
    elif leaf in owner._buffers and key in source._buffers:
        owner._buffers[leaf] = source._buffers[key]
