"""Other arguments than those of the example: other values of what is no tensor, arguments left out, longer lists.

The source names the values: what it compares with, keys of its tables and modules, entries of an enumeration. A batch
with another value tells something if the model's source does something new on it. Of many arguments, as language models
have them, several are changed in one run.
"""

from __future__ import annotations

import copy
import enum
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from torch import Tensor, fx, nn

from prunella.graph.guesses import Seen
from prunella.graph.trials import Trials
from prunella.graph.values import SourceValues, spelled
from prunella.graph.variants import Variant, Variants
from prunella.model.contained import contained
from prunella.model.executed import is_source
from prunella.model.forward import inputs_of
from prunella.model.trees import attributes, set_attribute, tensors

_RUNS = 96
"""Runs that look for another value, of all arguments together."""
_EACH = 24
"""Runs that look for another value of one argument."""
_TOLD = 3
"""Other values of one argument that are verified."""
_ACCEPTED = 4
"""Values of one argument that the model takes."""
_DEEP = 3
"""Containers within containers that are looked into."""
_PASSED_ON = 16
"""Arguments of inner modules that are tried by `**kwargs` of the model."""
_SINGLE = 5
"""Arguments of which each is changed alone; more are changed together."""


@dataclass(frozen=True, eq=False)
class _Argument:
    """A place in a batch: its name for people, its value, the hint of its type, and a batch with another value there.

    others: other values, where the place itself says them. of_keys: it is a dictionary, which may have further keys.
    whole: it is an argument that has a name, not a part of one.
    """

    name: str
    value: Any
    put: Callable[[Any], Any]
    hint: str = ""
    others: tuple[tuple[str, Any], ...] = ()
    of_keys: bool = False
    whole: bool = False


def variants(model: nn.Module, inputs: Any, others: Sequence[Any] = ()) -> Variants:
    """Batches like the example with one other argument, on which the dense model does something new.

    Of a number or a text one other value that the model takes counts even if the same instructions run on it.
    """
    if any(parameter.is_meta for parameter in model.parameters()) or not _has_source(model):
        return Variants()
    batch = inputs_of(model, inputs)
    asked, keywords = list(_arguments(model, batch)), _takes_keywords(model)
    if not asked and not keywords:
        return Variants()
    seen = Seen(model, (inputs, *others))
    values, tries = SourceValues(model, batch, seen), _Tries(seen)
    simple, further = [argument for argument in asked if _is_simple(argument, values)], list[_Argument]()
    if keywords:
        further = _named_by_source(model, batch, values, own=len(simple) > _SINGLE)
        simple, asked = [*simple, *further], [*asked, *further]
    together = Variants()
    if len(simple) > _SINGLE:
        base = dict(batch) if isinstance(batch, Mapping) else _by_name_of(model, batch)
        choices = {argument.name: values.at_once(argument.value, argument.hint) for argument in simple}
        together = Trials(seen.guard, base or {}).of(choices)
        asked = [argument for argument in asked if argument not in simple]
    found = [(argument, tries.of(argument, values)) for argument in asked]
    valued = [(argument, tried) for argument, tried in found if not argument.others and not argument.of_keys]
    untried = [*together.untried, *(argument.name for argument, tried in valued if tried is None)]
    named_inside = {argument.name for argument in further}  # of `**kwargs`: the caller knows none of them
    batches = tuple(variant for _, tried in found for variant in tried or ())
    told = dict.fromkeys(name for name in untried if name not in named_inside)
    return Variants((*together.batches, *batches), tuple(told))


def _is_simple(argument: _Argument, values: SourceValues) -> bool:
    """Whether one or two other values of an argument tell as much as many."""
    if not argument.whole or argument.others or argument.of_keys or isinstance(argument.value, str | enum.Enum):
        return False
    return isinstance(argument.value, bool | None) or not values.named_in_front()


class _Tries:
    """Runs the model with other values of one argument after another."""

    def __init__(self, seen: Seen) -> None:
        self.seen, self.runs = seen, 0

    def of(self, argument: _Argument, values: SourceValues) -> list[Variant] | None:
        """The batches that tell something; None if the model took none.

        Of a number or a text one more counts in any case, and a tensor of the shape of inner units: it meets them.
        """
        plain = isinstance(argument.value, bool | int | float | str)
        most, new, taken, refused, accepted = _TOLD if plain else 1, list[Variant](), list[Variant](), 0, 0
        for tries, (text, value, inner) in enumerate(_values(argument, values)):
            if refused > 1 or tries >= _EACH or self.runs >= _RUNS or len(new) >= _TOLD or accepted > _ACCEPTED:
                break
            if len(new) >= most and not inner:
                continue
            self.runs += 1
            variant = Variant((text,), argument.put(value))
            with contained():
                fresh = self.seen.new(variant.batch)
            refused, accepted = refused + self.seen.refused, accepted + self.seen.accepted
            if fresh or (inner and self.seen.accepted):
                new.append(variant)
            elif self.seen.accepted:
                taken.append(variant)
        return (new or (taken[:1] if plain else [])) if accepted else None


def _has_source(model: nn.Module) -> bool:
    """Whether the forward pass is a function of somebody's source, whose arguments may be anything."""
    code = getattr(inspect.unwrap(model.forward), "__code__", None)
    return code is not None and is_source(code.co_filename) and not isinstance(model, fx.GraphModule)


def _values(argument: _Argument, values: SourceValues) -> Iterator[tuple[str, Any, bool]]:
    """Other values of an argument: in words, the value, and whether it is a tensor of the shape of inner units."""
    for text, value in argument.others:
        yield text, value, False
    if argument.of_keys:
        more = [value for value in (values.like(argument.value), True) if value is not None]
        for key in values.keys(argument.value):
            for value in more:
                yield f"{argument.name}[{key!r}]={spelled(value)}", {**argument.value, key: value}, False
    elif not argument.others:
        for value in values.instead_of(argument.value, argument.hint):
            yield f"{argument.name}={spelled(value)}", value, values.inner(value)


# -- places ----------------------------------------------------------------------------------------------------------


def _arguments(model: nn.Module, batch: Any) -> Iterator[_Argument]:
    """The arguments that are no tensors, parts of arguments, and the arguments that the example leaves out."""
    signature = inspect.signature(model.forward)
    given = dict(batch) if isinstance(batch, Mapping) else batch if isinstance(batch, tuple) else (batch,)
    try:
        bound = signature.bind(**given) if isinstance(given, dict) else signature.bind(*given)
    except TypeError:
        return
    kwargs = given if isinstance(given, dict) else _by_name(signature, bound)
    if kwargs is not None:
        for name, value in kwargs.items():
            yield from _parts(name, value, partial(_with_key, kwargs, name))
    elif isinstance(given, tuple):
        names = _positional(signature, len(given))
        for k, (name, value) in enumerate(zip(names, given, strict=True)):
            yield from _parts(name, value, partial(_with_entry, given, k))
    if isinstance(given, tuple) and any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values()):
        more = (*given, given[-1]) if given else ()
        yield _Argument("more arguments", None, lambda value: value, others=(("one argument more", more),))
    for name, parameter in signature.parameters.items():
        named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if kwargs is not None and named and name not in bound.arguments:
            yield _left_out(parameter, kwargs)


def _hint(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", "") + str(annotation)


def _positional(signature: inspect.Signature, count: int) -> list[str]:
    """Names of the first arguments; those of `*args` have numbers."""
    names = [name for name, p in signature.parameters.items() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    rest = next((name for name, p in signature.parameters.items() if p.kind is p.VAR_POSITIONAL), "args")
    return [*names[:count], *(f"{rest}[{k}]" for k in range(count - len(names)))]


def _by_name_of(model: nn.Module, batch: Any) -> dict[str, Any] | None:
    signature = inspect.signature(model.forward)
    return _by_name(signature, signature.bind(*(batch if isinstance(batch, tuple) else (batch,))))


def _by_name(signature: inspect.Signature, bound: inspect.BoundArguments) -> dict[str, Any] | None:
    """The same arguments by their names; None where some have none."""
    kinds = {signature.parameters[name].kind for name in bound.arguments}
    return dict(bound.arguments) if kinds <= {inspect.Parameter.POSITIONAL_OR_KEYWORD} else None


def _takes_keywords(model: nn.Module) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(model.forward).parameters.values())


def _named_by_source(model: nn.Module, batch: Any, values: SourceValues, *, own: bool) -> list[_Argument]:
    """Arguments of `**kwargs` that the source names and the example leaves out. own: of the model itself alone."""
    given = dict(batch) if isinstance(batch, Mapping) else _by_name_of(model, batch)
    if given is None:
        return []
    asked = values.keywords_in_front(given) if own else values.keys(given, of_keywords=True)
    known = {*given, *inspect.signature(model.forward).parameters}
    names = [name for name in asked if name not in known and name.isidentifier()]
    looked_up = [_Argument(name, None, partial(_with_key, given, name), whole=True) for name in names]
    passed_on = {} if own else _passed_on(model)
    return [*looked_up, *(_left_out(p, given) for name, p in passed_on.items() if name not in {*known, *names})]


def _passed_on(model: nn.Module) -> dict[str, inspect.Parameter]:
    """The optional arguments of inner modules, which `**kwargs` may reach."""
    inner = [inspect.unwrap(module.forward) for module in model.modules() if module is not model]
    codes = [(function, getattr(function, "__code__", None)) for function in inner]
    own = [function for function, code in codes if code is not None and is_source(code.co_filename)]
    parameters = [p for function in own for p in inspect.signature(function).parameters.values()]
    return dict(islice(((p.name, p) for p in parameters if p.default is not p.empty), _PASSED_ON))


def _left_out(parameter: inspect.Parameter, given: Mapping[str, Any]) -> _Argument:
    """An argument that the example leaves out."""
    hint = "" if parameter.annotation is parameter.empty else _hint(parameter.annotation)
    return _Argument(parameter.name, parameter.default, partial(_with_key, given, parameter.name), hint, whole=True)


def _parts(name: str, value: Any, put: Callable[[Any], Any], depth: int = 0) -> Iterator[_Argument]:
    """The places in one argument that are no tensors."""
    if isinstance(value, bool | int | float | str | enum.Enum | None):
        yield _Argument(name, value, put, whole=depth == 0)
    elif isinstance(value, Tensor | nn.Module) or depth >= _DEEP:
        return
    elif isinstance(value, dict):
        yield from _in_dictionary(name, value, put, depth)
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        for key, entry in zip(value._fields, value, strict=True):
            change = partial(_with_field, value, key)
            yield from _parts(f"{name}.{key}", entry, partial(_through, put, change), depth + 1)
    elif type(value) in (list, tuple):
        for k, entry in enumerate(value):
            yield from _parts(f"{name}[{k}]", entry, partial(_through, put, partial(_with_entry, value, k)), depth + 1)
        yield from _other_length(name, value, put)
    else:
        for key, entry in attributes(value).items():
            change = partial(_with_attribute, value, key)
            yield from _parts(f"{name}.{key}", entry, partial(_through, put, change), depth + 1)


def _in_dictionary(name: str, value: dict[Any, Any], put: Callable[[Any], Any], depth: int) -> Iterator[_Argument]:
    for key, entry in value.items():
        text = f"{name}[{key!r}]"
        yield from _parts(text, entry, partial(_through, put, partial(_with_key, value, key)), depth + 1)
        less = {other: kept for other, kept in value.items() if other != key}
        yield _Argument(text, None, put, others=((f"{text} left out", less),))
    yield _Argument(name, value, put, of_keys=True)


def _other_length(name: str, value: Sequence[Any], put: Callable[[Any], Any]) -> Iterator[_Argument]:
    """A list with one entry more, and one with one entry less, where its entries hold tensors."""
    if not tensors(value):
        return
    for other in (type(value)([*value, value[-1]]), value[:-1]):  # type: ignore[call-arg]
        if other:
            text = f"{len(other)} {'entry' if len(other) == 1 else 'entries'} in {name}"
            yield _Argument(f"the length of {name}", None, put, others=((text, other),))


def _with_key(mapping: Mapping[Any, Any], key: Any, value: Any) -> dict[Any, Any]:
    changed = copy.copy(mapping)
    changed[key] = value  # type: ignore[index]
    return changed  # type: ignore[return-value]


def _with_entry(entries: Sequence[Any], at: int, value: Any) -> Any:
    return type(entries)(value if k == at else entry for k, entry in enumerate(entries))  # type: ignore[call-arg]


def _with_field(entries: Any, name: str, value: Any) -> Any:
    return entries._replace(**{name: value})


def _with_attribute(owner: Any, name: str, value: Any) -> Any:
    changed = copy.copy(owner)
    set_attribute(changed, name, value)
    return changed


def _through(put: Callable[[Any], Any], change: Callable[[Any], Any], value: Any) -> Any:
    return put(change(value))
