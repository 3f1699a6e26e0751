"""Acceptance of the sparse model: its outputs have to agree with those of the dense model, and it has to be faster."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from prunella.errors import CheckFailed
from prunella.graph.verify import relative_error
from prunella.measure.timing import Comparison, Ratio, compare_latency, own_clock
from prunella.model.copying import frozen_copy
from prunella.model.device import devices_of, synchronize
from prunella.model.forward import forward, outputs_of
from prunella.model.trees import tensors
from prunella.runtime.fx.fuse import channels_last_
from prunella.runtime.kernels.config import Precision
from prunella.runtime.kernels.convolution import is_channels_last
from prunella.runtime.layers import SparseConv2d
from prunella.types import Inputs

TOLERANCE = {Precision.FP32: 1e-3, Precision.BF16: 0.1, Precision.INT8: 0.3}
"""The largest accepted difference of two outputs, relative to their largest value."""
_AS_FAST = 0.97
"""A lower ratio on the example is a loss that gains for other numbers of tokens do not compensate."""


@dataclass(frozen=True)
class Acceptance:
    """The sparse model against the dense one. why: why the model stays dense; empty if its layers were replaced.

    full_model: speed on the example. first_token: speed on its first token, where the example can be cut to that; if it
    is slower, dense code runs for a few tokens. difference: of the outputs, relative to the largest value.
    """

    why: str = ""
    full_model: Ratio | None = None
    first_token: Ratio | None = None
    difference: float = 0.0

    @property
    def kept(self) -> bool:
        """Whether the layers were replaced."""
        return not self.why


def judge(
    dense: nn.Module, sparse: nn.Module, example: Inputs, precision: Precision, *, gains_elsewhere: bool
) -> Acceptance:
    """Whether the sparse model is kept: on the example it is faster, or as fast and `gains_elsewhere`.

    gains_elsewhere: whether layers are faster for sizes that the example does not have. Errors: CheckFailed if the
    outputs differ.
    """
    with torch.inference_mode():
        difference = relative_error(outputs_of(dense, example), outputs_of(sparse, example))
        if not difference <= TOLERANCE[precision]:
            why = f"by {difference:.1e} of the largest value, {TOLERANCE[precision]:g} is allowed"
            rounded = precision is not Precision.FP32
            todo = "use a precision that rounds less" if rounded else "report this with the model's name"
            raise CheckFailed("the output of the sparse model differs", why, todo)
    ratio = speedup(dense, sparse, example)
    if ratio.faster or (gains_elsewhere and not ratio.slower and ratio.value > _AS_FAST):
        return Acceptance("", ratio, None, difference)
    return Acceptance(f"the full model stays dense: {ratio.verdict} on the example", ratio, None, difference)


def measures_channels_last(program: GraphModule | None, example: Inputs) -> bool:
    """Whether convolutions are measured in the layout channels last: the images have it, or the program can use it.

    program: the trace of the model; it is changed.
    """
    images = [part for part in tensors(example) if part.dim() == 4]
    if any(is_channels_last(image) for image in images):
        return True
    return bool(images) and program is not None and channels_last_(program)


def with_channels_last(model: nn.Module, example: Inputs) -> tuple[nn.Module, bool]:
    """The model with its images in the layout channels last, if it was traced and is faster so; and whether it is.

    The ratio alone decides, without its interval: both layouts still have to win against the dense model.
    """
    if not isinstance(model, GraphModule) or not any(isinstance(m, SparseConv2d) for m in model.modules()):
        return model, False
    replica = frozen_copy(model)
    assert isinstance(replica, GraphModule)  # a copy of one
    if not channels_last_(replica) or not speedup(model, replica, example).value > 1:
        return model, False
    with torch.inference_mode():
        difference = relative_error(outputs_of(model, example), outputs_of(replica, example))
    return (replica, True) if difference <= TOLERANCE[Precision.FP32] else (model, False)


def speedup(base: nn.Module, other: nn.Module, example: Inputs) -> Ratio:
    """The speed of the other model relative to the base, on an example."""
    runs = {"base": partial(forward, base, example), "other": partial(forward, other, example)}
    with torch.inference_mode():
        return interleaved(runs, device=devices_of(base)).ratio


def interleaved(runs: Mapping[str, Callable[[], object]], *, seconds: float = 4.0, device: str = "cpu") -> Comparison:
    """A comparison in 9 to 41 interleaved rounds, more for fast calls. device: where the work is done."""
    clock = own_clock(device)
    synchronize(device)
    start = clock()
    for run in runs.values():
        run()
    synchronize(device)
    once = clock() - start
    rounds = min(41, max(9, round(seconds / max(once, 1e-3))))
    return compare_latency(runs, rounds=rounds, warmup=1, clock=clock, device=device)


def first_token(part: Any) -> Any:
    """An example cut to the first index of the first two axes of each tensor."""
    if isinstance(part, Tensor):
        return part[:1, :1] if part.dim() > 1 else part[:1] if part.dim() else part
    if isinstance(part, Mapping):
        return {name: first_token(value) for name, value in part.items()}
    return type(part)(map(first_token, part)) if isinstance(part, tuple | list) else part
