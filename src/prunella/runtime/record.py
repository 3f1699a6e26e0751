"""The record of the choices of `prunella.sparse`: attached to the model, printable, and saved with it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from prunella.errors import RequestError
from prunella.measure.machine import cpu_name
from prunella.model.unwrap import unwrap
from prunella.runtime.kernels import library
from prunella.runtime.kernels.config import Precision
from prunella.runtime.tuning.acceptance import Acceptance
from prunella.runtime.tuning.choice import Route, Table, describe, is_dense
from prunella.runtime.tuning.tune import Verdict
from prunella.types import Inputs

Shapes = tuple[tuple[tuple[int, ...], str], ...]
"""Shape and type of each input of a trace."""
_RECORD = "prunella_sparsified"


@dataclass(frozen=True)
class LayerRecord:
    """The measured choice of a layer. sparsity: fraction of its weights that are zero.

    verdicts: one for each number of tokens that was measured; the ratio is of the best kernel that skips zeros against
    the best dense operation. why: why the layer stays dense; empty if it skips zeros for some number of tokens.
    """

    name: str
    sparsity: float
    verdicts: tuple[Verdict, ...] = ()
    why: str = ""

    @property
    def table(self) -> Table:
        """Number of tokens -> choice."""
        return Table(tuple((verdict.problem.size, verdict.choice) for verdict in self.verdicts))

    def __str__(self) -> str:
        head = f"{self.name}  {self.sparsity:.0%} zeros"
        return f"{head}  dense: {self.why}" if self.why else "  ".join([head, *map(_phrase, self.verdicts)])


@dataclass(frozen=True)
class Environment:
    """The conditions under which the measurements are valid."""

    threads: int
    machine: str
    kernels: str

    @staticmethod
    def here() -> Environment:
        """This process on this machine."""
        return Environment(torch.get_num_threads(), cpu_name(), _kernels())

    def __str__(self) -> str:
        return f"{self.threads} thread{'s' * (self.threads > 1)}, {self.machine}, kernels: {self.kernels}"


@dataclass(frozen=True)
class Sparsified:
    """The result of `sparse`.

    seconds: that it took. traced: inputs of the trace, if layers were fused with its help. channels_last: whether
    images run in that layout. action: what the replaced layers do, for the printed record. others: the matrices that
    have zeros, with the reasons that no kernel can take them.
    """

    layers: tuple[LayerRecord, ...]
    outcome: Acceptance
    environment: Environment = field(default_factory=Environment.here)
    seconds: float = 0.0
    precision: Precision = Precision.FP32
    traced: Shapes = ()
    channels_last: bool = False
    action: str = "skip their zeros"
    others: tuple[LayerRecord, ...] = ()

    @property
    def replaced(self) -> tuple[str, ...]:
        """Names of the layers that were replaced."""
        return tuple(layer.name for layer in self.layers if not layer.why) if self.outcome.kept else ()

    def _action(self) -> str:
        """What the replaced layers do; how many only run in dense int8."""
        replaced = [layer for layer in self.layers if layer.name in self.replaced and not layer.table.sparse]
        dense = sum(any(choice is Route.INT8 for _, choice in layer.table.entries) for layer in replaced)
        return f"{self.action}, but {dense} of them run dense int8" if dense else self.action

    def __str__(self) -> str:
        outcome = self.outcome
        speed = "not measured" if outcome.full_model is None else outcome.full_model.verdict
        head = f"{len(self.replaced)} of {len(self.layers)} layers {self._action()}; the full model: {speed}"
        if outcome.first_token is not None:
            effect = ", so dense code runs there" if outcome.first_token.slower else ""
            head = f"{head}; for one token: {outcome.first_token.verdict}{effect}"
        layout = ", channels last" if self.channels_last else ""
        why = [] if outcome.kept else [outcome.why]
        if self.precision is not Precision.FP32 and outcome.full_model is not None:
            head = f"{head}; outputs differ by at most {outcome.difference:.1%} of the largest ({self.precision.value})"
        return "\n".join([head, *why, f"{self.environment}{layout}", *map(str, self.layers), *map(str, self.others)])


def sparsified(model: nn.Module) -> Sparsified:
    """The record of a model that `sparse` or `dense_fast` made. Errors: RequestError for another model."""
    bare = unwrap(model)
    record = getattr(bare, _RECORD, None) or getattr(bare, "meta", {}).get(_RECORD)
    if not isinstance(record, Sparsified):
        raise RequestError("this model has no record", "prunella.sparse did not make it", "call prunella.sparse first")
    return record


def with_record(model: nn.Module, record: Sparsified) -> nn.Module:
    """The model, with the record that `sparsified` reads; copies of the model keep it."""
    if isinstance(model, GraphModule):
        model.meta[_RECORD] = record
    else:
        setattr(model, _RECORD, record)
    return model


def shapes_of(example: Inputs) -> Shapes:
    """Shape and type of each tensor of an example that a model was traced with."""
    parts = example if isinstance(example, tuple) else (example,)
    return tuple((tuple(part.shape), str(part.dtype)[6:]) for part in parts if isinstance(part, Tensor))


def why_not_faster(verdict: Verdict) -> str:
    """The reason that a measured layer stays dense."""
    unsure = verdict.ratio is not None and verdict.ratio.value > 1
    head = "no kernel is faster beyond doubt" if unsure else "no kernel is faster"
    return f"{head} ({verdict.problem.size}: {_best(verdict)})"


def _kernels() -> str:
    """The tier of the compiled kernels, or why there are none."""
    return library.isa() if library.available() else f"none, only those of torch ({library.missing()})"


def _phrase(verdict: Verdict) -> str:
    """The operation that runs for a size, and the best kernel where that operation is dense."""
    dense = is_dense(verdict.choice) and verdict.best is not None
    name = describe(verdict.choice) if verdict.choice is Route.INT8 else "dense"
    return f"{verdict.problem.size}: {f'{name} ({_best(verdict)})' if dense else _best(verdict)}"


def _best(verdict: Verdict) -> str:
    speed = "" if verdict.ratio is None else f" {verdict.ratio.value:.2f}x"
    return f"{describe(verdict.best or verdict.choice)}{speed}"
