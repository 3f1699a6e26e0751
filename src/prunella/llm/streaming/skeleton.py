"""A model of transformers without its weights: built from the configuration, filled and emptied module by module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from prunella.errors import BadInput, NotSupported
from prunella.io.load import call_user, class_of, import_transformers
from prunella.llm.streaming.conversion import Converted, Files
from prunella.llm.streaming.shards import Stored
from prunella.model.forward import tensors


class _NothingInEmpty(TorchFunctionMode):
    """`torch.empty`, which weights are made of, takes no memory; what has values (rotary tables, masks) is real."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func is torch.empty and given.get("device") is None:
            given["device"] = "meta"
        return func(*args, **given)


class Skeleton:
    """The model, and where each of its tensors lies. Ties stay ties, whichever of the names the files have."""

    def __init__(self, folder: Path, stored: Mapping[str, Stored]) -> None:
        self.model = _built(folder)
        named = dict(_named(self.model))
        groups: dict[int, list[str]] = {}
        for name, tensor in named.items():
            groups.setdefault(id(tensor), []).append(name)
        self.aliases = {name: tuple(groups[id(tensor)]) for name, tensor in named.items()}
        self.like = {name: tensor.detach().to("meta") for name, tensor in named.items()}
        self.persistent = frozenset(self.model.state_dict(keep_vars=True)) & named.keys()
        self.files = Files(self.model, stored)
        self.stored = self.files.stored
        self.used: set[str] = set()
        self._check(folder)
        self.empty_(self.persistent)

    def _check(self, folder: Path) -> None:
        missing = sorted(n for n in self.persistent if self.source_of(n) is None)
        if missing:
            why = f"{len(missing)} of its tensors are not in the files under their names: {', '.join(missing[:3])}"
            raise NotSupported(f"{folder} cannot be read block by block", why, "load it whole, and use solve_")
        for name, like in self.like.items():
            found = self.source_of(name)
            if name in self.persistent and found is not None and found.shape != tuple(like.shape):
                why = f"{name} is {found.shape} in the file and {tuple(like.shape)} in the model"
                raise BadInput(f"the weights in {folder} do not fit its config.json", why, "fetch the folder again")
        virtual = [n for n, b in _named(self.model) if b.device.type == "meta" and n not in self.persistent]
        if virtual:
            why = f"{virtual[0]} is in no file, and its constructor leaves it empty"
            raise NotSupported(f"{folder} cannot be read block by block", why, "load it whole, and use solve_")

    def source_of(self, name: str) -> Stored | Converted | None:
        """Where the tensor of this name, or one that it is tied to, lies."""
        return next((self.stored[alias] for alias in self.aliases[name] if alias in self.stored), None)

    def names_in(self, path: str) -> list[str]:
        """Names of the stored tensors of a module."""
        return [name for name in self.like if name in self.persistent and name.startswith(f"{path}.")]

    def around(self) -> list[Stored | Converted]:
        """What was read for the modules outside the blocks when they ran."""
        return [found for name in sorted(self.used) if (found := self.source_of(name)) is not None]

    def converted(self, names: Iterable[str]) -> int:
        """Bytes of the largest of these tensors that is made of others when it is read."""
        sources = map(self.source_of, names)
        return max((found.size for found in sources if isinstance(found, Converted)), default=0)

    def values(self, names: Iterable[str]) -> dict[str, Tensor]:
        """These tensors as they are now, each under the names and in the pieces that the files have for it."""
        return self.files.written(
            {name: _slots(self.model, name)[_leaf(name)].detach() for name in names if name in self.stored}
        )

    def fill_(self, names: Iterable[str], shard: Mapping[str, Stored] | None = None) -> None:
        """Read these tensors, from `shard` where it has them, and put each wherever it is used."""
        other = self.files.read(shard)[0] if shard else {}
        for name in names:
            source = next((other[alias] for alias in self.aliases[name] if alias in other), None)
            source = source or self.source_of(name)
            if source is not None:
                self._place(name, source.read())

    def empty_(self, names: Iterable[str]) -> None:
        """Let the memory of these tensors go."""
        for name in names:
            self._place(name, self.like[name])

    def _place(self, name: str, value: Tensor) -> None:
        is_parameter = isinstance(_slots(self.model, name)[_leaf(name)], nn.Parameter)
        made = nn.Parameter(value, requires_grad=value.is_floating_point()) if is_parameter else value
        for alias in self.aliases[name]:
            _slots(self.model, alias)[_leaf(alias)] = made

    @contextmanager
    def on_demand(self, blocks: Iterable[str]) -> Iterator[None]:
        """Inside, modules outside the blocks are filled when they run, and emptied at the end."""
        inside = tuple(f"{path}." for path in blocks)
        used: list[str] = []

        def enter(prefix: str) -> Callable[[nn.Module, Any, Any], None]:
            def fill(module: nn.Module, args: Any, kwargs: Any) -> None:
                if any(_is_empty(t) for t in tensors([list(args), kwargs])):
                    return  # past the last block, where nothing has values
                slots = {**module._parameters, **module._buffers}
                names = [f"{prefix}.{leaf}" if prefix else leaf for leaf, t in slots.items() if _is_empty(t)]
                used.extend(names)
                self.fill_(names)

            return fill

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
            self.empty_(used)
            self.used |= set(used)


def _built(folder: Path) -> nn.Module:
    kind, transformers = class_of(folder), import_transformers()
    config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    if getattr(config, "quantization_config", None):
        raise NotSupported(f"the weights in {folder} are quantised", "a block is solved in floating point", "undo it")
    with torch.random.fork_rng(devices=[]), _NothingInEmpty():
        model = call_user(kind._from_config, str(folder), config)
    assert isinstance(model, nn.Module)
    return model.eval()


def _named(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _slots(model: nn.Module, name: str) -> Any:
    """The mapping of its module that holds a parameter or buffer."""
    module = model.get_submodule(name.rpartition(".")[0])
    return module._parameters if _leaf(name) in module._parameters else module._buffers


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _is_empty(tensor: Tensor | None) -> bool:
    return tensor is not None and tensor.device.type == "meta"
