"""A model as a program captured by `torch.export`, in which all sizes can follow a cut."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from prunella.errors import CheckFailed, NotSupported
from prunella.graph.program.literals import module_of
from prunella.graph.verify import relative_error
from prunella.model.forward import outputs_of
from prunella.model.state import mode
from prunella.model.torch_masks import with_plain_weights
from prunella.model.trees import tensors

TOLERANCE = 1e-4
"""Largest allowed difference between a model and its program, relative to the largest output."""
_LOGGERS = ("torch.onnx", "onnxscript", "onnx_ir", "torch.export", "torch.fx.experimental.symbolic_shapes")


def as_program(model: nn.Module, inputs: Any) -> nn.Module:
    """The model as a graph module. Axes that literal sizes in the source keep dense can be cut in this module.

    `view(b, 12, 64)`, `split(x, 256)` or `x[:, :128]` have literal sizes in the source, and no cut can change source.
    In the program each such size is an integer attribute of the module, which follows the cut like any other.
    Parameters and buffers are those of the model (the same tensors, with the same names, ties and `requires_grad`).

    inputs: an example; any batch size, and any length of integer inputs, is accepted where the source allows it.
    The program computes the model in eval mode, for any value of its training flag: without dropout, and with running
    statistics in batch norms. It can be trained in this form. `save` and `export` store it as a .pt2 file.

    Errors: NotSupported if torch cannot capture the model, CheckFailed if the outputs of the program differ.

    Example:

        >>> import torch, prunella as pr
        >>> class Typed(torch.nn.Linear):
        ...     def forward(self, x):
        ...         return super().forward(x).view(2, 4, 2).sum(2)  # 4 and 2 are typed into the source
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), Typed(8, 8))
        >>> program = pr.as_program(model, torch.randn(2, 4))
        >>> sorted(pr.plan(program, torch.randn(2, 4), target=pr.Params(0.5)).keep)
        ['0']
    """
    model = with_plain_weights(model)
    with mode(model, training=False), quiet():
        with torch.no_grad():
            expected = outputs_of(model, inputs)
        with torch.enable_grad():  # otherwise parts of the source without gradients are not distinguished
            program = module_of(capture(model, inputs)[0])
        with torch.no_grad():
            error = relative_error(expected, outputs_of(program, inputs))
    if not error <= TOLERANCE:
        why, todo = f"relative error {error:.1e}", "please report the model"
        raise CheckFailed("the program does not compute what the model computes", why, todo)
    return program


def capture(model: nn.Module, example: Any) -> tuple[Any, bool]:
    """The exported program, and whether it accepts any batch size."""
    wide = _resized(example, 2)
    if wide is not None:
        for free_axes in (_free_words, _free_batch):
            try:
                program = _capture(model, wide, tree_map(free_axes, _arguments(wide)[0] or _arguments(wide)[1]))
                if _batch_free(program, model, example):
                    return program, True
            except NotSupported:
                pass  # the model has fixed sizes
    return _capture(model, example, None), False


def _arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, Mapping):
        return (), dict(example)
    return (example if isinstance(example, tuple) else (example,)), {}


def _capture(model: nn.Module, example: Any, shapes: Any) -> Any:
    args, kwargs = _arguments(example)
    try:
        with redirect_stderr(io.StringIO()):  # on failure it prints the full graph
            return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch.export has no one error type
        line = str(error).strip().splitlines()[0] if str(error).strip() else ""
        todo = "export needs a forward without branches on values; safetensors always works"
        raise NotSupported("torch.export cannot capture this model", f"{type(error).__name__}: {line}", todo) from error


def _batch_free(program: Any, model: nn.Module, example: Any) -> bool:
    """Whether the program equals the model for batches of 1 and 3 too; it was captured with 2."""
    module = program.module()
    for size in (1, 3):
        batch = _resized(example, size)
        try:
            if not relative_error(outputs_of(model, batch), outputs_of(module, batch)) <= TOLERANCE:
                return False
        except (RuntimeError, AssertionError, ValueError):
            return False
    return True


def _resized(example: Any, size: int) -> Any:
    """The example with `size` items in its batch, or None when its tensors do not share a first dimension."""
    batched = tensors(example)
    first = {t.shape[0] if t.dim() else 0 for t in batched}
    if len(first) != 1 or 0 in first:
        return None
    return tree_map(lambda v: torch.cat([v[:1]] * size) if isinstance(v, Tensor) else v, example)


def _free_batch(value: Any) -> Any:
    return {0: torch.export.Dim.AUTO} if isinstance(value, Tensor) else None


def _free_words(value: Any) -> Any:
    """Free axes: the batch, and the length of integer inputs."""
    if isinstance(value, Tensor) and not value.is_floating_point():
        return dict.fromkeys(range(value.dim()), torch.export.Dim.AUTO)
    return _free_batch(value)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence warnings and logs of torch's exporters about their internals."""
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
