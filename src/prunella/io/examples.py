"""Example inputs: read from text such as `1x3x224x224`, or taken from the model's own description."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prunella.errors import BadInput, RequestError
from prunella.io.exported import load_exported
from prunella.model.forward import forward
from prunella.model.trees import tensors
from prunella.model.user_code import advice_on, call_user

Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]
_SHAPE = re.compile(r"(?:([A-Za-z_]\w*)=)?(\d+(?:x\d+)*)(?::([a-z]+\d*))?")
_DTYPES = {
    "float": torch.float32,
    "float32": torch.float32,
    "float64": torch.float64,
    "double": torch.float64,
    "float16": torch.float16,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
    "int": torch.int64,
    "int64": torch.int64,
    "long": torch.int64,
    "int32": torch.int32,
    "uint8": torch.uint8,
    "bool": torch.bool,
}


def example_inputs(model: nn.Module, spec: str, shapes: Sequence[str] | None = None, *, seed: int = 0) -> Inputs:
    """Inputs to trace the model with: from `shapes`, or from the description of the model or its file.

    One unnamed shape gives a tensor, several a tuple, named ones a mapping of keyword arguments. Floating inputs are
    normal noise; integers are indices that fit the smallest embedding of the model.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = [part for text in shapes or () for part in text.split(",") if part]
    if parts:
        return _from_shapes(parts, _index_limit(model), generator)
    example = _own_example(model, spec, generator)
    if example is None:
        todo = f"give --inputs, for example --inputs {shape_for(model)}"
        raise RequestError(f"no example input for {spec}", "the model does not describe its inputs", todo)
    return example


def _from_shapes(parts: Sequence[str], limit: int, generator: torch.Generator) -> Inputs:
    read = [_read_shape(part) for part in parts]
    named = [name for name, _, _ in read if name]
    values = [_fill(shape, dtype, limit, generator) for _, shape, dtype in read]
    if not named:
        return values[0] if len(values) == 1 else tuple(values)
    if len(named) < len(read) or len(set(named)) < len(named):
        raise RequestError(
            "cannot mix these inputs",
            "name all of them, each once, or none",
            "for example --inputs a=1x8 --inputs b=1x8",
        )
    return dict(zip(named, values, strict=True))


def _read_shape(text: str) -> tuple[str, tuple[int, ...], torch.dtype]:
    match = _SHAPE.fullmatch(text.strip())
    if not match or (match[3] and match[3] not in _DTYPES):
        why = f"an input is [NAME=]SIZExSIZE[:DTYPE], with DTYPE one of {', '.join(_DTYPES)}"
        raise RequestError(f"cannot read the input {text!r}", why, "for example --inputs 1x3x224x224")
    shape = tuple(int(size) for size in match[2].split("x"))
    if 0 in shape:
        raise RequestError(f"the input {text!r} is empty", "a size is 0", "give sizes of at least 1")
    return match[1] or "", shape, _DTYPES[match[3] or "float32"]


def _fill(shape: tuple[int, ...], dtype: torch.dtype, limit: int, generator: torch.Generator) -> Tensor:
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator, device="cpu").to(dtype)
    if dtype is torch.bool:
        return torch.ones(shape, dtype=dtype, device="cpu")
    return torch.randint(0, limit, shape, generator=generator, device="cpu").to(dtype)


def _index_limit(model: nn.Module) -> int:
    """Indices below this fit every embedding table of the model."""
    sizes = [module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)]
    return max(1, min([*sizes, 256]))


def _own_example(model: nn.Module, spec: str, generator: torch.Generator) -> Inputs | None:
    if spec.endswith(".pt2"):
        return load_exported(Path(spec))[1]
    return _image_of(model, spec, generator) or _of_config(model, generator)


def _image_of(model: nn.Module, spec: str, generator: torch.Generator) -> Inputs | None:
    """timm models carry `pretrained_cfg`; torchvision's classification networks all take 224 x 224."""
    size = getattr(model, "pretrained_cfg", {}).get("input_size") if spec.startswith("timm:") else None
    if spec.startswith(("torchvision:", "torchvision.models:")):
        size = (3, 224, 224)
    return (torch.randn((1, *size), generator=generator, device="cpu"),) if size else None


def _of_config(model: nn.Module, generator: torch.Generator) -> Inputs | None:
    """Inputs of a Hugging Face model: it has the name of its main input; its config has the sizes."""
    name, config = getattr(model, "main_input_name", None), getattr(model, "config", None)
    if config is None or name is None:
        return None
    if name == "pixel_values" and hasattr(config, "image_size"):
        size = config.image_size
        height, width = size if isinstance(size, Sequence) else (size, size)
        return {
            name: torch.randn((1, getattr(config, "num_channels", 3), height, width), generator=generator, device="cpu")
        }
    if name == "input_ids" and hasattr(config, "vocab_size"):
        return {name: torch.randint(0, config.vocab_size, (1, 16), generator=generator, device="cpu")}
    return None


_WEIGHTED = (
    nn.Linear,
    nn.modules.conv._ConvNd,
    nn.Embedding,
    nn.RNNBase,
    nn.LayerNorm,
    nn.modules.batchnorm._BatchNorm,
)


def _first_layer(model: nn.Module) -> tuple[str, nn.Module] | None:
    """The first layer, in the order of the modules, with a known input shape."""
    return next(((name, module) for name, module in model.named_modules() if isinstance(module, _WEIGHTED)), None)


def _first(model: nn.Module) -> str:
    found = _first_layer(model)
    return f"{found[0] or 'it'}, {' '.join(repr(found[1]).split())[:100]}" if found else "not known"


def shape_for(model: nn.Module) -> str:
    """A shape, as text, that the first layer of a model would accept: a guess for advice."""
    found = _first_layer(model)
    layer = found[1] if found else None
    if isinstance(layer, nn.Embedding):
        return (
            f"{getattr(model, 'main_input_name', None) or 'input_ids'}=1x16:int64"
            if hasattr(model, "config")
            else "1x16:int64"
        )
    if isinstance(layer, nn.modules.conv._ConvNd):
        axes = len(layer.kernel_size)
        size = {1: 128, 2: 224 if layer.in_channels == 3 else 32, 3: 16}[axes]
        return "x".join(map(str, (1, layer.in_channels, *[size] * axes)))
    if isinstance(layer, nn.Linear):
        return f"1x{layer.in_features}"
    if isinstance(layer, nn.RNNBase):
        return f"1x16x{layer.input_size}"
    if isinstance(layer, nn.LayerNorm):
        return "x".join(map(str, (1, *layer.normalized_shape)))
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        return f"2x{layer.num_features}"
    return "1x3x224x224"


def check_forward(model: nn.Module, inputs: Inputs) -> None:
    """Run the model once on the example, so that a wrong shape is reported first."""
    said = ", ".join(
        "x".join(map(str, tensor.shape)) + f":{str(tensor.dtype).removeprefix('torch.')}" for tensor in tensors(inputs)
    )
    try:
        with torch.no_grad():
            call_user(lambda: forward(model, inputs), "the model")
    except (BadInput, RequestError) as error:
        give = f"give inputs that the model takes, for example --inputs {shape_for(model)}"
        todo = advice_on(error.__cause__ or error, f"{give}: its first layer is {_first(model)}")
        raise BadInput(f"the model fails on the example input {said}", error.why, todo) from error
