"""A model of transformers without weights: built from its configuration, loaded and unloaded module by module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from prunella.errors import BadInput, NotSupported
from prunella.io.load import class_of, import_transformers
from prunella.io.tensor_file import StoredTensor
from prunella.llm.streaming.conversion import Converted, Files
from prunella.model.device import CPU
from prunella.model.rng import seeded
from prunella.model.trees import each, tensors
from prunella.model.user_code import call_user


class _EmptyOnMeta(TorchFunctionMode):
    """Tensors of `torch.empty`, which become weights, are on the meta device; those with values (masks) are real."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func is torch.empty and given.get("device") is None:
            given["device"] = "meta"
        return func(*args, **given)


class Skeleton:
    """The model, and the place of each stored tensor. Tied tensors remain tied, under any of their names in the files.

    aliases: all names of a tensor. like: tensors on the meta device by name. persistent: names in the state dict.
    used: names of the tensors that were loaded by `on_demand`. virtual: the folder has a configuration alone; modules
    outside the blocks then return zeros.
    """

    def __init__(self, folder: Path, stored: Mapping[str, StoredTensor] | None) -> None:
        self.model, self.virtual = _built(folder), stored is None
        named = dict(_named(self.model))
        groups: dict[int, list[str]] = {}
        for name, tensor in named.items():
            groups.setdefault(id(tensor), []).append(name)
        self.aliases = {name: tuple(groups[id(tensor)]) for name, tensor in named.items()}
        self.like = {name: tensor.detach().to("meta") for name, tensor in named.items()}
        self.persistent = frozenset(self.model.state_dict(keep_vars=True)) & named.keys()
        self.files = Files(self.model, self._of_configuration(folder) if stored is None else stored)
        self.stored = self.files.stored
        self.used: set[str] = set()
        self._check(folder)
        self.unload_(self.persistent)

    def _of_configuration(self, folder: Path) -> dict[str, StoredTensor]:
        """The tensors that a folder with weights would have, each once."""
        once = {self.aliases[name][0] for name in self.persistent}
        likes = {name: self.like[name] for name in self.like if name in once}
        return {
            name: StoredTensor(folder, like.dtype, tuple(like.shape), 0, like.numel() * like.element_size())
            for name, like in likes.items()
        }

    def _check(self, folder: Path) -> None:
        missing = sorted(n for n in self.persistent if self.source_of(n) is None)
        if missing:
            why = f"{len(missing)} of its tensors are not in the files under their names: {', '.join(missing[:3])}"
            raise NotSupported(f"{folder} cannot be read block by block", why, "load the full model, and use solve_")
        for name, like in self.like.items():
            source = self.source_of(name)
            if name in self.persistent and source is not None and source.shape != tuple(like.shape):
                why = f"{name} is {source.shape} in the file and {tuple(like.shape)} in the model"
                raise BadInput(f"the weights in {folder} do not fit its config.json", why, "fetch the folder again")
        virtual = [name for name, buffer in self._constants() if buffer.device.type == "meta"]
        if virtual:
            why = f"{virtual[0]} is in no file, and the constructor gives it no values"
            raise NotSupported(f"{folder} cannot be read block by block", why, "load the full model, and use solve_")

    def source_of(self, name: str) -> StoredTensor | Converted | None:
        """Where the tensor of this name, or of one of its aliases, is stored."""
        return next((self.stored[alias] for alias in self.aliases[name] if alias in self.stored), None)

    def names_in(self, path: str) -> list[str]:
        """Names of the stored tensors of a module."""
        return [name for name in self.like if name in self.persistent and name.startswith(f"{path}.")]

    def around(self) -> list[StoredTensor | Converted]:
        """The stored tensors that were loaded for the modules outside the blocks."""
        return [source for name in sorted(self.used) if (source := self.source_of(name)) is not None]

    def converted(self, names: Iterable[str]) -> int:
        """Bytes of the largest of these tensors that is converted from others when it is read."""
        sources = map(self.source_of, names)
        return max((source.size for source in sources if isinstance(source, Converted)), default=0)

    def values(self, names: Iterable[str]) -> dict[str, Tensor]:
        """These tensors with their current values, under the names and in the layout of the files."""
        return self.files.written(
            {name: _slots(self.model, name)[_leaf(name)].detach().cpu() for name in names if name in self.stored}
        )

    @contextmanager
    def loaded(
        self, path: str, device: torch.device, shard: Mapping[str, StoredTensor] | None = None
    ) -> Iterator[list[str]]:
        """Inside, the tensors of this module are on a device; yields the names of those that are stored."""
        names = self.names_in(path)
        constants = {name: tensor for name, tensor in self._constants() if name.startswith(f"{path}.")}
        try:
            self.load_(names, shard, device)
            for name, tensor in constants.items():
                self._place(name, tensor.to(device))
            yield names
        finally:
            self.unload_(names)
            for name, tensor in constants.items():
                self._place(name, tensor)

    def _constants(self) -> Iterator[tuple[str, Tensor]]:
        """The buffers that are in no file: the constructor gives them their values."""
        yield from ((name, tensor) for name, tensor in _named(self.model) if name not in self.persistent)

    def load_(
        self, names: Iterable[str], shard: Mapping[str, StoredTensor] | None = None, device: torch.device = CPU
    ) -> None:
        """Read these tensors, from `shard` where it has them, and set each of them under all its names."""
        other = self.files.read(shard)[0] if shard else {}
        for name in names:
            source = next((other[alias] for alias in self.aliases[name] if alias in other), None)
            source = source or self.source_of(name)
            if source is not None:
                self._place(name, source.read().to(device))

    def unload_(self, names: Iterable[str]) -> None:
        """Free the memory of these tensors."""
        for name in names:
            self._place(name, self.like[name])

    def _place(self, name: str, value: Tensor) -> None:
        is_parameter = isinstance(_slots(self.model, name)[_leaf(name)], nn.Parameter)
        tensor = nn.Parameter(value, requires_grad=value.is_floating_point()) if is_parameter else value
        for alias in self.aliases[name]:
            _slots(self.model, alias)[_leaf(alias)] = tensor

    @contextmanager
    def on_demand(self, blocks: Iterable[str]) -> Iterator[None]:
        """Inside, modules outside the blocks are loaded when they first run, and unloaded at the end."""
        inside = tuple(f"{path}." for path in blocks)
        used: list[str] = []
        if self.virtual:
            with self._zeros_around(inside, used):
                yield
            self.used |= set(used)
            return

        def enter(prefix: str) -> Callable[[nn.Module, Any, Any], None]:
            def load(module: nn.Module, args: Any, kwargs: Any) -> None:
                if any(_is_empty(t) for t in tensors([list(args), kwargs])):
                    return  # after the last block, on the meta device
                slots = {**module._parameters, **module._buffers}
                names = [f"{prefix}.{leaf}" if prefix else leaf for leaf, t in slots.items() if _is_empty(t)]
                used.extend(names)
                self.load_(names)

            return load

        handles = [
            module.register_forward_pre_hook(enter(path), with_kwargs=True)
            for path, module in self.model.named_modules()
            if not f"{path}.".startswith(inside)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self.unload_(used)
            self.used |= set(used)

    @contextmanager
    def _zeros_around(self, inside: tuple[str, ...], used: list[str]) -> Iterator[None]:
        """Inside, modules outside the blocks that have weights run on the meta device, and return zeros."""
        outside = [
            (path, module)
            for path, module in self.model.named_modules()
            if not f"{path}.".startswith(inside)
            and any(map(_is_empty, [*module._parameters.values(), *module._buffers.values()]))
        ]
        for path, module in outside:
            names = [f"{path}.{leaf}" if path else leaf for leaf in (*module._parameters, *module._buffers)]
            module.forward = partial(_zeros_of, module.forward, partial(used.extend, names))
        try:
            yield
        finally:
            for _, module in outside:
                del module.forward


def _zeros_of(forward: Callable[..., Any], note: Callable[[], None], *args: Any, **kwargs: Any) -> Any:
    """Zeros in the shape of the outputs; after the last block all is on the meta device, and stays there."""
    if any(_is_empty(tensor) for tensor in tensors([list(args), kwargs])):
        return forward(*args, **kwargs)
    note()
    there = each([list(args), kwargs], lambda tensor: tensor.to("meta"))
    return each(forward(*there[0], **there[1]), lambda tensor: torch.zeros_like(tensor, device="cpu"))


def _built(folder: Path) -> nn.Module:
    kind, transformers = class_of(folder), import_transformers()
    given = {"local_files_only": True, "trust_remote_code": False}
    config = call_user(transformers.AutoConfig.from_pretrained, str(folder), str(folder), **given)
    if getattr(config, "quantization_config", None):
        raise NotSupported(
            f"the weights in {folder} are quantized", "a block is solved in floating point", "dequantize them"
        )
    with seeded(None), _EmptyOnMeta():
        model = call_user(kind._from_config, str(folder), config)
    assert isinstance(model, nn.Module)
    return model.eval()


def _named(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _slots(model: nn.Module, name: str) -> Any:
    """The dictionary of its module that holds a parameter or buffer."""
    module = model.get_submodule(name.rpartition(".")[0])
    return module._parameters if _leaf(name) in module._parameters else module._buffers


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _is_empty(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.device.type == "meta"
