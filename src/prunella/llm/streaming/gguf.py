"""Whether a converter to GGUF can read a folder."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from prunella.errors import BadInput
from prunella.io.json import read_config
from prunella.io.tensor_file import read_folder

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def gguf_obstacle(folder: str | Path) -> str:
    """Why a converter to GGUF would refuse the folder, in one sentence; empty if no reason is known.

    Checked: all blocks have tensors of the same names and shapes (GGUF has one width for all blocks), dtypes are
    float32, float16 or bfloat16, and the folder has a config.json and a tokenizer. Not checked: whether the converter
    supports the architecture.
    """
    place = Path(folder)
    blocks: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, stored in read_folder(place).items():
        if stored.dtype not in _FLOATS:
            return f"{name} is {str(stored.dtype).removeprefix('torch.')}, and converters take float tensors only"
        if match := re.match(r"(.*?\.\d+)\.(.*)", name):
            blocks.setdefault(match[1], {})[match[2]] = stored.shape
    first = next(iter(blocks.items()), ("", {}))
    for path, shapes in blocks.items():
        if path.rpartition(".")[0] == first[0].rpartition(".")[0] and shapes != first[1]:
            odd = min(key for key in shapes.keys() | first[1].keys() if shapes.get(key) != first[1].get(key))
            return f"{path}.{odd} is {shapes.get(odd)} and {first[0]}.{odd} is {first[1].get(odd)}: one width is needed"
    try:
        named = bool(read_config(place / "config.json").list_of("architectures"))
    except BadInput:
        named = False
    if not named:
        return "config.json names no architecture"
    return "" if any(place.glob("tokenizer*")) else "it has no tokenizer"
