"""Measures which choice is the fastest for a layer; the dense operations of torch are always among the candidates."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from prunella.errors import PruningError
from prunella.measure.clock import now, since
from prunella.measure.timing import Ratio, compare_latency, own_clock
from prunella.model.device import synchronize
from prunella.runtime.fx.fuse import Fused
from prunella.runtime.kernels import library
from prunella.runtime.kernels.config import DOT_ROWS, Activation, Config, Kind, Precision
from prunella.runtime.kernels.convolution import is_channels_last
from prunella.runtime.layers import FastLinear, FoldedConv2d, SparseConv2d, SparseLinear
from prunella.runtime.packed_cache import add_and_activate
from prunella.runtime.tuning import configs
from prunella.runtime.tuning.choice import Choice, Geometry, Problem, Route, Table, is_dense
from prunella.runtime.tuning.configs import FEW_TOKENS

Run = Callable[[], object]
_M = TypeVar("_M", nn.Linear, nn.Conv2d)
_UNFUSED = Fused()
BLOCKS = {16: Kind.BLOCK16, 8: Kind.BLOCK8, 4: Kind.BLOCK4}
_CLOSE = 1.3
"""A candidate that is slower than the best by this factor is not measured any further."""
_CLEAR_ROUNDS, _LEAST_ROUNDS, _EVICTING_ROUNDS, _MOST_ROUNDS = 5, 9, 31, 101
_PROMISING = 1.1
"""From this ratio on, a gain whose interval still includes 1 is measured again, in more rounds."""


@dataclass(frozen=True)
class Verdict:
    """The choice for one problem. best: the best candidate that skips zeros. ratio: its speed against dense code."""

    problem: Problem
    choice: Choice
    best: Choice | None = None
    ratio: Ratio | None = None


@dataclass
class KernelCandidates:
    """The layers built so far to measure one weight, and replicas of them with their own memory."""

    layers: dict[Choice, nn.Module] = field(default_factory=dict)
    replicas: dict[Choice, nn.Module] = field(default_factory=dict)


@dataclass
class Tuner:
    """Measures each kind of layer once: layers of one shape, density and problem share a verdict.

    precision: candidates are in float32 and in this. seconds: for one kind of layer, over all its problems. evict: runs
    before each call and is not timed; `cache_eviction()` for a model whose weights do not fit the caches. A replica of
    the layer runs after it: in the model, other layers have just run the same code, and only the weights are in memory.
    channels_last: whether images are measured in that layout.
    """

    precision: Precision = Precision.FP32
    seconds: float = 1.0
    seed: int = 0
    evict: Run | None = None
    channels_last: bool = False
    known: dict[tuple[object, ...], Verdict] = field(default_factory=dict)

    def linear(self, weight: Tensor, bias: Tensor | None, problems: tuple[Problem, ...]) -> tuple[Verdict, ...]:
        """The verdicts on a linear layer with this weight `(out, in)`."""
        seconds, cached = self.seconds / len(problems), KernelCandidates()
        return tuple(self._verdict(weight, bias, problem, None, seconds, cached) for problem in problems)

    def keep_dense(self, weight: Tensor, bias: Tensor | None, problems: tuple[Problem, ...]) -> tuple[Verdict, ...]:
        """The verdicts on a linear layer that keeps its dense weight: `F.linear`, or a kernel for a few tokens."""
        seconds, cached = self.seconds / len(problems), KernelCandidates()
        return tuple(
            self._verdict(weight, bias, problem, None, seconds, cached, keep_dense=True) for problem in problems
        )

    def conv(
        self,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        problems: tuple[Problem, ...],
        fused: Fused = _UNFUSED,
    ) -> tuple[Verdict, ...]:
        """The verdicts on a convolution with this weight `(out, in, h, w)`, with what is fused with it."""
        seconds, cached = self.seconds / len(problems), KernelCandidates()
        fused = replace(fused, norm=None if fused.norm is None else "norm")  # which batch norm it is does not matter
        return tuple(
            self._verdict(weight, bias, problem, geometry, seconds, cached, fused=fused) for problem in problems
        )

    def _verdict(
        self,
        weight: Tensor,
        bias: Tensor | None,
        problem: Problem,
        geometry: Geometry | None,
        seconds: float,
        cached: KernelCandidates,
        *,
        keep_dense: bool = False,
        fused: Fused = _UNFUSED,
    ) -> Verdict:
        matrix = weight.reshape(len(weight), -1)
        sparsity_key: tuple[object, ...] = (round(density(matrix), 2), blocks_of(matrix))
        if self.precision is Precision.INT8:
            sparsity_key += tuple(round(kept, 2) for kept in kept_by_blocks(matrix).values())
        key = (tuple(weight.shape), sparsity_key, bias is None, geometry, problem, keep_dense, fused)
        if key not in self.known:
            options: Any = {"keep_dense": keep_dense, "channels_last": self.channels_last, "fused": fused}
            runs = candidates(weight, bias, problem, geometry, self.precision, self.seed, cached.layers, **options)
            before = None
            if self.evict is not None:
                copy = weight.detach().clone()
                replicas = candidates(
                    copy, bias, problem, geometry, self.precision, self.seed, cached.replicas, **options
                )
                before = partial(_evict_cache, self.evict, replicas)
            self.known[key] = decide(runs, problem, seconds, self.seed, before=before)
        return self.known[key]


def cache_eviction(cache: int) -> Run:
    """A call that reads twice the size of the largest cache, so that nothing else stays in it."""
    other = torch.ones(max(1, cache // 2), device="cpu")  # ones: all pages of zeros may be the same page
    return other.sum


def _evict_cache(evict: Run, replicas: Mapping[Choice, Run], choice: Choice) -> None:
    """Move the weights of a candidate out of the caches, but not its code."""
    evict()
    replicas[choice]()


def density(matrix: Tensor) -> float:
    """Fraction of the weights that are not zero."""
    return int(torch.count_nonzero(matrix)) / max(1, matrix.numel())


def blocks_of(matrix: Tensor) -> int:
    """The largest of 16, 8, 4 so that blocks of that many rows have their zeros in the same columns, else 1."""
    mask = matrix != 0
    for rows in BLOCKS:
        if len(matrix) % rows == 0:
            blocks = mask.reshape(-1, rows, mask.shape[1])
            if bool((blocks == blocks[:, :1]).all()):
                return rows
    return 1


def kept_by_blocks(matrix: Tensor) -> dict[Kind, float]:
    """The fraction of the weights that blocks of each int8 layout store: those of a block with any nonzero."""
    mask = (matrix != 0).float()[None]
    return {
        kind: float(functional.max_pool2d(mask, (side, 4), ceil_mode=True).mean()) if mask.numel() else 0.0
        for kind, side in DOT_ROWS.items()
    }


def configs_for(matrix: Tensor, tokens: int, precision: Precision) -> list[Config]:
    """The kernels to try for a matrix `(out, in)`."""
    if not library.available():
        return []
    rows, columns = matrix.shape
    tried = list(configs.kernel_configs((rows, columns), density(matrix), tokens))
    block = blocks_of(matrix)
    tried = [c for c in tried if c.kind not in BLOCKS.values() or c.kind is BLOCKS.get(block)]
    if block > 1 and not any(c.kind is BLOCKS[block] for c in tried):
        tried = [*configs.block_configs(BLOCKS[block]), *tried]
    if precision is Precision.FP32:
        return [c for c in tried if c.precision is Precision.FP32]
    exact = [c for c in tried if c.precision is Precision.FP32]
    rounded = [replace(c, precision=precision) for c in exact if _gains(c.kind, precision)]
    if precision is Precision.BF16 and tokens > FEW_TOKENS:
        rounded = [*configs.half_configs(), *rounded]
    if precision is Precision.INT8:
        rounded = [*configs.dot_configs(kept_by_blocks(matrix), columns, tokens), *rounded]
    return list(dict.fromkeys([*rounded, *exact]))


def conv_configs_for(matrix: Tensor, tokens: int, precision: Precision) -> list[Config]:
    """The kernels to try for a convolution with this matrix: those in int8 blocks read no images."""
    return [c for c in configs_for(matrix, tokens, precision) if c.kind not in DOT_ROWS]


def keep_dense_configs(matrix: Tensor, tokens: int, precision: Precision) -> list[Config]:
    """The kernels to try for a layer that keeps its dense weight: those with one bit for each weight."""
    return [c for c in configs_for(matrix, tokens, precision) if c.kind is Kind.DECODE]


def _gains(kind: Kind, precision: Precision) -> bool:
    """Whether a layout that has the precision can be faster with it: int8 for a few tokens, in one layout."""
    return precision is not Precision.INT8 or kind is Kind.DECODE


def candidates(
    weight: Tensor,
    bias: Tensor | None,
    problem: Problem,
    geometry: Geometry | None,
    precision: Precision,
    seed: int,
    layers: dict[Choice, nn.Module],
    *,
    keep_dense: bool = False,
    channels_last: bool = False,
    fused: Fused = _UNFUSED,
) -> dict[Choice, Run]:
    """Choice -> a call of the layer on noise of the problem's size. Kernels that refuse the weight are left out.

    layers: those built so far; new ones are added. keep_dense: as `Tuner.keep_dense`. channels_last: as in `Tuner`.
    fused: with the convolution, for every choice.
    """
    generator = torch.Generator().manual_seed(seed)
    matrix = weight.detach().reshape(len(weight), -1)
    bias = None if bias is None else bias.detach()
    shape = problem.image or (problem.size, matrix.shape[1])
    x = torch.randn(shape, generator=generator, device="cpu")
    if channels_last and geometry is not None:
        x, weight = (part.contiguous(memory_format=torch.channels_last) for part in (x, weight))
    int8 = () if geometry else tuple(_int8(precision))
    routes: list[Route] = [Route.TORCH] if geometry else [Route.TORCH, *_onednn(), *int8, Route.CSR]
    runs: dict[Choice, Run] = {}
    kernels_for = configs_for if geometry is None else conv_configs_for
    choices: list[Choice] = [*routes, *kernels_for(matrix, problem.size, precision)]
    if keep_dense:
        choices = [Route.TORCH, *int8, *keep_dense_configs(matrix, problem.size, precision)]
    for choice in choices:
        run = _call(choice, weight.detach(), x, bias, geometry, layers, keep_dense=keep_dense, fused=fused)
        try:
            run()
        except PruningError:  # the kernel does not support these sizes
            continue
        runs[choice] = run
    return runs


def candidates_dense(weight: Tensor, bias: Tensor | None, problem: Problem, seed: int) -> dict[Choice, Run]:
    """The dense candidates of a linear layer."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((problem.size, weight.shape[1]), generator=generator, device="cpu")
    return {choice: _call(choice, weight, x, bias, None, {}) for choice in (Route.TORCH, *_onednn())}


def _call(
    choice: Choice,
    weight: Tensor,
    x: Tensor,
    bias: Tensor | None,
    geometry: Geometry | None,
    layers: dict[Choice, nn.Module],
    *,
    keep_dense: bool = False,
    fused: Fused = _UNFUSED,
) -> Run:
    """A call of the layer by a choice, as the model makes it: the overhead of the module is measured too."""
    if choice is Route.TORCH and geometry is None:
        return partial(_dense_layer(weight, bias), x)
    if geometry is not None:
        return _call_conv(choice, weight, x, bias, geometry, layers, fused)
    if choice not in layers:
        table = Table(((1, choice),))
        if keep_dense or is_dense(choice):
            layers[choice] = FastLinear(weight, bias, table=table).eval()
        else:
            layers[choice] = SparseLinear(weight, bias, table=table).eval()
    return partial(layers[choice], x)


def _call_conv(
    choice: Choice,
    weight: Tensor,
    x: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    layers: dict[Choice, nn.Module],
    fused: Fused,
) -> Run:
    """A call of a convolution with what is fused: a dense one folds its batch norm, and adds and activates in place."""
    high, wide = geometry.positions((x.shape[2], x.shape[3]))
    y = torch.ones(x.shape[0], len(weight), high, wide, device="cpu") if fused.residual else None
    residual = y if y is None or not is_channels_last(x) else y.contiguous(memory_format=torch.channels_last)
    norm = None if fused.norm is None else nn.BatchNorm2d(len(weight)).eval().requires_grad_(False)
    if choice is Route.TORCH:
        conv = _dense_conv(weight, bias, geometry)
        if norm is None:
            return partial(_conv_and_activate, x, residual, conv, fused.activation)
        return partial(FoldedConv2d(conv, norm, "", fused.activation).eval(), x, residual)
    if choice not in layers:
        table, activation = Table(((1, choice),)), fused.activation
        layers[choice] = SparseConv2d(
            weight, bias, geometry=geometry, table=table, norm=norm, activation=activation
        ).eval()
    return partial(layers[choice], x, residual)


def _conv_and_activate(x: Tensor, residual: Tensor | None, conv: nn.Module, activation: Activation) -> Tensor:
    return add_and_activate(conv(x), residual, activation)


def _dense_conv(weight: Tensor, bias: Tensor | None, geometry: Geometry) -> nn.Conv2d:
    out, wide, *kernel = weight.shape
    options = (geometry.stride, geometry.padding, geometry.dilation)
    with torch.device("meta"):
        layer = nn.Conv2d(wide, out, (kernel[0], kernel[1]), *options, bias=bias is not None)
    return _filled(layer, weight, bias)


def _dense_layer(weight: Tensor, bias: Tensor | None) -> nn.Module:
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    return _filled(layer, weight, bias)


def _filled(layer: _M, weight: Tensor, bias: Tensor | None) -> _M:
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
    return layer.eval()


def _onednn() -> Iterator[Route]:
    """The linear operation of oneDNN, if this build of torch has it."""
    if torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        yield Route.ONEDNN


def _int8(precision: Precision) -> Iterator[Route]:
    """The dynamic int8 operation of torch, if int8 is asked for and this build of torch has it."""
    there = hasattr(torch, "quantize_per_channel") and hasattr(torch.ops.quantized, "linear_dynamic")
    if precision is Precision.INT8 and there and torch.backends.quantized.engine != "none":
        yield Route.INT8


def decide(
    runs: Mapping[Choice, Run],
    problem: Problem,
    seconds: float,
    seed: int,
    base: Callable[[Choice], bool] = is_dense,
    before: Callable[[Choice], object] | None = None,
    device: str = "cpu",
) -> Verdict:
    """The fastest candidate. One that is not a base (by default, not dense) wins only if its whole interval is above 1.

    A screening drops slow candidates. The best base and the best of the others then run in interleaved rounds. before:
    runs ahead of each call and is not timed. device: where the work is done; the clock waits for it.
    """
    with torch.inference_mode():
        times = screen(runs, seconds / 2, base, before, device)
        first = min((c for c in times if base(c)), key=times.__getitem__)
        rival = min((c for c in times if not base(c)), key=times.__getitem__, default=None)
        if rival is None or times[rival] > _CLOSE * times[first]:
            ratio = None if rival is None else Ratio(*[times[first] / times[rival]] * 3)
            return Verdict(problem, first, rival, ratio)
        pair, choices = {"base": runs[first], "rival": runs[rival]}, {"base": first, "rival": rival}
        before_name = None if before is None else lambda name: before(choices[name])
        round_seconds = times[first] + times[rival]
        if before is not None:
            round_seconds += _seconds(before, first, device) + _seconds(before, rival, device)
        least = _LEAST_ROUNDS if before is None else _EVICTING_ROUNDS  # times vary more if weights come from memory
        clear = times[first] > _CLOSE * times[rival]  # then few rounds are enough, unless the machine is busy
        rounds = (
            _CLEAR_ROUNDS if clear else min(_MOST_ROUNDS, max(least, round(seconds / 2 / max(round_seconds, 4e-3))))
        )
        while True:
            ratio = compare_latency(
                pair,
                rounds=rounds,
                warmup=1,
                seed=seed,
                device=device,
                clock=own_clock(device),
                before=before_name,
            ).ratio
            if ratio.faster or ratio.value < _PROMISING or rounds == _MOST_ROUNDS:
                break
            rounds = min(_MOST_ROUNDS, 4 * rounds)
    return Verdict(problem, rival if ratio.faster else first, rival, ratio)


def _seconds(call: Callable[[Choice], object], choice: Choice, device: str) -> float:
    """Seconds of one call with the choice."""
    clock = own_clock(device)
    synchronize(device)
    start = clock()
    call(choice)
    synchronize(device)
    return clock() - start


def screen(
    runs: Mapping[Choice, Run],
    seconds: float,
    base: Callable[[Choice], bool],
    before: Callable[[Choice], object] | None = None,
    device: str = "cpu",
) -> dict[Choice, float]:
    """Seconds of the fastest call of each candidate, measured in turns; slow candidates get no further turns."""

    def once(choice: Choice) -> float:
        if before is not None:
            before(choice)
        return max(_seconds(lambda chosen: runs[chosen](), choice, device), 1e-9)

    times = {choice: min(once(choice), once(choice)) for choice in runs}
    start = now()
    for _ in range(50):
        best = {side: min(t for c, t in times.items() if base(c) == side) for side in set(map(base, times))}
        for choice in [c for c, t in times.items() if t < _CLOSE * best[base(c)]]:
            times[choice] = min(times[choice], once(choice))
        if since(start) > seconds:
            break
    return times
