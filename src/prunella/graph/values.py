"""Values to try in place of one that is no tensor: those that the model's source names, and tensors it may take."""

from __future__ import annotations

import dis
import enum
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import cached_property
from inspect import CO_VARKEYWORDS
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

from prunella.graph.guesses import Seen
from prunella.graph.trace.known_sizes import constants
from prunella.graph.trace.scopes import scopes_of
from prunella.model.forward import forward
from prunella.model.state import untouched
from prunella.model.trees import first, tensors

_LONGEST = 32
_NUMBERS, _TEXTS = 12, 16
_LARGEST = 1024
"""Larger numbers may be a count of steps, or a size."""
_SHAPES, _INNER, _LIKELY = 6, 3, 3
_KINDS = re.compile(r"\b(?:bool|int|float|str)\b|Tensor")


def spelled(value: Any) -> str:
    """A value for people: a tensor by its type and shape."""
    if isinstance(value, Tensor):
        shape = "x".join(map(str, value.shape)) or "no axes"
        return f"a tensor of {shape} ({str(value.dtype).removeprefix('torch.')})"
    if isinstance(value, tuple):
        return f"({', '.join(map(spelled, value))})"
    return str(value) if isinstance(value, enum.Enum) else repr(value)


class SourceValues:
    """What the source of a model names. seen: what it has done on the examples."""

    def __init__(self, model: nn.Module, batch: Any, seen: Seen) -> None:
        self.model, self.batch, self.seen = model, batch, seen
        self._texts, self._numbers, self._tensors = list[str](), list[int](), list[Any]()
        self._inner = list[Tensor]()

    @cached_property
    def codes(self) -> list[CodeType]:
        """The functions that have run, in an order that does not depend on addresses."""
        return sorted(self.seen.codes(), key=_order(self.model))

    @cached_property
    def front(self) -> list[CodeType]:
        """The functions that get the arguments first: the forward pass of the model, and what is wrapped around it."""
        function: Any = self.model.forward
        codes = list[CodeType]()
        while function is not None:
            code = getattr(getattr(function, "__func__", function), "__code__", None)
            codes += [code] if code is not None else []
            function = getattr(function, "__wrapped__", None)
        return codes

    def named_in_front(self) -> bool:
        """Whether these functions name numbers with which an argument may be compared."""
        return any(abs(number) > 1 for code in self.front for number in constants(code))

    def keywords_in_front(self, mapping: Mapping[str, Any]) -> list[str]:
        """Keywords that these functions look up, and which the mapping lacks."""
        asked = dict.fromkeys(key for code in self.front if code.co_flags & CO_VARKEYWORDS for key in _looked_up(code))
        return [key for key in asked if key not in mapping][:_TEXTS]

    def at_once(self, value: Any, hint: str = "") -> list[Any]:
        """The likeliest values instead of one, to be tried together with those of other arguments."""
        if isinstance(value, bool):
            return [not value]
        if isinstance(value, int | float):
            return [value + 1]
        kinds, given = _kinds(hint), [tensor for tensor in tensors(self.batch) if tensor.dim()]
        main = max(given, key=Tensor.numel) if "Tensor" in kinds and given else None
        likely: list[Any] = [True] if "bool" in kinds else []
        if main is not None:
            likely += _filled(tuple(main.shape), main, integers_first=not main.is_floating_point())[:_LIKELY]
            likely += _zeros(main)
        return [*likely, *([1] if kinds & {"int", "float"} else [])]

    def instead_of(self, value: Any, hint: str = "") -> Iterator[Any]:
        """Values of the same kind, the likeliest first. hint: the annotation of an argument that is None."""
        if isinstance(value, enum.Enum):
            yield from (other for other in type(value) if other is not value)
        elif isinstance(value, bool):
            yield not value
        elif isinstance(value, int | float):
            yield from self._other_numbers(value)
        elif isinstance(value, str):
            yield from (text for text in self.texts() if text != value)
        elif value is None:
            yield from self._in_place_of_none(hint)

    def like(self, mapping: Mapping[Any, Any]) -> Tensor | None:
        """A tensor like the first one of a dictionary, with other values."""
        tensor = first(mapping)
        return None if tensor is None else tensor.roll(1, -1) if tensor.dim() else tensor

    def keys(self, mapping: Mapping[Any, Any], *, of_keywords: bool = False) -> list[str]:
        """Texts by which the source looks something up in a dictionary, and which this one lacks.

        of_keywords: only those in functions with `**kwargs`, in the files of the model's own classes.
        """
        files = {getattr(sys.modules.get(type(module).__module__), "__file__", None) for module in self.model.modules()}
        own = [code for code in self.codes if code.co_flags & CO_VARKEYWORDS and code.co_filename in files]
        codes = own if of_keywords else self.codes
        asked = dict.fromkeys(key for code in codes for key in _looked_up(code))
        return [key for key in asked if key not in mapping][:_TEXTS]

    def inner(self, value: Any) -> bool:
        """Whether a value has the shape of what an inner module returns, as some of `tensors`, beside real inputs."""
        return any(value is tensor for tensor in self._inner[:_INNER])

    def texts(self) -> list[str]:
        """Short texts without spaces: constants, keys of tables and of dictionaries of modules."""
        if not self._texts:
            scopes = list(scopes_of(self.model))
            tables = [table for scope in scopes for _, table in scope.containers() if isinstance(table, dict)]
            boxes = [list(box) for box in self.model.modules() if isinstance(box, nn.ModuleDict)]
            named = [text for keys in (*boxes, *map(list, tables)) for text in keys]
            found = [text for text in (*named, *_nested(self.codes)) if isinstance(text, str)]
            short = [text for text in found if 0 < len(text) <= _LONGEST and text.isprintable() and " " not in text]
            self._texts = list(dict.fromkeys(short))[:_TEXTS]
        return self._texts

    def _other_numbers(self, value: float) -> Iterator[Any]:
        """Numbers beside this one and beside those that the source names, each once."""
        if not self._numbers:
            self._numbers = list(dict.fromkeys(n for code in self.codes for n in constants(code) if 0 <= n <= _LARGEST))
        near = [value + 1, value - 1, 0, 1, 2, value * 2 + 1]
        named = [n + step for n in self._numbers for step in (0, 1, -1)]
        kind = type(value)
        numbers = dict.fromkeys(kind(n) for n in (*near[:2], *named, *near[2:], -value))
        yield from [n for n in numbers if n != value][:_NUMBERS]

    def _in_place_of_none(self, hint: str) -> Iterator[Any]:
        kinds = _kinds(hint)
        yield from self.tensors() if "Tensor" in kinds else ()
        yield from (True,) if "bool" in kinds else ()
        yield from self.texts() if "str" in kinds else ()
        yield from (1, 2) if kinds & {"int", "float"} else ()

    def tensors(self) -> list[Any]:
        """Tensors like the inputs, like what layers take that did not run, and like what inner modules return."""
        given = [tensor for tensor in tensors(self.batch) if tensor.dim()]
        if not self._tensors and given:
            self._tensors = list(self._guessed(max(given, key=Tensor.numel)))
        return self._tensors

    def _guessed(self, main: Tensor) -> Iterator[Any]:
        shape, floating = tuple(main.shape), main.is_floating_point()
        kept = (*shape[:-1], 1) if floating else shape
        image = (shape[0], 1, *shape[2:]) if len(shape) > 3 else kept
        unread, steps = self._unread(main), shape[:2] if len(shape) > 2 else kept
        for form in dict.fromkeys([*unread, steps, image, shape]):
            yield from _filled(form, main, integers_first=not floating)
        yield from (*_zeros(main), _numbers(shape[:1], main))
        returned = [_numbers(form, main) for form in self._returned(main)]
        self._inner = returned if floating else []
        yield from returned
        yield from self._states(main)

    def _unread(self, main: Tensor) -> Iterator[tuple[int, ...]]:
        """Shapes that layers take which did not run on the example."""
        for module in self.model.modules():
            if id(module) in self.seen.steps().modules:
                continue
            if isinstance(module, nn.Linear):
                yield (main.shape[0], module.in_features)
                if main.dim() > 2 or not main.is_floating_point():
                    yield (*main.shape[:2], module.in_features)
            elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
                yield (main.shape[0], module.in_channels, *main.shape[2:])
            elif isinstance(module, nn.Embedding):
                yield (main.shape[0],)

    def _returned(self, main: Tensor) -> list[tuple[int, ...]]:
        """Shapes of what inner modules return, each once."""
        shapes = dict[tuple[int, ...], None]()

        def note(_: nn.Module, __: Any, output: Any) -> None:
            shapes.update((tuple(tensor.shape), None) for tensor in tensors(output) if tensor.is_floating_point())

        with untouched(self.model), torch.no_grad(), ExitStack() as stack:
            for module in self.model.modules():
                stack.enter_context(module.register_forward_hook(note))
            forward(self.model, self.batch)
        return [shape for shape in shapes if shape and shape != tuple(main.shape)][:_SHAPES]

    def _states(self, main: Tensor) -> Iterator[Any]:
        for module in self.model.modules():
            if isinstance(module, nn.RNNBase):
                samples = main.shape[0 if module.batch_first else 1]
                count = module.num_layers * (2 if module.bidirectional else 1)
                state = _numbers((count, samples, module.proj_size or module.hidden_size), main)
                yield (state, state) if isinstance(module, nn.LSTM) else state


def _kinds(hint: str) -> set[str]:
    """The kinds of values of an annotation; all where there is none."""
    return set(_KINDS.findall(hint)) if hint else {"Tensor", "bool", "str", "int"}


def _order(model: nn.Module) -> Any:
    """An order of functions that does not depend on addresses: the forward pass of the model first."""
    own = getattr(getattr(model.forward, "__func__", None), "__code__", None)
    return lambda code: (code is not own, code.co_filename, code.co_firstlineno, code.co_name)


_LOOK_UP = frozenset({"get", "pop", "setdefault"})


def _looked_up(code: CodeType) -> Iterator[str]:
    """The constant texts in `table[text]`, `text in table`, `table.get(text)` and `table.pop(text)`."""
    steps = [step for step in dis.get_instructions(code) if step.opname not in ("CACHE", "PRECALL")]
    for before, step, after, last in zip([steps[0], *steps], steps, steps[1:], steps[2:], strict=False):
        if step.opname == "LOAD_CONST" and isinstance(step.argval, str):
            called = before.opname in ("LOAD_METHOD", "LOAD_ATTR") and before.argval in _LOOK_UP
            if called or after.opname == "BINARY_SUBSCR" or last.opname == "CONTAINS_OP":
                yield step.argval


def _nested(codes: Iterable[CodeType]) -> Iterator[Any]:
    for code in codes:
        for constant in code.co_consts:
            yield from constant if isinstance(constant, tuple | frozenset) else (constant,)


def _filled(shape: tuple[int, ...], main: Tensor, *, integers_first: bool) -> list[Tensor]:
    """Tensors of one shape: of real numbers, of truths of which the last is false, and of small integers.

    An index out of range is an error on a CPU; an accelerator does not survive it.
    """
    real = _numbers(shape, main)
    truths = torch.ones(shape, dtype=torch.bool, device=main.device)
    if shape and shape[-1] > 1:
        truths[..., -1] = False
    ones = torch.ones(shape, dtype=torch.int64, device=main.device)
    counted = [ones, ones - 1] if main.device.type == "cpu" else []
    return [*counted, truths, real] if integers_first else [real, truths, *counted[1:]]


def _zeros(main: Tensor) -> list[Tensor]:
    """A zero for each sample, such as a class."""
    return [torch.zeros(main.shape[:1], dtype=torch.int64, device="cpu")] if main.device.type == "cpu" else []


def _numbers(shape: tuple[int, ...], main: Tensor) -> Tensor:
    """Numbers between .5 and 1.5, no two neighbors the same."""
    kind = main.dtype if main.is_floating_point() else torch.get_default_dtype()
    count = int(torch.Size(shape).numel())
    return (0.5 + torch.arange(count, device=main.device) * 0.618 % 1).reshape(shape).to(kind)
