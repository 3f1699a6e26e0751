"""timm: the smallest model of every family, where a family is one module of `timm.models`.

`python benchmarks/zoo/families.py` writes `families.json` anew: it counts the parameters of every model on the meta
device, which takes some minutes.
"""

from __future__ import annotations

import json
import warnings
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunella.io.load import import_module

LIST = Path(__file__).with_name("families.json")
SIZES = (64, 128, 224, 256)


@cache
def _timm() -> Any:
    warnings.simplefilter("ignore")
    return import_module("timm")


def names() -> list[str]:
    """The models of `families.json`."""
    return list(json.loads(LIST.read_text()).values())


def build(name: str) -> tuple[nn.Module, Any]:
    """The model with random weights, and two images of the smallest size that it takes."""
    torch.manual_seed(0)
    model = _timm().create_model(name, pretrained=False).eval()
    config = model.default_cfg
    channels, *usual = config["input_size"]
    sizes = [usual[0]] if config.get("fixed_input_size") else [s for s in SIZES if s < usual[0]] + [usual[0]]
    for size in sizes:
        example = torch.randn(2, channels, size, size)
        with suppress(Exception), torch.no_grad():
            if bool(torch.isfinite(model(example)).all()):
                return model, example
    raise RuntimeError(f"{name} takes none of the sizes {sizes}")


def smallest() -> dict[str, str]:
    """Family -> its model with the fewest parameters; of equals the one with the smaller image, then the name."""
    found = {}
    for family in _timm().list_modules():
        counted = []
        for name in _timm().list_models(module=family):
            with suppress(Exception), torch.device("meta"):
                model = _timm().create_model(name, pretrained=False)
                size = model.default_cfg["input_size"][-1]
                counted.append((sum(p.numel() for p in model.parameters()), size, name))
        if counted:
            found[family] = min(counted)[2]
    return found


if __name__ == "__main__":
    LIST.write_text(json.dumps(smallest(), indent=1) + "\n")
    print(f"{len(names())} families")
