"""Models outside torchvision, timm and transformers: those of `wild_models`, with random weights.

The packages are not those of the project: `pip install --target FOLDER --no-deps` of what the models name, and
`PYTHONPATH=...:FOLDER`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from contextlib import suppress
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn
from wild_models import MODELS, Make

from prunella.io.load import import_module


def names() -> list[str]:
    """The models, package after package."""
    return list(MODELS)


def build(name: str) -> tuple[nn.Module, Any]:
    """The model with random weights in eval mode, and its inputs."""
    warnings.simplefilter("ignore")
    import_module("torchvision")  # some packages import it themselves, and it needs its operators first
    torch.manual_seed(0)
    how, shapes = MODELS[name]
    model: nn.Module = made(how)
    inputs = tuple(tensor for shape in shapes.split() for tensor in [_tensor(shape)])
    return model.eval(), inputs if len(inputs) > 1 else inputs[0]


def load(patterns: Iterable[str]) -> None:
    """Import what these models need, once for all processes; what fails here fails again in its model."""
    for name, (how, _) in MODELS.items():
        if any(fnmatch(name, pattern) for pattern in patterns):
            with suppress(Exception):
                import_module("torchvision")
                import_module(how.path.partition(":")[0])


def made(value: Any) -> Any:
    """What a `Make` describes; any other value itself."""
    if not isinstance(value, Make):
        return value
    module, _, name = value.path.partition(":")
    made_here: Any = import_module(module)
    for part in name.split("."):
        made_here = getattr(made_here, part)
    return made_here(*map(made, value.args), **{key: made(entry) for key, entry in value.kwargs.items()})


def _tensor(shape: str) -> Tensor:
    if shape.startswith("e"):
        return torch.randint(20, (2, int(shape[1:])))
    sizes, _, below = shape.partition("<")
    axes = [int(size) for size in sizes.split("x")]
    return torch.randint(int(below), axes) if below else torch.randn(axes)
