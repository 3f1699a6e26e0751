"""Files of checkpoints as mappings of tensors: safetensors, or torch files as tensors only where that is allowed."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from prunella.errors import BadInput, NotSupported, RequestError
from prunella.io.importers.imported import State

Source = State | nn.Module | str | os.PathLike[str]
_LARGEST_CONFIG = 10_000_000


def read_source(source: Source, *, allow_pickle: bool = False) -> State:
    """A mapping as it is, all tensors of a module, or what is in a file or folder.

    Errors: BadInput for a file that is broken or not to be trusted, RequestError for something else altogether.
    """
    if isinstance(source, nn.Module):
        # Not its state dict, which leaves the masks of torch.ao out.
        named = [*source.named_parameters(remove_duplicate=False), *source.named_buffers(remove_duplicate=False)]
        return {name: value.detach() for name, value in named}
    if isinstance(source, Mapping):
        return source
    if not isinstance(source, str | os.PathLike):
        todo = "give a module, a state dict, a file or a folder"  # type: ignore[unreachable]
        raise RequestError(f"a {type(source).__name__} cannot be imported", "it is no checkpoint", todo)
    path = Path(source)
    if path.is_dir():
        return _folder(path)
    if not path.is_file():
        raise BadInput(f"there is no checkpoint at {path}", "no such file or folder", "give the file with the weights")
    return _safetensors(path) if path.suffix == ".safetensors" else _torch(path, allow_pickle=allow_pickle)


def _folder(folder: Path) -> State:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise BadInput(f"{folder} has no weights", "no *.safetensors file in it", "give the folder with the weights")
    state: dict[str, Any] = {}
    for file in files:
        part = _safetensors(file)
        twice = next((name for name in part if name in state), None)
        if twice:
            raise BadInput(f"{folder} holds {twice} twice", f"once more in {file.name}", "leave one of the files")
        state |= part
    config = folder / "config.json"
    if config.is_file():
        try:
            if config.stat().st_size > _LARGEST_CONFIG:
                raise ValueError("too large")
            state["config"] = json.loads(config.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise BadInput(f"{config} cannot be read", f"{type(error).__name__}: {error}") from error
    return state


def _safetensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise BadInput(f"cannot read {file}", f"truncated or damaged: {error}", "fetch or write it again") from error


def _torch(file: Path, *, allow_pickle: bool) -> State:
    if not allow_pickle:
        why = f"{file.suffix or 'this'} is no safetensors file; a pickle can run code when read"
        todo = "convert it, or allow it (--allow-pickle, allow_pickle=True): tensors and plain data only are read"
        raise BadInput(f"refused to read {file}", why, todo)
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler raises whatever a broken file makes it raise
        why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise BadInput(f"cannot read {file} as tensors", why, "save model.state_dict(), not the model") from error
    if not isinstance(found, Mapping):
        raise NotSupported(f"{file} holds a {type(found).__name__}", "a mapping of tensors is needed")
    return found
