"""Guards of a model's state: one for training flags, one for everything that a run may change.

`mode` serves work that may change weights (recovery, in-place solvers), `untouched` serves inspection of a model.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from prunella.model.rng import restore_rng_, rng_state, seeded
from prunella.model.undo import (
    Undo,
    attribute_undos,
    buffer_undos,
    gradient_undo,
    parameter_undos,
    value_of,
    writable,
)
from prunella.model.unwrap import RECORD

log = logging.getLogger(__name__)

_TORCH = str(Path(torch.__file__).parent)


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
def evaluation_flags(model: nn.Module) -> Iterator[None]:
    """Inside, no module is in training mode. The flags are set without `train()`, which may merge weights."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        _set_flags([(module, False) for module, _ in flags])
        yield
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
    with Steady(model, parameters=parameters).run(seed):
        yield


class Steady:
    """`untouched` for many runs of one model, which between them is as it is now: its state is taken once.

    values: of all parameters are restored too, so that of many runs of a copy each has the same model.
    """

    def __init__(self, model: nn.Module, *, parameters: bool = True, values: bool = False) -> None:
        self.model = model
        with outside_inference():
            self._undos: list[Undo] = [gradient_undo(parameter) for parameter in model.parameters()]
            self._undos += [
                *buffer_undos(model),
                *attribute_undos(model),
                *(parameter_undos(model) if parameters else ()),
            ]
            self._undos += [value_of(parameter) for parameter in model.parameters()] if values else []
        flags = [(module, module.training) for module in model.modules()]
        self._undos.append(lambda: _set_flags(flags))

    @contextmanager
    def run(self, seed: int | None = None) -> Iterator[None]:
        """One run, after which everything is as before; see `untouched`."""
        with ExitStack() as stack:
            stack.enter_context(outside_inference())
            stack.enter_context(seeded(seed))
            stack.enter_context(_without_fast_path())
            stack.enter_context(without_compile())
            stack.callback(_undo_all, self._undos)
            for parameter in self.model.parameters():
                parameter.grad = None  # so that a backward pass does not add to the caller's
            self.model.eval()
            yield


def _undo_all(undos: Sequence[Undo]) -> None:
    """Undo, the last first; an error of one does not keep the others from it."""
    failed: BaseException | None = None
    for undo in reversed(undos):
        try:
            undo()
        except BaseException as error:
            failed = error
    if failed is not None:
        raise failed


@contextmanager
def restored_state(model: nn.Module) -> Iterator[None]:
    """Restore buffers and plain attributes after the body: a part of `untouched`, for runs inside it."""
    with ExitStack() as stack:
        for undo in (*buffer_undos(model), *attribute_undos(model)):
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


def _set_flags(flags: list[tuple[nn.Module, bool]]) -> None:
    for module, flag in flags:
        module.training = flag
