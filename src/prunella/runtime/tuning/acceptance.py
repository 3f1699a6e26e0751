"""The whole model with its layers replaced, against the dense one: the same output, and faster?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from prunella.errors import CheckFailed
from prunella.graph.verify import relative_error
from prunella.measure.timing import Comparison, Ratio, compare_latency, own_clock
from prunella.model.forward import forward, tensors
from prunella.runtime.fx.fuse import channels_last_, copied
from prunella.runtime.kernels.convolution import is_last
from prunella.runtime.kernels.library import Precision
from prunella.runtime.layers import SparseConv2d
from prunella.types import Inputs

TOLERANCE = {Precision.FP32: 1e-3, Precision.BF16: 0.1, Precision.INT8: 0.3}
"""Largest difference of two outputs, relative to their largest number."""


def compared(
    dense: nn.Module, made: nn.Module, example: Inputs, precision: Precision, *, elsewhere: bool
) -> tuple[Ratio, float, str]:
    """Speed and difference against the dense model, and why the layers should not be kept, or nothing.

    elsewhere: whether layers win for sizes that the example does not bring. Errors: CheckFailed if the output differs.
    """
    with torch.inference_mode():
        difference = relative_error(tensors(forward(dense, example)), tensors(forward(made, example)))
        if not difference <= TOLERANCE[precision]:
            why = f"by {difference:.1e} of the largest, {TOLERANCE[precision]:g} is allowed"
            raise CheckFailed("the output of the sparse model differs", why, "report this with the model's name")
    ratio = faster(dense, made, example)
    if ratio.faster or (elsewhere and not ratio.slower and ratio.value > 0.97):
        return ratio, difference, ""
    return ratio, difference, f"the whole model stays dense: {ratio.verdict} on the example"


def last(program: GraphModule | None, example: Inputs) -> bool:
    """Whether images can run with their channels as the last axis, or come like that: so are their layers measured.

    program: the trace of the model, changed here.
    """
    images = [part for part in tensors(example) if part.dim() == 4]
    if any(is_last(part) for part in images):
        return True
    return bool(images) and program is not None and channels_last_(program)


def turned(made: nn.Module, example: Inputs) -> tuple[nn.Module, bool]:
    """The model with the channels of its images as the last axis, if it was traced and that is faster.

    More likely than not is enough: its layers were measured so, and either one has yet to win against the dense model.
    """
    if not isinstance(made, GraphModule) or not any(isinstance(m, SparseConv2d) for m in made.modules()):
        return made, False
    twin = copied(made)
    assert isinstance(twin, GraphModule)  # a copy of one
    if not channels_last_(twin) or not faster(made, twin, example).value > 1:
        return made, False
    with torch.inference_mode():
        difference = relative_error(tensors(forward(made, example)), tensors(forward(twin, example)))
    return (twin, True) if difference <= TOLERANCE[Precision.FP32] else (made, False)


def faster(dense: nn.Module, made: nn.Module, example: Inputs) -> Ratio:
    """How much quicker the second is than the first on an example."""
    with torch.inference_mode():
        return interleaved({"dense": partial(forward, dense, example), "sparse": partial(forward, made, example)}).ratio


def interleaved(runs: Mapping[str, Callable[[], object]], *, seconds: float = 4.0) -> Comparison:
    """A comparison of at least 9 rounds, and of more while a call is quick."""
    clock = own_clock()
    start = clock()
    for run in runs.values():
        run()
    once = clock() - start
    return compare_latency(runs, rounds=min(41, max(9, round(seconds / max(once, 1e-3)))), warmup=1, clock=clock)


def first_token(part: Any) -> Any:
    """The first position of the first two axes of every tensor in an example."""
    if isinstance(part, Tensor):
        return part[:1, :1] if part.dim() > 1 else part[:1] if part.dim() else part
    if isinstance(part, Mapping):
        return {name: first_token(value) for name, value in part.items()}
    return type(part)(map(first_token, part)) if isinstance(part, tuple | list) else part
