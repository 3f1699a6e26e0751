"""Int8 weights in memory by torchao, with a check that zeros are preserved."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunella.compress.quantize import Rounded, compare
from prunella.errors import MissingExtra, NotSupported
from prunella.measure.text import byte_size
from prunella.model.memory import stored_size
from prunella.model.unwrap import unwrap
from prunella.registry.method import compression


@dataclass(frozen=True)
class Int8:
    """The weights in int8. before, after: bytes of all parameters and buffers. Measure time with `compare_latency`."""

    layers: tuple[Rounded, ...]
    before: int
    after: int

    def __str__(self) -> str:
        head = f"{len(self.layers)} weights in int8, {byte_size(self.before)} -> {byte_size(self.after)}"
        return "\n".join([head, *map(str, self.layers)])


@compression(source="torchao, quantize_ (PyTorch); Krishnamoorthi 2018, arXiv:1806.08342")
def to_int8_(model: nn.Module, *, activations: bool = False) -> Int8:
    """Convert the weights of all linear layers to int8 with a scale for each output, in place, by torchao.

    The format is symmetric, so that zero is code 0: masks, N:M patterns and blocks persist. This is checked for every
    weight. The result has the real bytes and the rounding errors. `compare_latency` measures the speed; on many CPUs
    int8 is not faster. Convolutions and embeddings do not change.

    activations: quantize the inputs of each layer too, by the largest value of each token at run time.

    `MissingExtra` without torchao; `NotSupported` if its import fails or it finds nothing to quantize. The model can
    then be neither saved by `save` nor trained.

    Data: none.

    Use: the last step for transformers, for a quarter of the memory. Avoid: before pruning or training.
    """
    config, quantize_ = _torchao(activations)
    bare = unwrap(model)
    dense = {n: p.detach().clone() for n, p in bare.named_parameters() if p.dim() == 2}
    before = stored_size(bare)
    with _quiet():
        quantize_(bare, config)
    rows = []
    for name, parameter in bare.named_parameters():
        if isinstance(getattr(parameter, "qdata", None), Tensor):
            value: Any = parameter
            rows.append(compare(name, dense[name], value.dequantize().detach(), 8))
    if not rows:
        raise NotSupported(
            "nothing was quantized", "torchao looks for nn.Linear, and the model has none", "see round_weights_"
        )
    return Int8(tuple(rows), before, stored_size(bare))


def _torchao(activations: bool) -> tuple[Any, Any]:
    if importlib.util.find_spec("torchao") is None:
        raise MissingExtra("int8 weights need torchao", "it is not installed", "pip install 'prunella[torchao]'")
    try:
        with _quiet():
            ao: Any = importlib.import_module("torchao.quantization")
            config = ao.Int8DynamicActivationInt8WeightConfig() if activations else ao.Int8WeightOnlyConfig()
        return config, ao.quantize_
    except Exception as error:  # a build for another torch fails in many ways
        raise NotSupported(
            "torchao does not work here",
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}",
            f"install a version for torch {torch.__version__}; round_weights_ needs none",
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress warnings and log lines during the import of torchao: most are about parts for GPUs."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
