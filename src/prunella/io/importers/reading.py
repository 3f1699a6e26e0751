"""Files of checkpoints as mappings of tensors: safetensors, or torch files as tensors only where that is allowed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from prunella.errors import BadInput, NotSupported, RequestError
from prunella.io.checkpoint import entry_of, read_pickled
from prunella.io.importers.imported import State
from prunella.io.json import read_config
from prunella.io.kind_of_path import described_path
from prunella.io.load import check_no_adapter
from prunella.io.state import load_tensors
from prunella.io.untrusted import check_links
from prunella.model.unwrap import unwrap

Source = State | nn.Module | str | os.PathLike[str]


def read_source(source: Source, *, key: str = "", allow_pickle: bool = False) -> State:
    """A mapping itself, all tensors of a module, or the contents of a file or folder; of these the entry `key`.

    Errors: BadInput for a file that is broken or unsafe, RequestError for a source of another type.
    """
    state = _whole(source, allow_pickle=allow_pickle)
    if not key:
        return state
    inner = entry_of(state, key, _called(source))
    if not isinstance(inner, Mapping):
        raise RequestError(f"the entry {key!r} holds no weights", f"it is a {type(inner).__name__}", "give another")
    return inner


def _called(source: Source) -> str:
    return str(source) if isinstance(source, str | os.PathLike) else "the checkpoint"


def _whole(source: Source, *, allow_pickle: bool) -> State:
    if isinstance(source, nn.Module):
        source = unwrap(source, computed=True)
        # Not its state dict, which leaves the masks of torch.ao out.
        named = [*source.named_parameters(remove_duplicate=False), *source.named_buffers(remove_duplicate=False)]
        return {name: value.detach() for name, value in named}
    if isinstance(source, Mapping):
        return source
    if not isinstance(source, str | os.PathLike):
        todo = "give a module, a state dict, a file or a folder"  # type: ignore[unreachable]
        raise RequestError(f"a {type(source).__name__} cannot be imported", "it is not a checkpoint", todo)
    path = Path(source)
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise BadInput(f"there is no checkpoint at {path}", described_path(path), "give the file with the weights")
    return load_tensors(path) if path.suffix == ".safetensors" else _torch(path, allow_pickle=allow_pickle)


def _folder(folder: Path) -> State:
    check_links(folder)
    check_no_adapter(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise BadInput(f"{folder} has no weights", "no *.safetensors file in it", "give the folder with the weights")
    state: dict[str, Any] = {}
    for file in files:
        part = load_tensors(file)
        twice = next((name for name in part if name in state), None)
        if twice:
            raise BadInput(f"{folder} holds {twice} twice", f"once more in {file.name}", "leave one of the files")
        state |= part
    config = folder / "config.json"
    if config.is_file():
        state["config"] = dict(read_config(config).data)
    return state


def _torch(file: Path, *, allow_pickle: bool) -> State:
    content = read_pickled(file, allow_pickle=allow_pickle)
    if not isinstance(content, Mapping):
        raise NotSupported(f"{file} holds a {type(content).__name__}", "a mapping of tensors is needed")
    return content
