"""`prunella.sparse`: replace the layers whose zeros pay, and only those; measured, and said honestly."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from prunella.errors import RequestError
from prunella.measure.machine import cpu_name, last_cache
from prunella.measure.timing import Ratio
from prunella.model.unwrap import unwrap
from prunella.runtime.fx.chain import chain_
from prunella.runtime.fx.eager_fuse import pairs
from prunella.runtime.fx.fuse import Fused, activation_of, called, copied, fold_, fuse_, hooked, joins, traced
from prunella.runtime.kernels import library as native
from prunella.runtime.kernels.library import Activation, Precision
from prunella.runtime.layers import FastLinear, SparseConv2d, SparseLinear
from prunella.runtime.tuning import acceptance as whole
from prunella.runtime.tuning.choice import Problem, Route, Table, is_dense, spell
from prunella.runtime.tuning.configs import FEW_TOKENS
from prunella.runtime.tuning.eligible import bias_of, geometry_of, is_conv1d, matrix_of, problems, sizes, targets
from prunella.runtime.tuning.tune import Tuner, Verdict, density, forgetting
from prunella.types import Inputs

LEAST = 0.1
"""A layer with a smaller part of zeros stays whole; measured for a few tokens, if the model exceeds the caches."""
_RECORD = "prunella_sparsified"


@dataclass(frozen=True)
class Layer:
    """What a layer runs and why. sparsity: part of its weights that is zero.

    verdicts: one for each number of tokens that was measured; the ratio is of the best kernel that skips zeros against
    the best dense operation. why: empty where zeros are skipped for some number of tokens.
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
class Sparsified:
    """What `sparse` did. kept: whether the layers were replaced; `why` says why not. seconds: that it took.

    whole: the model against the dense one on the example, interleaved; above 1 is faster. difference: between their
    outputs, relative to the largest.
    """

    layers: tuple[Layer, ...]
    kept: bool
    why: str
    whole: Ratio | None
    difference: float
    threads: int
    machine: str
    kernels: str
    seconds: float
    precision: Precision = Precision.FP32
    traced: tuple[tuple[tuple[int, ...], str], ...] = ()
    """Shape and type of each input of the trace that layers were fused by; none, if none were."""
    does: str = "skip their zeros"
    one: Ratio | None = None
    """As `whole`, for one token, where the example can be cut to that; if slower, it is why dense code runs there."""
    last: bool = False
    """Whether images run with their channels as the last axis."""

    @property
    def replaced(self) -> tuple[str, ...]:
        """Names of the layers that skip zeros."""
        return tuple(layer.name for layer in self.layers if not layer.why) if self.kept else ()

    def __str__(self) -> str:
        speed = "not measured" if self.whole is None else self.whole.verdict
        head = f"{len(self.replaced)} of {len(self.layers)} layers {self.does}; the whole model: {speed}"
        if self.one is not None:
            so = ", so dense code runs there" if self.one.slower else ""
            head = f"{head}; for one token: {self.one.verdict}{so}"
        turned = ", channels last" if self.last else ""
        where = f"{self.threads} thread{'s' * (self.threads > 1)}, {self.machine}, kernels: {self.kernels}{turned}"
        return "\n".join([head, *([self.why] if self.why else []), where, *map(str, self.layers)])


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

    Every layer is measured for the sizes that `example` brings and, if linear, for fewer tokens too (1, 2, 4, 8, 32,
    128 ...), against the best dense operation of torch, with the current number of threads; with its weights in memory,
    not in a cache, if the model exceeds these. Then the whole model is, on the example and on its first token: if it is
    not faster, the copy is dense. In a model that exceeds the caches other linear layers, and those whose weight is
    tied, may run a kernel too where there are a few tokens. `sparsified(model)` says what was chosen and why. Run it
    without gradients (`torch.inference_mode()`); its parameters ask for none. `torch.compile` and `copy.deepcopy` work.

    precision: BF16 and INT8 (weights when decoding) also try kernels that round. tokens: further numbers of tokens.
    fuse: let batch norms, activations and residuals join the layer before them where `torch.fx` can follow the model,
    which then becomes a graph module; elsewhere only activation modules that nothing else reads from. seconds: of
    measurement for each kind of layer. Errors: RequestError for sizes out of range or an example that the model does
    not take, CheckFailed if the output differs.
    """
    check_request(tokens, seconds)
    begin, dense = time.perf_counter(), copied(unwrap(model))
    met = sizes(dense, example)
    tuner = tuner_for(dense, precision, seconds, seed)
    tuner.last, joined = around_convolutions(dense, example, fuse)
    with torch.inference_mode(False), torch.no_grad():
        found = tuple(
            _layer(dense, name, layer, met, tokens, tuner, joined.get(name, Fused()))
            for name, layer in targets(dense).items()
        )
    build = partial(_built, dense, example, fuse)
    made, last, one = *build(found), None
    ratio, difference, why = None, 0.0, _none(found)
    if made is not None:
        elsewhere = any(not is_dense(v.choice) for layer in found for v in layer.verdicts[:-1] if not v.problem.image)
        ratio, difference, why = whole.compared(dense, made, example, precision, elsewhere=elsewhere)
    short = None if made is None or why else shortened(dense, example, met)
    if made is not None and short is not None:
        one = whole.faster(dense, made, short)
        if one.slower:
            found = tuple(map(_dense_for_few, found))
            made, last = build(found)
            why = "the whole model stays dense: it is slower for one token, and nothing else is faster"
            if made is not None:  # what it runs on the example may have changed
                ratio, difference, why = whole.compared(dense, made, example, precision, elsewhere=False)
    kept = None if why else made
    record = Sparsified(
        found, kept is not None, why, ratio, difference, torch.get_num_threads(), cpu_name(),
        kernels(), time.perf_counter() - begin, precision,
        described(example) if isinstance(kept, GraphModule) else (), one=one, last=last and kept is not None,
    )  # fmt: skip
    return noted(dense if kept is None else kept, record)


def around_convolutions(dense: nn.Module, example: Inputs, fuse: bool) -> tuple[bool, dict[str, Fused]]:
    """Whether convolutions are measured with their channels as the last axis, and what joins each."""
    twin = copied(dense)
    layers = targets(twin)
    convolutions = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Conv2d)}
    if not convolutions:
        return False, {}
    program = traced(twin, layers, example) if fuse else None
    last = whole.last(program, example)
    return last, {} if program is None else joins(program, convolutions)


def tuner_for(model: nn.Module, precision: Precision, seconds: float, seed: int) -> Tuner:
    """Measures layers as the model meets them: with their weights in memory if all together exceed the caches."""
    cache, weights = last_cache(), sum(p.nbytes for p in model.parameters())
    return Tuner(precision, seconds, seed, forgetting(cache) if weights > cache else None)


def _built(dense: nn.Module, example: Inputs, fuse: bool, layers: Sequence[Layer]) -> tuple[nn.Module | None, bool]:
    """A copy with the layers that win replaced, None if none does; and whether images have channels last there."""
    tables = {layer.name: layer.table for layer in layers if not layer.why}
    if not tables:
        return None, False
    with torch.inference_mode(False), torch.no_grad():
        return whole.turned(assembled(copied(dense), tables, example if fuse else None), example)


def _dense_for_few(layer: Layer) -> Layer:
    """The layer with dense code for a few tokens."""
    kept = tuple(replace(v, choice=Route.TORCH) if v.problem.size <= FEW_TOKENS else v for v in layer.verdicts)
    wins = layer.why or any(not is_dense(verdict.choice) for verdict in kept)
    return replace(layer, verdicts=kept, why=layer.why if wins else "the whole model is slower for one token with it")


def sparsified(model: nn.Module) -> Sparsified:
    """What `sparse` did to this model. Errors: RequestError for a model that it did not make."""
    bare = unwrap(model)
    found = getattr(bare, _RECORD, None) or getattr(bare, "meta", {}).get(_RECORD)
    if not isinstance(found, Sparsified):
        raise RequestError("this model has no record", "prunella.sparse did not make it", "call prunella.sparse first")
    return found


def kernels() -> str:
    """The instruction-set tier of the compiled kernels, or that there are none."""
    return native.isa() if native.available() else "none, only those of torch"


def described(example: Inputs) -> tuple[tuple[tuple[int, ...], str], ...]:
    """Shape and type of each tensor of an example that a trace was made with."""
    parts = example if isinstance(example, tuple) else (example,)
    return tuple((tuple(part.shape), str(part.dtype)[6:]) for part in parts if isinstance(part, Tensor))


def noted(model: nn.Module, record: Sparsified) -> nn.Module:
    """The model, with the record that `sparsified` reads; copies keep it."""
    if isinstance(model, GraphModule):
        model.meta[_RECORD] = record
    else:
        setattr(model, _RECORD, record)
    return model


def _layer(
    model: nn.Module,
    name: str,
    module: nn.Module,
    met: Mapping[str, set[tuple[int, ...]]],
    tokens: Sequence[int],
    tuner: Tuner,
    joined: Fused,
) -> Layer:
    weight = matrix_of(module)
    zeros = 1 - density(weight.reshape(len(weight), -1)) if weight.numel() else 0.0
    why = _stays(module, name in met)
    todo = () if why else problems(module, met[name], tokens)
    if why or not todo:
        return Layer(name, zeros, (), why or "it met no input of a known size")
    bias, whole = bias_of(module), stays_whole(model, module)
    if whole:
        few = tuple(problem for problem in todo if problem.size <= FEW_TOKENS)
        if tuner.before is None or type(module) is not nn.Linear or not few:
            return Layer(name, zeros, (), whole)
        verdicts = (*tuner.whole(weight, bias, few), Verdict(Problem(FEW_TOKENS + 1), Route.TORCH))
    elif isinstance(module, nn.Conv2d):
        verdicts = tuner.conv(weight, bias, geometry_of(module), todo, joined)
    else:
        verdicts = tuner.linear(weight, bias, todo)
    wins = any(not is_dense(verdict.choice) for verdict in verdicts)
    return Layer(name, zeros, verdicts, "" if wins else whole or _nothing(verdicts[-1]))


def stays_whole(model: nn.Module, module: nn.Module) -> str:
    """Why the dense weight of a layer has to stay as it is, or nothing."""
    weight = matrix_of(module)
    if not weight.numel() or 1 - density(weight.reshape(len(weight), -1)) < LEAST:
        return "it has hardly any zeros"
    if sum(p is module.weight for _, p in model.named_parameters(remove_duplicate=False)) > 1:
        return "its weight is tied to another layer's"
    return ""


def _stays(module: nn.Module, ran: bool) -> str:
    """Why a layer stays dense without a measurement, or nothing."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    if weight.dtype is not torch.float32 or weight.device.type != "cpu":
        return f"its weight is {str(weight.dtype)[6:]} on {weight.device.type}"
    if not ran:
        return "the example does not call it"
    if hooked(module):
        return "it has hooks or a parametrisation"
    return ""


# -- the model with its layers replaced -------------------------------------------------------------------------------


def assembled(
    model: nn.Module, tables: Mapping[str, Table], example: Inputs | None, joined: Mapping[str, str] | None = None
) -> nn.Module:
    """`model`, changed in place, with these layers replaced; fused if there is an example to prove it with.

    joined: layer -> the activation module that it takes over, where that was proven before.
    """
    layers = {name: model.get_submodule(name) for name in tables}
    whole = {name: layer for name, layer in layers.items() if stays_whole(model, layer)}
    for name, layer in whole.items():
        fast = FastLinear(layer.weight, bias_of(layer), table=tables[name]).eval()  # type: ignore[arg-type]
        if not name:
            return fast
        put(model, name, fast)
        whole[name] = fast
    layers = {name: layer for name, layer in layers.items() if name not in whole}
    program = None if example is None else traced(model, {**layers, **whole}, example)
    if program is None:
        joined = joined if joined is not None else {} if example is None else pairs(model, layers, example)
        return _in_place(model, layers, tables, joined)
    modules = dict(program.named_modules())

    def make(name: str, fused: Fused) -> nn.Module:
        norm = modules[fused.norm] if fused.norm is not None else None
        return replaced(layers[name], tables[name], fused, norm)

    fuse_(program, make, layers)
    for name in layers.keys() - called(program):  # inside a step that could not be followed
        put(program, name, replaced(layers[name], tables[name], Fused()))
    fold_(program)
    chain_(program)
    return program.eval()


def _in_place(
    model: nn.Module, layers: Mapping[str, nn.Module], tables: Mapping[str, Table], joined: Mapping[str, str]
) -> nn.Module:
    for name, layer in layers.items():
        path = "" if isinstance(layer, nn.Conv2d) else joined.get(name, "")
        activation = activation_of(model.get_submodule(path)) if path else None
        made = replaced(layer, tables[name], Fused(None, activation or Activation.NONE))
        if isinstance(made, SparseLinear) and activation is not None:
            made.activation_path = path
            put(model, path, nn.Identity())
        if not name:
            return made
        put(model, name, made)
    return model


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Set the submodule of that path."""
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def replaced(layer: nn.Module, table: Table, fused: Fused, norm: nn.Module | None = None) -> nn.Module:
    """The layer that skips zeros in place of a dense one."""
    weight, bias = matrix_of(layer), bias_of(layer)
    if not isinstance(layer, nn.Conv2d):
        return SparseLinear(weight, bias, table=table, activation=fused.activation, transposed=is_conv1d(layer)).eval()
    joined = norm if isinstance(norm, nn.BatchNorm2d) else None
    return SparseConv2d(
        weight,
        bias,
        geometry=geometry_of(layer),
        table=table,
        norm=joined,
        norm_path=fused.norm or "",
        activation=fused.activation,
    ).eval()


# -- the whole model --------------------------------------------------------------------------------------------------


def shortened(model: nn.Module, example: Inputs, met: Mapping[str, set[tuple[int, ...]]]) -> Inputs | None:
    """The first token of an example of several: None unless every linear layer then meets one token."""
    short = whole.first_token(example)
    try:
        less = sizes(model, short)
    except RequestError:  # its second axis does not count tokens
        return None
    linear = [name for name, layer in targets(model).items() if not isinstance(layer, nn.Conv2d)]
    counts = [(_most(met[name]), _most(less[name])) for name in linear if name in met and name in less]
    return short if counts and all(few == 1 for _, few in counts) and any(many > 1 for many, _ in counts) else None


def _most(shapes: set[tuple[int, ...]]) -> int:
    return max((math.prod(shape[:-1]) for shape in shapes), default=0)


def _none(layers: tuple[Layer, ...]) -> str:
    if not layers:
        return "the model has no linear layer and no convolution that could skip zeros"
    return "no layer is faster without its zeros" if any(layer.verdicts for layer in layers) else layers[0].why


def _nothing(verdict: Verdict) -> str:
    """That nothing is faster, or might be but is not sure."""
    sure = "" if verdict.ratio is None or verdict.ratio.value <= 1 else " for sure"
    return f"nothing is faster{sure} ({verdict.problem.size}: {_best(verdict)})"


def _phrase(verdict: Verdict) -> str:
    """What runs for a size, and what could have where that is dense code."""
    dense = is_dense(verdict.choice) and verdict.best is not None
    return f"{verdict.problem.size}: {f'dense ({_best(verdict)})' if dense else _best(verdict)}"


def _best(verdict: Verdict) -> str:
    speed = "" if verdict.ratio is None else f" {verdict.ratio.value:.2f}x"
    return f"{spell(verdict.best or verdict.choice)}{speed}"


def check_request(tokens: Sequence[int], seconds: float) -> None:
    """Errors: RequestError for sizes or seconds out of range."""
    if any(type(number) is not int or number < 1 for number in tokens):
        raise RequestError(f"tokens={list(tokens)!r} is out of range", "whole numbers of at least 1")
    if not 0 < seconds < math.inf:
        raise RequestError(f"seconds={seconds!r} is out of range", "a positive number")
