"""One run of a copy of a model under the conditions of the oracle, and what is observed of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from prunella.errors import NotSupported, one_line
from prunella.graph.cut.changes import Along
from prunella.graph.data import PLAIN, Setting
from prunella.graph.double import NoDownCast
from prunella.graph.noise import quiet
from prunella.graph.restricted import Restricted
from prunella.graph.trace.answers import AnswerMode
from prunella.graph.trace.kept import kept_on
from prunella.graph.trace.kept_state import enter
from prunella.model.forward import outputs_of
from prunella.model.hooks import removed_after
from prunella.model.rng import rng_state
from prunella.model.state import Steady
from prunella.model.trees import tensors


@dataclass(frozen=True)
class Observed:
    """The results of a run. kept: tensors that it leaves on the model. inner: outputs of inner modules, if requested.

    drew: whether it drew random numbers.
    """

    outputs: list[Tensor]
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    inner: Mapping[str, Tensor] = field(default_factory=dict)
    drew: bool = False


class SteadyCopy(Steady):
    """A model to run often, in the same state before each run."""

    @cached_property
    def kept(self) -> dict[int, Tensor]:
        """The tensors that the model keeps before each run."""
        return _kept_by_id(self.model)


def _kept_by_id(model: nn.Module) -> dict[int, Tensor]:
    return {id(tensor): tensor for tensor in kept_on(model).values()}


def observed_run(
    steady: SteadyCopy,
    inputs: Any,
    along: Sequence[Along] = (),
    *,
    still: bool = False,
    inner: bool = False,
    setting: Setting = PLAIN,
) -> Observed:
    """Run on seeded random numbers. still: draw numbers that do not depend on sizes. inner: see `Observed`."""
    named, model = dict[str, Tensor](), steady.model
    try:
        with ExitStack() as stack:
            stack.enter_context(steady.run(_SEED))
            stack.enter_context(torch.no_grad())
            stack.enter_context(quiet() if still else nullcontext())
            stack.enter_context(NoDownCast())
            enter(model, setting, lambda batch: _restricted(model, batch, along))
            before = _kept_by_id(model) if setting.before or setting.kept else dict(steady.kept)
            stack.enter_context(_inner_outputs(model, named) if inner else nullcontext())
            stack.enter_context(Restricted(along) if along else nullcontext())
            stack.enter_context(AnswerMode(setting.answers, model=model) if setting.answers else nullcontext())
            seeded_state = rng_state()["torch"]
            outputs = outputs_of(model, inputs)
            drew = not torch.equal(seeded_state, rng_state()["torch"])
            before |= {id(tensor): tensor for tensor in outputs}
            kept = {name: tensor for name, tensor in kept_on(model).items() if id(tensor) not in before}
    except (RuntimeError, ValueError, AssertionError, LookupError, TypeError, AttributeError) as error:
        raise NotSupported(
            "the smaller model does not run",
            one_line(error),
            "a size in its source does not follow the cut; skip= excludes the layers that you name",
        ) from error
    return Observed(outputs, kept, named, drew)


def _restricted(model: nn.Module, batch: Any, along: Sequence[Along]) -> None:
    with Restricted(along):
        outputs_of(model, batch)


_SEED = 0


@contextmanager
def _inner_outputs(model: nn.Module, named: dict[str, Tensor]) -> Iterator[None]:
    """Collect the outputs of all calls of modules."""
    count: Counter[str] = Counter()

    def seen(path: str, output: Any) -> None:
        count[path] += 1
        for number, tensor in enumerate(tensors(output)):
            named[f"{path} {count[path]} {number}"] = tensor.clone()

    handles = [
        module.register_forward_hook(lambda _, __, output, path=path: seen(path, output))
        for path, module in model.named_modules()
    ]
    with removed_after(handles):
        yield
