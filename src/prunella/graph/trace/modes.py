"""The two modes under which a model is traced: one sees the calls of Python, the other the operations of ATen."""

from __future__ import annotations

import inspect
import logging
import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from prunella.graph.noise import drops
from prunella.graph.trace.answers import LEAVES_TORCH, decides, sized_by_values
from prunella.graph.trace.caches import in_script
from prunella.graph.trace.call_names import CALCULATES, NEEDS_DATA, OPAQUE, PARTS, SIZE, SIZED, UNSEEN
from prunella.graph.trace.recorder import CALL_RULES, Call, Trace
from prunella.graph.trace.tracked_int import Calculation, Shape, Tracked, bare
from prunella.graph.work import tensors_in
from prunella.model.calls import called

log = logging.getLogger(__name__)


class Calls(TorchFunctionMode):
    """Records the raw Python arguments, and returns tracked integers for `shape`."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace
        self.count: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = called(func)
        kwargs = kwargs or {}
        if func == Tensor.shape.__get__ or name == "size":  # type: ignore[attr-defined]
            return self._sizes(func(*args, **kwargs), *args, **kwargs, number=self._number(SIZE))
        if name in {"numel", "nelement"} or func == Tensor.nbytes.__get__:  # type: ignore[attr-defined]
            count = math.prod(self._sizes(args[0].shape, args[0]))
            return count if name in {"numel", "nelement"} else count * args[0].element_size()
        if name == "__len__" and args[0].dim():
            self._counted(args[0])
        elif name in PARTS:
            loops = not self.trace.value(args[0]).dims[_axis(name, args, kwargs)]
            self.trace.known_sizes.note(sys._getframe(1), parts=True, loops=loops)
        elif name in {"stride", "untyped_storage", "storage"}:
            self.trace.known_sizes.note(sys._getframe(1), escaped=True)
        ranks = name in {"dim", "ndimension"} or func == Tensor.ndim.__get__  # type: ignore[attr-defined]
        layouts = name in {"stride", "is_contiguous"}
        if ranks or layouts:
            self.trace.known_sizes.asks(sys._getframe(1), ranks=ranks, layouts=layouts)
        self.trace.values_read |= decides(name, sys._getframe(1))
        if name in LEAVES_TORCH and args and isinstance(args[0], Tensor):
            for dim in self.trace.value(args[0]).dims:
                self.trace.freeze(dim, f"{name.strip('_')} takes it out of the tensors")
        if drops(name, args, kwargs):
            return args[0]  # a mask over any positions: the axes do not change
        self.trace.calls.append(Call(name, args, kwargs, self._number(name)))
        try:
            self._leaks(name, args, kwargs)
            with sdpa_kernel(SDPBackend.MATH) if name == "scaled_dot_product_attention" else nullcontext():
                result = func(*bare(args), **bare(kwargs))  # the source may have chosen another kernel
            if name in CALL_RULES:
                self._relate(func, args, kwargs, result)
            elif name in OPAQUE:
                self._freeze_all((args, kwargs, result), f"the sizes inside {name} are not visible")
            elif name in NEEDS_DATA and args and isinstance(args[0], Tensor) and not args[0].numel():
                self._freeze_all((args, kwargs, result), UNSEEN)
            return result
        finally:
            self.trace.calls.pop()

    def _number(self, name: str) -> int:
        """The number of this call among those of its name; -1 if other runs do not see the call."""
        if in_script():
            return -1
        self.count[name] += 1
        self.trace.call_counts[self.trace.example, name] = self.count[name]
        return self.count[name] - 1

    def _relate(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Apply the rule of the call. Axes that the rule does not cover are frozen, and their work is not counted."""
        name = self.trace.operation = called(func)
        try:
            CALL_RULES[name](self.trace, name, bare(_in_order(func, args, kwargs)), result)
        except Exception as error:
            log.debug("rule of %s failed: %r", name, error)
            self._freeze_all((args, kwargs, result), f"the operation {name} has no rule for these arguments")
            self.trace.count(name, None, tensors_in([args, list(kwargs.values())]))

    def _freeze_all(self, tree: Any, text: str) -> None:
        if isinstance(tree, Mapping):
            tree = tuple(tree.values())
        if isinstance(tree, Tensor):
            for dim in self.trace.value(tree).dims:
                self.trace.freeze(dim, text)
        elif isinstance(tree, tuple | list):
            for item in tree:
                self._freeze_all(item, text)

    def _counted(self, tensor: Tensor) -> None:
        """Freeze the first axis: `len()` gives a plain Python integer, which cannot follow a cut."""
        dim = self.trace.value(tensor).dims[0]
        self.trace.freeze(dim, "its length is taken by len()")
        if not dim:
            self.trace.known_sizes.note(sys._getframe(1), escaped=True)

    def _sizes(self, answer: Any, tensor: Tensor, dim: int | None = None, *, number: int = -1) -> Any:
        dims = self.trace.value(tensor).dims
        if not all(dims):
            self.trace.known_sizes.note(sys._getframe(1))
        if dim is None and tensor in self.trace.entries:
            self.trace.known_sizes.counted(sys._getframe(1))
        if dim is not None:
            return self._track(tensor, answer, dim % len(dims), number)
        return torch.Size([self._track(tensor, size, axis, number) for axis, size in enumerate(answer)])

    def _track(self, tensor: Tensor, size: int, axis: int, number: int) -> int:
        given = axis if tensor in self.trace.entries else -1
        shape = Shape(self.trace.value(tensor).dims[axis], size, given, (number, axis))
        return Tracked(size, shape, self.trace.leak)

    def _leaks(self, name: str, args: Any, kwargs: Any) -> None:
        if name == "full":
            args = args[1:]
        elif name in SIZED:
            return
        for argument in (*args, *kwargs.values()):
            if isinstance(argument, Tracked):
                number = name in CALCULATES and any(_floats(other) for other in args)
                self.trace.leak(Calculation(argument.expression) if number else argument.expression)


def _floats(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _in_order(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """All arguments by position. Errors: ValueError for a C++ function with keyword arguments."""
    if not kwargs:
        return args
    bound = inspect.signature(func).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.args


def _axis(name: str, args: Any, kwargs: Any) -> int:
    """The axis along which a call splits a tensor."""
    place = 1 if name == "unbind" else 2
    return int(kwargs.get("dim", args[place] if len(args) > place else 0))


class Operations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Applies the rules to every ATen operation."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the check against the compiler would import dynamo, which takes seconds

    def __init__(self, trace: Trace, apply_rule: Callable[..., None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace, self.apply_rule = trace, apply_rule

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.trace.values_read |= sized_by_values(func, args)
        with torch._C.DisableTorchFunction():  # calls from TorchScript leave the other mode active
            self.apply_rule(self.trace, func, args, kwargs, result)
        return result
