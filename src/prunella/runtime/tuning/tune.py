"""Which choice is quickest for a layer, measured here and now, the best dense operation always among the candidates."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from prunella.errors import PruningError
from prunella.measure.timing import Ratio, compare_latency, own_clock
from prunella.runtime.fx.fuse import Fused
from prunella.runtime.kernels import library as native
from prunella.runtime.kernels.convolution import is_last
from prunella.runtime.kernels.library import Activation, Config, Kind, Precision
from prunella.runtime.layers import FastLinear, FoldedConv2d, SparseConv2d, SparseLinear
from prunella.runtime.packed_cache import finished
from prunella.runtime.tuning import configs as tiles
from prunella.runtime.tuning.choice import Choice, Geometry, Problem, Route, Table, is_dense
from prunella.runtime.tuning.configs import FEW_TOKENS

Run = Callable[[], object]
_M = TypeVar("_M", nn.Linear, nn.Conv2d)
_ALONE = Fused()
BLOCKS = {16: Kind.BLOCK16, 8: Kind.BLOCK8, 4: Kind.BLOCK4}
_CLOSE = 1.3
_FEW, _LEAST_ROUNDS, _FAR_ROUNDS, _MOST_ROUNDS = 5, 9, 31, 101
_WORTH = 1.1
"""What seems so much quicker, but is not sure, is measured once more, in more rounds."""


@dataclass(frozen=True)
class Verdict:
    """What won for one problem. ratio: of the best candidate that skips zeros, against the best dense one."""

    problem: Problem
    choice: Choice
    best: Choice | None = None
    ratio: Ratio | None = None


@dataclass
class Held:
    """The layers of all candidates for a weight that were made so far, and others like them."""

    first: dict[Choice, nn.Module] = field(default_factory=dict)
    twins: dict[Choice, nn.Module] = field(default_factory=dict)


@dataclass
class Tuner:
    """Measures each kind of layer once: those of one shape, density and problem share a verdict.

    precision: candidates are of float32 and of this. seconds: of one kind of layer, for all its problems. before: done
    ahead of each call and not timed; `forgetting()` for a model whose weights come from memory, not from a cache.
    A twin of the layer runs in between: other layers of the same code have just run in the model, only weights are far.
    """

    precision: Precision = Precision.FP32
    seconds: float = 1.0
    seed: int = 0
    before: Run | None = None
    last: bool = False
    """Whether images are measured with their channels as the last axis."""
    known: dict[tuple[object, ...], Verdict] = field(default_factory=dict)

    def linear(self, weight: Tensor, bias: Tensor | None, problems: tuple[Problem, ...]) -> tuple[Verdict, ...]:
        """The verdicts on a linear layer with this weight `(out, in)`."""
        each, held = self.seconds / len(problems), Held()
        return tuple(self._once(weight, bias, problem, None, each, held) for problem in problems)

    def whole(self, weight: Tensor, bias: Tensor | None, problems: tuple[Problem, ...]) -> tuple[Verdict, ...]:
        """The same for a layer that keeps its dense weight: `F.linear`, or a kernel for a few tokens."""
        each, held = self.seconds / len(problems), Held()
        return tuple(self._once(weight, bias, problem, None, each, held, whole=True) for problem in problems)

    def conv(
        self,
        weight: Tensor,
        bias: Tensor | None,
        geometry: Geometry,
        problems: tuple[Problem, ...],
        joined: Fused = _ALONE,
    ) -> tuple[Verdict, ...]:
        """The verdicts on a convolution with this weight `(out, in, h, w)`, and on what joins it."""
        each, held = self.seconds / len(problems), Held()
        joined = replace(joined, norm=None if joined.norm is None else "norm")  # whose does not matter
        return tuple(self._once(weight, bias, problem, geometry, each, held, joined=joined) for problem in problems)

    def _once(
        self,
        weight: Tensor,
        bias: Tensor | None,
        problem: Problem,
        geometry: Geometry | None,
        seconds: float,
        held: Held,
        *,
        whole: bool = False,
        joined: Fused = _ALONE,
    ) -> Verdict:
        matrix = weight.reshape(len(weight), -1)
        sown = (round(density(matrix), 2), blocks_of(matrix))
        like = (tuple(weight.shape), sown, bias is None, geometry, problem, whole, joined)
        if like not in self.known:
            how: Any = {"whole": whole, "last": self.last, "joined": joined}
            runs = candidates(weight, bias, problem, geometry, self.precision, self.seed, held.first, **how)
            before = None
            if self.before is not None:
                other = weight.detach().clone()
                twins = candidates(other, bias, problem, geometry, self.precision, self.seed, held.twins, **how)
                before = partial(_far, self.before, twins)
            self.known[like] = decide(runs, problem, seconds, self.seed, before=before)
        return self.known[like]


def forgetting(cache: int) -> Run:
    """A call that reads twice as much as the largest cache has, so that nothing else is left there."""
    other = torch.ones(max(1, cache // 2))  # ones: pages of zeros may all be the same page
    return other.sum


def _far(forget: Run, twins: Mapping[Choice, Run], choice: Choice) -> None:
    """Put the weights of a candidate far away, and its code near."""
    forget()
    twins[choice]()


def density(matrix: Tensor) -> float:
    """Part of the weights that is not zero."""
    return int(torch.count_nonzero(matrix)) / max(1, matrix.numel())


def blocks_of(matrix: Tensor) -> int:
    """The largest of 16, 8, 4 such that so many rows below each other have their zeros in the same columns, else 1."""
    some = matrix != 0
    for rows in BLOCKS:
        if len(matrix) % rows == 0:
            tiles = some.reshape(-1, rows, some.shape[1])
            if bool((tiles == tiles[:, :1]).all()):
                return rows
    return 1


def configs(matrix: Tensor, tokens: int, precision: Precision) -> list[Config]:
    """The kernels to try for a matrix `(out, in)`."""
    if not native.available():
        return []
    rows, wide = matrix.shape
    found = list(tiles.configs((rows, wide), density(matrix), tokens))
    fits = blocks_of(matrix)
    found = [c for c in found if c.kind not in BLOCKS.values() or c.kind is BLOCKS.get(fits)]
    if fits > 1 and not any(c.kind is BLOCKS[fits] for c in found):
        found = [*tiles.block_configs(BLOCKS[fits]), *found]
    if precision is Precision.FP32:
        return [c for c in found if c.precision is Precision.FP32]
    exact = [c for c in found if c.precision is Precision.FP32]
    coarse = [replace(c, precision=precision) for c in exact if _has(c.kind, precision)]
    if precision is Precision.BF16 and tokens > FEW_TOKENS:
        coarse = [*tiles.half_configs(), *coarse]
    return list(dict.fromkeys([*coarse, *exact]))


def whole_configs(matrix: Tensor, tokens: int, precision: Precision) -> list[Config]:
    """The kernels to try for a matrix that stays dense as a whole: those that read a bit for each weight."""
    return [c for c in configs(matrix, tokens, precision) if c.kind is Kind.DECODE]


def _has(kind: Kind, precision: Precision) -> bool:
    """int8 is for reading weights when decoding: elsewhere it gains nothing."""
    return precision is not Precision.INT8 or kind is Kind.DECODE


def candidates(
    weight: Tensor,
    bias: Tensor | None,
    problem: Problem,
    geometry: Geometry | None,
    precision: Precision,
    seed: int,
    held: dict[Choice, nn.Module],
    *,
    whole: bool = False,
    last: bool = False,
    joined: Fused = _ALONE,
) -> dict[Choice, Run]:
    """Choice -> a call of the layer on noise of the problem's size. What cannot be laid out is left out.

    held: the layers made so far; further ones are added. whole: as in `Tuner.whole`. last: as in `Tuner`. joined: to a
    convolution, whatever runs it.
    """
    generator = torch.Generator().manual_seed(seed)
    matrix = weight.detach().reshape(len(weight), -1)
    bias = None if bias is None else bias.detach()
    shape = problem.image or (problem.size, matrix.shape[1])
    x = torch.randn(shape, generator=generator)
    if last and geometry is not None:
        x, weight = (part.contiguous(memory_format=torch.channels_last) for part in (x, weight))
    routes: list[Route] = [Route.TORCH] if geometry else [Route.TORCH, *_onednn(), Route.CSR]
    made: dict[Choice, Run] = {}
    choices: list[Choice] = [*routes, *configs(matrix, problem.size, precision)]
    if whole:
        choices = [Route.TORCH, *whole_configs(matrix, problem.size, precision)]
    for choice in choices:
        run = _call(choice, weight.detach(), x, bias, geometry, held, whole=whole, joined=joined)
        try:
            run()
        except PruningError:  # a kernel says that it does not do this
            continue
        made[choice] = run
    return made


def candidates_dense(weight: Tensor, bias: Tensor | None, problem: Problem, seed: int) -> dict[Choice, Run]:
    """The dense candidates of a linear layer."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((problem.size, weight.shape[1]), generator=generator)
    return {choice: _call(choice, weight, x, bias, None, {}) for choice in (Route.TORCH, *_onednn())}


def _call(
    choice: Choice,
    weight: Tensor,
    x: Tensor,
    bias: Tensor | None,
    geometry: Geometry | None,
    held: dict[Choice, nn.Module],
    *,
    whole: bool = False,
    joined: Fused = _ALONE,
) -> Run:
    """The layer by a choice, as a model would call it: all that a module costs is measured too."""
    if choice is Route.TORCH and geometry is None:
        return partial(_dense_layer(weight, bias), x)
    if geometry is not None:
        return _call_conv(choice, weight, x, bias, geometry, held, joined)
    if choice not in held:
        table = Table(((1, choice),))
        if whole or is_dense(choice):
            held[choice] = FastLinear(weight, bias, table=table).eval()
        else:
            held[choice] = SparseLinear(weight, bias, table=table).eval()
    return partial(held[choice], x)


def _call_conv(
    choice: Choice,
    weight: Tensor,
    x: Tensor,
    bias: Tensor | None,
    geometry: Geometry,
    held: dict[Choice, nn.Module],
    joined: Fused,
) -> Run:
    """A convolution and what joins it: a dense one multiplies its batch norm in, and does the rest in its memory."""
    high, wide = geometry.positions((x.shape[2], x.shape[3]))
    y = torch.ones(x.shape[0], len(weight), high, wide) if joined.residual else None
    residual = y if y is None or not is_last(x) else y.contiguous(memory_format=torch.channels_last)
    norm = None if joined.norm is None else nn.BatchNorm2d(len(weight)).eval().requires_grad_(False)
    if choice is Route.TORCH:
        conv = _dense_conv(weight, bias, geometry)
        if norm is None:
            return partial(_joined, x, residual, conv, joined.activation)
        return partial(FoldedConv2d(conv, norm, "", joined.activation).eval(), x, residual)
    if choice not in held:
        table, activation = Table(((1, choice),)), joined.activation
        held[choice] = SparseConv2d(
            weight, bias, geometry=geometry, table=table, norm=norm, activation=activation
        ).eval()
    return partial(held[choice], x, residual)


def _joined(x: Tensor, residual: Tensor | None, conv: nn.Module, activation: Activation) -> Tensor:
    return finished(conv(x), residual, activation)


def _dense_conv(weight: Tensor, bias: Tensor | None, geometry: Geometry) -> nn.Conv2d:
    out, wide, *kernel = weight.shape
    how = (geometry.stride, geometry.padding, geometry.dilation)
    with torch.device("meta"):
        made = nn.Conv2d(wide, out, (kernel[0], kernel[1]), *how, bias=bias is not None)
    return _filled(made, weight, bias)


def _dense_layer(weight: Tensor, bias: Tensor | None) -> nn.Module:
    with torch.device("meta"):
        made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    return _filled(made, weight, bias)


def _filled(made: _M, weight: Tensor, bias: Tensor | None) -> _M:
    made.weight = nn.Parameter(weight, requires_grad=False)
    made.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
    return made.eval()


def _onednn() -> Iterator[Route]:
    """oneDNN's linear, where this build of torch has it."""
    if torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        yield Route.ONEDNN


def decide(
    runs: Mapping[Choice, Run],
    problem: Problem,
    seconds: float,
    seed: int,
    base: Callable[[Choice], bool] = is_dense,
    before: Callable[[Choice], object] | None = None,
) -> Verdict:
    """The quickest candidate; one that is not of the base (dense, unless said otherwise) wins only where that is sure.

    Slow candidates are dropped early; the best of the base and the best of the others then meet in interleaved rounds.
    """
    with torch.inference_mode():
        best = _sieve(runs, seconds / 2, base, before)
        first = min((c for c in best if base(c)), key=best.__getitem__)
        rival = min((c for c in best if not base(c)), key=best.__getitem__, default=None)
        if rival is None or best[rival] > _CLOSE * best[first]:
            ratio = None if rival is None else Ratio(*[best[first] / best[rival]] * 3)
            return Verdict(problem, first, rival, ratio)
        pair, names = {"base": runs[first], "rival": runs[rival]}, {"base": first, "rival": rival}
        ahead = None if before is None else lambda name: before(names[name])
        spent = best[first] + best[rival] + (_seconds(before, first) + _seconds(before, rival) if before else 0.0)
        least = _LEAST_ROUNDS if before is None else _FAR_ROUNDS  # weights from memory vary more
        plain = best[first] > _CLOSE * best[rival]  # then few rounds are enough, unless the machine is busy
        rounds = _FEW if plain else min(_MOST_ROUNDS, max(least, round(seconds / 2 / max(spent, 4e-3))))
        while True:
            ratio = compare_latency(pair, rounds=rounds, warmup=1, seed=seed, clock=own_clock(), before=ahead).ratio
            if ratio.faster or ratio.value < _WORTH or rounds == _MOST_ROUNDS:
                break
            rounds = min(_MOST_ROUNDS, 4 * rounds)
    return Verdict(problem, rival if ratio.faster else first, rival, ratio)


def _seconds(before: Callable[[Choice], object], choice: Choice) -> float:
    """How long what comes ahead of a call takes."""
    clock = own_clock()
    start = clock()
    before(choice)
    return clock() - start


def _sieve(
    runs: Mapping[Choice, Run],
    seconds: float,
    base: Callable[[Choice], bool],
    before: Callable[[Choice], object] | None = None,
) -> dict[Choice, float]:
    """Seconds of the best call of each candidate, measured in turns; those far behind get no more turns."""
    clock = own_clock()

    def once(choice: Choice) -> float:
        if before is not None:
            before(choice)
        start = clock()
        runs[choice]()
        return max(clock() - start, 1e-9)

    best = {choice: min(once(choice), once(choice)) for choice in runs}
    start = time.perf_counter()
    for _ in range(50):
        near = {side: min(t for c, t in best.items() if base(c) == side) for side in set(map(base, best))}
        for choice in [c for c, t in best.items() if t < _CLOSE * near[base(c)]]:
            best[choice] = min(best[choice], once(choice))
        if time.perf_counter() - start > seconds:
            break
    return best
