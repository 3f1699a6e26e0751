"""Guards of a model's state: one for training flags, one for everything that a run may change.

`mode` serves work that may change weights (recovery, in-place solvers), `untouched` serves inspection of a model.
"""

from __future__ import annotations

import logging
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from prunella.model.beside import CONTAINERS, undo_numbers, values_beside
from prunella.model.executed import is_source
from prunella.model.rng import restore_rng_, rng_state, seeded
from prunella.model.trees import is_empty
from prunella.model.unwrap import RECORD

log = logging.getLogger(__name__)

_MACHINERY = frozenset({"_parameters", "_buffers", "_modules", "training"})

_TORCH = str(Path(torch.__file__).parent)

Undo = Callable[[], None]


@contextmanager
def mode(model: nn.Module, *, training: bool, compiled: bool = False) -> Iterator[nn.Module]:
    """Set every module of `model` to training or evaluation mode, then restore the flag of each module.

    Weights may change inside, also under the caller's autocast. compiled: run the programs of `torch.compile`, which
    ignore hooks and other observers of a pass.
    """
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.train(training)  # a `train` of the user may raise half way
        with _fresh_casts(), nullcontext() if compiled else without_compile():
            yield model
    finally:
        _set_flags(flags)


@contextmanager
def training_flags(model: nn.Module, *, training: bool) -> Iterator[list[str]]:
    """Inside, all modules have this flag for the source outside of torch. The list names the modules that ask for it.

    The flags are set one by one, since `train()` of a module may have side effects, such as merging weights. Modules
    have no attribute `training` inside: a property of their class answers, and records the reading line. Layers of
    torch itself remain in evaluation mode, in which a batch norm accepts any batch.
    """
    readers: list[str] = []
    paths = {id(module): path for path, module in model.named_modules()}
    flagged = [module for module in model.modules() if "training" in vars(module)]
    hidden = {id(module) for module in flagged if type(module).__getattr__ is nn.Module.__getattr__}
    readers += [paths[id(module)] for module in model.modules() if id(module) not in hidden]
    missing = nn.Module.__getattr__

    def asked(module: nn.Module, name: str) -> Any:
        if name != "training" or id(module) not in hidden:
            return missing(module, name)
        if sys._getframe(1).f_code.co_filename.startswith(_TORCH):
            return False  # torch's own layers have the same axes in both modes
        readers.append(paths[id(module)])
        return training

    for module in flagged:
        module.training = training
        if id(module) in hidden:
            del vars(module)["training"]
    nn.Module.__getattr__ = asked  # type: ignore[method-assign]
    try:
        yield readers
    finally:
        nn.Module.__getattr__ = missing  # type: ignore[method-assign]
        for module in flagged:
            vars(module).setdefault("training", training)


@contextmanager
def untouched(model: nn.Module, seed: int | None = None, *, parameters: bool = True) -> Iterator[None]:
    """Run the body with `model` in evaluation mode, then restore all changes bit for bit, also after errors.

    Restored: training flags; buffers (running statistics, also if the model replaces them); plain attributes, and the
    contents of dictionaries, lists, sets, tensors, generators and plain objects among them (caches, hooks); numbers and
    containers in the classes of the modules and in their source files; `requires_grad` and `.grad` of parameters; the
    random states of torch, CUDA, numpy and Python. Not restored: values of parameters, except for modules with their
    own `train`, which may merge weights.
    The body runs outside `torch.inference_mode()`, so that the record and gradients work there too.

    seed: of all generators in the body, so that a shuffling loader repeats its batches; None: not seeded. parameters:
    False for a temporary copy, so that its parameters are not in memory twice.
    """
    with ExitStack() as stack:
        stack.enter_context(outside_inference())
        stack.enter_context(seeded(seed))
        stack.enter_context(_without_fast_path())
        stack.enter_context(without_compile())
        for parameter in model.parameters():
            stack.callback(_gradient(parameter))
        for undo in (*_buffers(model), *_attributes(model), *(_switched(model) if parameters else ())):
            stack.callback(undo)
        stack.callback(_set_flags, [(module, module.training) for module in model.modules()])
        model.eval()
        yield


@contextmanager
def restored_state(model: nn.Module) -> Iterator[None]:
    """Restore buffers and plain attributes after the body: a part of `untouched`, for runs inside it."""
    with ExitStack() as stack:
        for undo in (*_buffers(model), *_attributes(model)):
            stack.callback(undo)
        yield


def without_compile() -> AbstractContextManager[Any]:
    """Inside, modules wrapped by `torch.compile` run eagerly: compiled programs ignore hooks, or fail under them."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and the import takes a second
        return nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


@contextmanager
def restored_on_error(model: nn.Module, *, but: tuple[type[BaseException], ...] = ()) -> Iterator[None]:
    """Restore `model` after any error in the body, including an interrupt.

    Restored: values, `requires_grad` and `.grad` of parameters, buffers, masks, training flags and the random states.
    For work in place; it costs a copy of the model. but: errors that leave the model in its intended state.
    """
    tensors = [*model.parameters(), *model.buffers()]
    undos = [_written(tensor) for tensor in tensors]
    undos += [_held_gradient(parameter) for parameter in model.parameters()]
    undos += [_record(module) for module in model.modules()]
    flags, random_state = [(module, module.training) for module in model.modules()], rng_state()
    try:
        yield
    except BaseException as error:
        if not isinstance(error, but):
            for undo in undos:
                undo()
            _set_flags(flags)
            restore_rng_(random_state)
        raise


def _written(tensor: Tensor) -> Undo:
    before = tensor.detach().clone()

    def undo() -> None:
        with writable(tensor):
            tensor.copy_(before)

    return undo


def _held_gradient(parameter: nn.Parameter) -> Undo:
    required, grad = parameter.requires_grad, parameter.grad

    def undo() -> None:
        if parameter.requires_grad != required:
            parameter.requires_grad_(required)
        parameter.grad = grad

    return undo


def _record(module: nn.Module) -> Undo:
    masks = vars(module).get(RECORD)
    before = None if masks is None else dict(masks)

    def undo() -> None:
        if before is not None:
            vars(module)[RECORD] = before
        else:
            vars(module).pop(RECORD, None)

    return undo


def outside_inference() -> AbstractContextManager[Any]:
    """Inside, new tensors allow gradients, also if the caller is in `torch.inference_mode()`."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


@contextmanager
def writable(tensor: Tensor) -> Iterator[None]:
    """Inside, the values of a tensor can be written, also if it was made in `torch.inference_mode()`."""
    guard = torch.inference_mode() if tensor.is_inference() else nullcontext()
    with guard, torch.no_grad():
        yield


def losses_in_training_(model: nn.Module, batch: Any, loss: Callable[[nn.Module, Any], Any] | None) -> bool:
    """Whether a loss that failed in evaluation mode works in training mode; if so, the model is left in that mode.

    Detectors return their losses only in training mode. Modules that draw random numbers or track statistics remain in
    evaluation mode. Call it inside a guard that restores the flags.
    """
    if loss is None:
        return False
    flags = [(module, module.training) for module in model.modules()]
    for module in model.modules():
        module.training = not isinstance(module, _NormBase | _DropoutNd)
    try:
        loss(model, batch)
    except Exception:  # whatever a user's function raises: it fails in both modes
        _set_flags(flags)
        return False
    log.warning("the loss exists only in training mode: it runs there, with norms and dropout in evaluation mode")
    return True


@contextmanager
def _fresh_casts() -> Iterator[None]:
    """Disable the cache of autocast, which keeps copies of weights after a change of the weights."""
    kept = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(kept)
        torch.clear_autocast_cache()


@contextmanager
def _without_fast_path() -> Iterator[None]:
    """Disable the fused transformer layers of torch, which hide their weights."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _gradient(parameter: nn.Parameter) -> Undo:
    required, grad = parameter.requires_grad, parameter.grad

    def undo() -> None:
        if parameter.requires_grad != required:  # tensors of the inference mode refuse to be set at all
            parameter.requires_grad_(required)
        parameter.grad = grad

    parameter.grad = None  # so that a backward pass does not add to the caller's
    return undo


def _set_flags(flags: list[tuple[nn.Module, bool]]) -> None:
    for module, flag in flags:
        module.training = flag


def _buffers(model: nn.Module) -> list[Undo]:
    return [
        _buffer(module, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]


def _switched(model: nn.Module) -> list[Undo]:
    """Undo writes of the user's own `train` methods to parameters."""
    own_train = [module for module in model.modules() if type(module).train is not nn.Module.train]
    parameters = {id(parameter): parameter for module in own_train for parameter in module.parameters()}
    return [_value_of(parameter, _held) for parameter in parameters.values()]


_held: WeakValueDictionary[int, Tensor] = WeakValueDictionary()
"""Values of parameters that guards store, by the id of the parameter, which lives as long as the value."""


def _buffer(module: nn.Module, name: str, buffer: Tensor) -> Undo:
    value = _value_of(buffer)

    def undo() -> None:
        module._buffers[name] = buffer
        value()

    return undo


def _value_of(tensor: Tensor | None, held: MutableMapping[int, Tensor] | None = None) -> Undo:
    """Undo writes into a tensor. A tensor on the meta device has no values to restore.

    held: a nested guard shares the value stored by the outer guard, if the tensor still has it: otherwise each guard
    would add a copy of a language model to the memory.
    """
    if tensor is None or tensor.device.type == "meta":
        return lambda: None
    outer = None if held is None else held.get(id(tensor))
    before = outer if outer is not None and _equal(tensor, outer) else tensor.detach().clone()
    if held is not None:
        held[id(tensor)] = before

    def undo() -> None:
        if not _equal(tensor, before):
            with writable(tensor):
                if tensor.shape != before.shape:  # an observer gets its size from the first data
                    tensor.resize_(before.shape)
                tensor.copy_(before)

    return undo


def _equal(tensor: Tensor, before: Tensor) -> bool:
    try:
        return torch.equal(tensor, before)
    except (RuntimeError, TypeError):  # layouts that torch does not compare
        return False


def _attributes(model: nn.Module) -> list[Undo]:
    seen = set[int]()
    undos = [_plain(vars(module), seen) for module in model.modules()]
    undos += undo_numbers(model)
    return [*undos, *(undo for value in values_beside(model) for undo in _undos_of(value, seen))]


def _plain(attributes: dict[str, Any], seen: set[int]) -> Undo:
    """Undo changes of plain attributes, so that no cache remains after a run. seen: values restored elsewhere."""
    before = {key: value for key, value in attributes.items() if key not in _MACHINERY}
    hooks = [value for value in before.values() if is_empty(value)]
    undos = [undo for value in before.values() if not is_empty(value) for undo in _undos_of(value, seen)]

    def undo() -> None:
        for key in [key for key in attributes if key not in before and key not in _MACHINERY]:
            del attributes[key]
        attributes.update(before)
        for value in hooks:
            if not is_empty(value):
                value.clear()
                getattr(value, "__dict__", value).clear()
        for restore in undos:
            restore()

    return undo


def _undos_of(value: Any, seen: set[int], depth: int = 0) -> Iterator[Undo]:
    """Functions that restore the contents of a value; most values have none.

    Objects and containers in it are restored too, such as the dictionary of a cache.
    """
    if type(value) in _ATOMS or id(value) in seen:
        return
    seen.add(id(value))
    inner: Iterable[Any] = ()
    if type(value) in CONTAINERS:
        yield _content_of(value)
        inner = value.values() if isinstance(value, dict) else value
    if isinstance(value, Tensor):
        yield _value_of(value)
    if _is_plain_object(value):
        yield _content_of(vars(value))
        inner = vars(value).values()
    slots = _slots_of(value)
    if slots:
        yield _slots_undo(value, slots)
        inner = slots.values()
    if isinstance(value, torch.Generator):
        yield _state_of(value)
    for item in list(inner) if depth < _DEPTH else ():
        if not isinstance(item, Tensor | nn.Module):  # their content is large
            yield from _undos_of(item, seen, depth + 1)


_ATOMS = frozenset({type(None), bool, int, float, str, tuple, type, FunctionType, MethodType})
_DEPTH = 3
"""Depth to which objects in attributes are restored."""


def _slots_of(value: object) -> dict[str, Any]:
    """The values in the `__slots__` of an object of a user's class."""
    kinds = [kind for kind in type(value).__mro__ if "__slots__" in vars(kind)]
    if not kinds or isinstance(value, Tensor | ModuleType) or not is_source(_file_of(type(value))):
        return {}
    names = [name for kind in kinds for name, entry in vars(kind).items() if isinstance(entry, MemberDescriptorType)]
    return {name: getattr(value, name) for name in names if hasattr(value, name)}


def _file_of(kind: type) -> str:
    return getattr(sys.modules.get(kind.__module__), "__file__", None) or "<"


def _slots_undo(value: object, slots: dict[str, Any]) -> Undo:
    def undo() -> None:
        for name, before in slots.items():
            if getattr(value, name, None) is not before:
                object.__setattr__(value, name, before)

    return undo


def _is_plain_object(value: object) -> bool:
    """Whether a value is an object with attributes, such as a configuration or a record of features."""
    excluded = isinstance(value, nn.Module | Tensor | type | ModuleType) or callable(value)
    return not excluded and type(getattr(value, "__dict__", None)) is dict


def _state_of(generator: torch.Generator) -> Undo:
    before = generator.get_state()

    def undo() -> None:
        generator.set_state(before)

    return undo


def _content_of(container: Any) -> Undo:
    """Undo insertions into and removals from a list, dictionary or set."""
    before = container.copy()

    def undo() -> None:
        if _differs(container, before):
            container.clear()
            container.extend(before) if isinstance(container, list | deque) else container.update(before)

    return undo


def _differs(container: Any, before: Any) -> bool:
    if len(container) != len(before):
        return True
    if isinstance(container, set):
        return bool(container != before)
    if isinstance(container, dict):
        return any(key not in container or container[key] is not kept for key, kept in before.items())
    return any(now is not kept for now, kept in zip(container, before, strict=True))
