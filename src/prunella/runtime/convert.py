"""`prunella.sparse`: replaces the layers that are faster without their zeros, by measurement."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.fx import GraphModule

from prunella.errors import RequestError
from prunella.measure.clock import now, since
from prunella.measure.machine import last_cache
from prunella.model.copying import frozen_copy
from prunella.model.device import devices_of, on_accelerator
from prunella.runtime import accelerated
from prunella.runtime.assemble import MIN_SPARSITY, Forms, assembled, why_kept_dense
from prunella.runtime.fx.fuse import (
    Fused,
    fusions,
    has_hooks,
    traced,
)
from prunella.runtime.kernels.config import Precision
from prunella.runtime.record import LayerRecord, Sparsified, shapes_of, why_not_faster, with_record
from prunella.runtime.tuning import acceptance
from prunella.runtime.tuning.acceptance import Acceptance
from prunella.runtime.tuning.choice import Problem, Route, is_replacement
from prunella.runtime.tuning.configs import FEW_TOKENS
from prunella.runtime.tuning.eligible import (
    NOT_CALLED,
    InputShapes,
    LayerForm,
    Layers,
    bias_of,
    input_shapes,
    problems,
    read_layers,
    weight_of,
)
from prunella.runtime.tuning.tune import Tuner, Verdict, cache_eviction, density
from prunella.types import Inputs


def sparse(
    model: nn.Module,
    example: Inputs,
    *,
    precision: Precision = Precision.FP32,
    tokens: Sequence[int] = (),
    fuse: bool = True,
    seconds: float = 1.0,
    seed: int = 0,
) -> nn.Module:
    """A copy of `model` for inference in which linear layers and convolutions skip their zeros, where that is faster.

    A layer is a module of any class that multiplies its input by its weight and does nothing else. Each layer is
    measured for the sizes that `example` has and, if linear, for fewer tokens too (1, 2, 4, 8, 32, 128 ...), against
    the best dense operation of torch, with the current number of threads. If the weights of the model do not fit the
    caches, they are read from memory in the measurement. Then the full model is measured on the example and on its
    first token; if it is not faster, the copy is dense. In a model that does not fit the caches, linear layers without
    zeros and those with a tied weight may run a kernel for a few tokens. `sparsified(model)` says what was chosen and
    why. On a CUDA device the candidates are dense code, also compiled, 2:4 and blocks by operations of torch (never run
    on a GPU yet). Run the copy without gradients (`torch.inference_mode()`); its parameters require none.
    `torch.compile` and `copy.deepcopy` work. Without the compiled kernels only operations of torch are candidates.

    precision: BF16 and INT8 also try kernels that round. INT8 rounds the weights of linear layers and their inputs.
    Dense int8 is a candidate, for layers without zeros too. The record states the largest difference of the outputs.
    tokens: further numbers of tokens. fuse: fuse batch norms, activations and residuals with the layer before them.
    Where `torch.fx` can trace the model, the copy is a graph module; elsewhere only activation modules are fused.
    seconds: of measurement for each kind of layer. Errors: RequestError for sizes out of range or an example that the
    model does not accept, CheckFailed if the output differs.

    Example:

        >>> import torch, prunella as pr
        >>> model, x = torch.nn.Linear(256, 256).eval(), torch.randn(32, 256)
        >>> model.weight.data *= torch.rand(256, 256) > 0.95
        >>> quick = pr.sparse(model, x, seconds=0.05)
        >>> torch.allclose(quick(x), model(x), atol=1e-4)
        True
        >>> record = pr.runtime.sparsified(quick)  # what was chosen for each layer, and why
    """
    check_request(tokens, seconds)
    begin, dense = now(), frozen_copy(model)
    layers = read_layers(dense, example)
    if on_accelerator(devices_of(dense)):
        return _sparse_there(dense, layers, example, tokens, seconds, seed, begin)
    tuner = tuner_for(dense, precision, seconds, seed)
    tuner.channels_last, fused = convolution_context(dense, layers.forms, example, fuse)
    builder = _Builder(dense, layers.forms, example, fuse, precision)
    candidate = builder.candidate(_measure_layers(dense, layers, tokens, tuner, fused))
    candidate = _for_first_token(builder, candidate, layers.shapes)
    result = candidate.model if candidate.outcome.kept and candidate.model is not None else dense
    record = Sparsified(
        candidate.layers,
        candidate.outcome,
        others=_with_zeros(dense, {name: why for name, why in layers.others.items() if why != NOT_CALLED}),
        seconds=since(begin),
        precision=precision,
        traced=shapes_of(example) if isinstance(result, GraphModule) and result is not dense else (),
        channels_last=candidate.channels_last and candidate.outcome.kept,
    )
    return with_record(result, record)


def _sparse_there(
    dense: nn.Module, layers: Layers, example: Inputs, tokens: Sequence[int], seconds: float, seed: int, begin: float
) -> nn.Module:
    """The sparse model of a dense one on accelerators: the same record, and the same promise that it is not slower."""
    builder = _Builder(dense, layers.forms, example, False, accelerated.precision_of(dense), there=True)
    candidate = builder.candidate(accelerated.measured(dense, layers, tokens, seconds, seed))
    candidate = _for_first_token(builder, candidate, layers.shapes)
    result = candidate.model if candidate.outcome.kept and candidate.model is not None else dense
    record = Sparsified(
        candidate.layers,
        candidate.outcome,
        accelerated.environment(dense),
        since(begin),
        others=_with_zeros(dense, {name: why for name, why in layers.others.items() if why != NOT_CALLED}),
    )
    return with_record(result, record)


def check_request(tokens: Sequence[int], seconds: float) -> None:
    """Errors: RequestError for sizes or seconds out of range."""
    if any(type(number) is not int or number < 1 for number in tokens):
        raise RequestError(f"tokens={list(tokens)!r} is out of range", "each is an integer of at least 1")
    if not 0 < seconds < math.inf:
        raise RequestError(f"seconds={seconds!r} is out of range", "it is a positive number")


# -- measurement of the layers ----------------------------------------------------------------------------------------


def tuner_for(model: nn.Module, precision: Precision, seconds: float, seed: int) -> Tuner:
    """A tuner that measures layers as they run in the model: with weights from memory if they do not fit the caches."""
    cache, weights = last_cache(), sum(p.nbytes for p in model.parameters())
    return Tuner(precision, seconds, seed, cache_eviction(cache) if weights > cache else None)


def convolution_context(dense: nn.Module, forms: Forms, example: Inputs, fuse: bool) -> tuple[bool, dict[str, Fused]]:
    """Whether convolutions are measured in the layout channels last, and what is fused with each."""
    replica = frozen_copy(dense)
    layers = {name: replica.get_submodule(name) for name in forms}
    convolutions = {name: layer for name, layer in layers.items() if forms[name].geometry is not None}
    if not convolutions:
        return False, {}
    program = traced(replica, layers, example) if fuse else None
    channels_last = acceptance.measures_channels_last(program, example)
    return channels_last, {} if program is None else fusions(program, convolutions)


def _measure_layers(
    model: nn.Module, layers: Layers, tokens: Sequence[int], tuner: Tuner, fused: Mapping[str, Fused]
) -> tuple[LayerRecord, ...]:
    with torch.inference_mode(False), torch.no_grad():
        measured = [
            _measure_layer(model, name, form, layers.shapes[name], tokens, tuner, fused.get(name, Fused()))
            for name, form in layers.forms.items()
        ]
        uncalled = {name: why for name, why in layers.others.items() if why == NOT_CALLED}
        return (*measured, *_with_zeros(model, uncalled))


def _with_zeros(model: nn.Module, reasons: Mapping[str, str]) -> tuple[LayerRecord, ...]:
    """Those of other matrices that have zeros, with the reasons that they stay dense."""
    weights = dict(model.named_parameters(remove_duplicate=False))
    records = []
    for name, why in reasons.items():
        weight = weights[name if name in weights else f"{name}.weight".lstrip(".")]
        zeros = 1 - density(weight) if weight.numel() else 0.0
        if zeros >= MIN_SPARSITY:
            records.append(LayerRecord(name, zeros, (), why))
    return tuple(records)


def _measure_layer(
    model: nn.Module,
    name: str,
    form: LayerForm,
    shapes: set[tuple[int, ...]],
    tokens: Sequence[int],
    tuner: Tuner,
    fused: Fused,
) -> LayerRecord:
    module = model.get_submodule(name)
    weight = form.matrix(module)
    zeros = 1 - density(weight) if weight.numel() else 0.0
    why = _why_not_measured(module)
    todo = () if why else problems(form, shapes, tokens)
    if why or not todo:
        return LayerRecord(name, zeros, (), why or "the sizes of its input are unknown")
    bias, keep_dense = bias_of(module), why_kept_dense(model, module)
    if keep_dense:
        int8 = tuner.precision is Precision.INT8 and form.geometry is None
        tried = todo if int8 else tuple(problem for problem in todo if problem.size <= FEW_TOKENS)
        if not (int8 or tuner.evict is not None) or not form.plain or not tried:
            return LayerRecord(name, zeros, (), keep_dense)
        verdicts = tuner.keep_dense(weight, bias, tried)
        verdicts = verdicts if int8 else (*verdicts, Verdict(Problem(FEW_TOKENS + 1), Route.TORCH))
    elif form.geometry is not None:
        verdicts = tuner.conv(weight, bias, form.geometry, todo, fused)
    else:
        verdicts = tuner.linear(weight, bias, todo)
    wins = any(is_replacement(verdict.choice) for verdict in verdicts)
    return LayerRecord(name, zeros, verdicts, "" if wins else keep_dense or why_not_faster(verdicts[-1]))


def _why_not_measured(module: nn.Module) -> str:
    """Why a layer stays dense without a measurement; empty if it is measured."""
    weight = weight_of(module)
    if weight.dtype is not torch.float32 or weight.device.type != "cpu":
        return f"its weight is {str(weight.dtype)[6:]} on {weight.device.type}"
    if has_hooks(module):
        return "it has hooks or a parametrization"
    return ""


# -- the full model ---------------------------------------------------------------------------------------------------


_SLOWER = "the full model stays dense: it is slower for one token, and no layer is faster for more tokens"


@dataclass(frozen=True)
class _Candidate:
    """A model with the layers that are faster replaced; None if no layer is."""

    model: nn.Module | None
    channels_last: bool
    layers: tuple[LayerRecord, ...]
    outcome: Acceptance


@dataclass(frozen=True)
class _Builder:
    """Builds the sparse model of a dense one, and measures it on the example. there: on an accelerator."""

    dense: nn.Module
    forms: Forms
    example: Inputs
    fuse: bool
    precision: Precision
    there: bool = False

    def candidate(self, layers: tuple[LayerRecord, ...], *, dense_for_few: bool = False) -> _Candidate:
        """The model with these layers, measured. dense_for_few: whether dense code runs for a few tokens."""
        model, channels_last = self._build(layers)
        if model is None:
            return _Candidate(None, False, layers, Acceptance(_SLOWER if dense_for_few else _why_no_layer(layers)))
        elsewhere = not dense_for_few and any(
            is_replacement(v.choice) for layer in layers for v in layer.verdicts[:-1] if not v.problem.image
        )
        outcome = acceptance.judge(self.dense, model, self.example, self.precision, gains_elsewhere=elsewhere)
        return _Candidate(model, channels_last, layers, outcome)

    def _build(self, layers: Sequence[LayerRecord]) -> tuple[nn.Module | None, bool]:
        tables = {layer.name: layer.table for layer in layers if not layer.why}
        if not tables:
            return None, False
        with torch.inference_mode(False), torch.no_grad():
            if self.there:
                return accelerated.assembled_there(frozen_copy(self.dense), self.forms, tables), False
            model = assembled(frozen_copy(self.dense), self.forms, tables, self.example if self.fuse else None)
            return acceptance.with_channels_last(model, self.example)


def _for_first_token(builder: _Builder, candidate: _Candidate, shapes: InputShapes) -> _Candidate:
    """The candidate, with dense code for a few tokens if it is slower on the first token of the example."""
    if candidate.model is None or not candidate.outcome.kept:
        return candidate
    token = one_token(builder.dense, builder.example, shapes)
    if token is None:
        return candidate
    ratio = acceptance.speedup(builder.dense, candidate.model, token)
    if ratio.slower:
        before = candidate.outcome
        candidate = builder.candidate(tuple(map(_dense_for_few, candidate.layers)), dense_for_few=True)
        if candidate.model is None:  # the speed that decided was measured with the layers
            measured = replace(candidate.outcome, full_model=before.full_model, difference=before.difference)
            candidate = replace(candidate, outcome=measured)
    return replace(candidate, outcome=replace(candidate.outcome, first_token=ratio))


def _dense_for_few(layer: LayerRecord) -> LayerRecord:
    """The layer with dense code for a few tokens."""
    verdicts = tuple(replace(v, choice=Route.TORCH) if v.problem.size <= FEW_TOKENS else v for v in layer.verdicts)
    keeps_why = layer.why or any(is_replacement(verdict.choice) for verdict in verdicts)
    why = layer.why if keeps_why else "the full model is slower for one token with it"
    return replace(layer, verdicts=verdicts, why=why)


def one_token(model: nn.Module, example: Inputs, shapes: InputShapes) -> Inputs | None:
    """The first token of an example of several; None unless every linear layer then gets exactly one token."""
    token = acceptance.first_token(example)
    try:
        token_shapes = input_shapes(model, token)
    except RequestError:  # the second axis of the example does not count tokens
        return None
    linear = [name for name in shapes if name in token_shapes and weight_of(model.get_submodule(name)).dim() == 2]
    counts = [(_tokens(shapes[name]), _tokens(token_shapes[name])) for name in linear]
    return token if counts and all(one == 1 for _, one in counts) and any(many > 1 for many, _ in counts) else None


def _tokens(shapes: set[tuple[int, ...]]) -> int:
    return max((math.prod(shape[:-1]) for shape in shapes), default=0)


def _why_no_layer(layers: tuple[LayerRecord, ...]) -> str:
    if not layers:
        return "the model has no linear layer and no convolution that could skip zeros"
    return "no layer is faster without its zeros" if any(layer.verdicts for layer in layers) else layers[0].why
