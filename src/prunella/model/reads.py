"""Which calls read which parameters: linear, matrix and convolution calls, seen by parameter identity.

A layer is whatever hands its own parameter to `F.linear`, `torch.addmm`, `torch.matmul`, `torch.mm`, `conv1d` or
`conv2d`, so that `nn.Linear`, GPT-2's `Conv1D` and hand-written modules are the same thing here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from prunella.model.forward import tensors

CHUNK = 8_000_000
"""Most elements of an unfolded convolution input held at once, a sample at the least."""


@dataclass(frozen=True)
class Conv:
    """The settings of one convolution call."""

    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int


@dataclass(frozen=True)
class Read:
    """One call of a layer: its input, its output, its bias, and how the weight is laid out.

    part: where a stack of matrices is read one at a time, the place of this one; the axes are those of the matrix.
    residual: what its output is added to, in the shape of `y`; None if it is not added to anything.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    x: Tensor
    y: Tensor
    in_axis: int
    out_axis: int
    conv: Conv | None
    residual: Tensor | None = None
    part: int | None = None


class Stop(Exception):
    """Raised to end a forward pass once everything asked for was seen."""


class Watch(TorchFunctionMode):
    """Hand every `Read` of the parameters `wanted` to `found`; pass everything else through.

    `others`: parameter id -> name of a contraction that reads it and is not understood here.
    stacks: see parameters of three axes, the experts of a mixture for example, of which `p[k]` takes single matrices.
    """

    def __init__(self, wanted: Iterable[nn.Parameter], found: Callable[[Read], None], *, stacks: bool = False) -> None:
        super().__init__()
        self.wanted, self.found = {id(p): p for p in wanted}, found
        self.stacks = {id(p) for p in self.wanted.values() if stacks and p.dim() == 3}
        self.others: dict[int, str] = {}
        self._slices: dict[int, tuple[nn.Parameter, int, Tensor]] = {}
        self._held: tuple[Read, Tensor] | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        handed_on = self._used(getattr(func, "__name__", ""), args)
        result = func(*args, **(kwargs or {}))
        if handed_on and self._held is not None:
            self._hand_on(result)
        if self.stacks and func is Tensor.__getitem__ and id(args[0]) in self.stacks:
            self._slice(args[0], args[1], result)
        reader = _READERS.get(func)
        read = reader(*args, **(kwargs or {})) if reader else None
        if read is not None and id(read.weight) in self._slices:
            weight, part, _ = self._slices[id(read.weight)]
            read = replace(read, weight=weight, part=part)
        if read is not None and id(read.weight) in self.wanted:
            self.finish()
            # copies, since the model may go on in place
            self._held = replace(read, x=read.x.detach().clone(), y=result.detach().clone()), result
        elif reader or getattr(func, "__name__", "") in _NOT_UNDERSTOOD:
            for value in tensors([args, kwargs or {}]):
                if id(value) in self.wanted:
                    self.others[id(value)] = func.__name__
        return result

    def _slice(self, stack: nn.Parameter, index: Any, result: Any) -> None:
        """Remember which matrix of a stack was taken."""
        scalar = isinstance(index, Tensor) and index.dim() == 0 and not index.is_floating_point()
        if isinstance(result, Tensor) and result.dim() == 2 and (isinstance(index, int) or scalar):
            self._slices[id(result)] = stack, int(index) % len(stack), result  # held, so that no number is used twice

    def _used(self, name: str, args: tuple[Any, ...]) -> bool:
        """A call that is about to run: hand the last read over if the call uses its output; True if it hands it on.

        Before the call, since a sum in place would change what it adds.
        """
        if self._held is None or not any(argument is self._held[1] for argument in args):
            return False
        if name in _HANDS_ON:
            return True
        read, output = self._held
        if name in _ADDS and len(args) > 1:
            other = args[1] if args[0] is output else args[0]
            if isinstance(other, Tensor) and other.shape == output.shape and other is not output:
                self._held = replace(read, residual=other.detach().clone().reshape(read.y.shape)), output
        self.finish()
        return False

    def _hand_on(self, result: Any) -> None:
        """The output of the last read goes on as `result`, if that still has its last axis."""
        assert self._held is not None
        read, output = self._held
        if isinstance(result, Tensor) and result.shape[-1] == output.shape[-1]:
            self._held = read, result
        else:
            self.finish()

    def finish(self) -> None:
        """Hand over the last read. To be called when the pass has ended."""
        held, self._held = self._held, None
        if held is not None:
            self.found(held[0])


_ADDS = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__"})
_HANDS_ON = frozenset({"dropout", "view", "reshape", "contiguous"})
"""Calls between a layer and the sum that its output goes into, where the last axis stays."""


def rows(read: Read, positions: Tensor | None = None) -> Iterable[tuple[Tensor, slice]]:
    """The input as matrices `(tokens, in * kernel)` in chunks, each with the slice of output tokens it belongs to.

    `positions` selects input channels. A convolution is unfolded a few samples at a time.
    """
    if read.conv is None:
        x = read.x.reshape(-1, read.x.shape[-1])
        yield (x if positions is None else x.index_select(1, positions)), slice(None)
        return
    x = read.x if positions is None else read.x.index_select(1, positions)
    kernel = tuple(read.weight.shape[2:])
    tokens = read.y.shape[2:].numel()
    per_sample = x.shape[1] * torch.Size(kernel).numel() * tokens
    step = max(1, CHUNK // max(per_sample, 1))
    for start in range(0, x.shape[0], step):
        part = _unfold(x[start : start + step], kernel, read.conv)
        yield part, slice(start * tokens, (start + part.shape[0] // tokens) * tokens)


def targets(read: Read, positions: Tensor | None = None, *, residual: bool = False) -> Tensor:
    """The output as a matrix `(tokens, out)`, or what it is added to; `positions` selects output channels."""
    y = read.residual if residual and read.residual is not None else read.y
    y = y.movedim(1, -1) if read.conv is not None else y
    y = y.reshape(-1, y.shape[-1])
    return y if positions is None else y.index_select(1, positions)


def _unfold(x: Tensor, kernel: tuple[int, ...], conv: Conv) -> Tensor:
    """The patches that a convolution multiplies: `(samples * positions, in * kernel)`, as in `weight.flatten(1)`."""
    x = F.pad(x, [side for pair in reversed(conv.padding) for side in pair])
    for axis, size in enumerate(kernel):
        span = conv.dilation[axis] * (size - 1) + 1
        x = x.unfold(2 + axis, span, conv.stride[axis])[..., :: conv.dilation[axis]]
    spatial = len(kernel)
    order = [0, *range(2, 2 + spatial), 1, *range(2 + spatial, 2 + 2 * spatial)]
    x = x.permute(order)
    return x.reshape(x.shape[: 1 + spatial].numel(), -1)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Read | None:
    return _call(weight, bias, input, 1, 0, None)


def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1, **_: Any) -> Read | None:
    return _call(mat2, input, mat1, 0, 1, None) if beta == 1 and alpha == 1 else None


def _matmul(input: Tensor, other: Tensor, **_: Any) -> Read | None:
    return _call(other, None, input, 0, 1, None) if other.dim() == 2 else None


def _mm(input: Tensor, mat2: Tensor, **_: Any) -> Read | None:
    return _call(mat2, None, input, 0, 1, None)


def _conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Read | None:
    n = weight.dim() - 2
    if input.dim() != n + 2:
        return None
    spread = _tuple(dilation, n)
    if padding == "same":
        total = [d * (k - 1) for d, k in zip(spread, weight.shape[2:], strict=True)]
        pads = tuple((t // 2, t - t // 2) for t in total)
    else:
        pads = tuple((p, p) for p in _tuple(0 if padding == "valid" else padding, n))
    return _call(weight, bias, input, 1, 0, Conv(_tuple(stride, n), pads, spread, groups))


def _tuple(value: Any, n: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * n if len(values) == 1 else values


def _call(
    weight: Tensor, bias: Tensor | None, x: Tensor, in_axis: int, out_axis: int, conv: Conv | None
) -> Read | None:
    if bias is not None and not isinstance(bias, nn.Parameter):
        return None
    return Read(weight, bias, x, x, in_axis, out_axis, conv)  # type: ignore[arg-type]  # `Watch` looks at the weight


_READERS: dict[Any, Callable[..., Read | None]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    Tensor.addmm: _addmm,
    torch.matmul: _matmul,
    Tensor.matmul: _matmul,
    Tensor.__matmul__: _matmul,
    torch.mm: _mm,
    Tensor.mm: _mm,
    F.conv1d: _conv,
    F.conv2d: _conv,
}

_NOT_UNDERSTOOD = {
    "embedding",
    "multi_head_attention_forward",
    "einsum",
    "bmm",
    "baddbmm",
    "tensordot",
    "bilinear",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "lstm",
    "gru",
    "rnn_tanh",
    "rnn_relu",
}
