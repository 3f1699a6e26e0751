"""Time a model with each available backend: eager, compiled, ONNX Runtime, and the sparse kernels.

All backends of a batch size and number of threads are timed in the same interleaved rounds; wall time, with intervals.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from prunella.errors import PruningError, RequestError, near_names
from prunella.io.export import export
from prunella.measure.machine import cpu_name
from prunella.measure.timing import Comparison, compare_latency
from prunella.model.copying import copied
from prunella.model.forward import forward
from prunella.model.trees import tensors
from prunella.reporting.chart import alone, figure
from prunella.runtime.convert import sparse
from prunella.runtime.dense import dense_fast
from prunella.runtime.kernels import library
from prunella.runtime.kernels.config import Precision
from prunella.runtime.record import sparsified
from prunella.types import Inputs

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BACKENDS = ("eager", "dense fast", "compiled", "onnxruntime", "sparse")
_COLORS = {"eager": "#8d8799", "dense fast": "#b7a98a", "compiled": "#4f7cac", "onnxruntime": "#7aa36f",
            "sparse": "#6b3fa0"}  # fmt: skip


@dataclass(frozen=True)
class Timed:
    """One backend for one batch size and number of threads. ratio, low, high: against eager; above 1 is faster."""

    backend: str
    batch: int
    threads: int
    milliseconds: float
    ratio: float
    low: float
    high: float


@dataclass(frozen=True)
class Bench:
    """The measurements, and the backends that were left out, with the reason."""

    rows: tuple[Timed, ...]
    left_out: Mapping[str, str]
    sparse: str
    machine: str
    kernels: str

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


def bench(
    model: nn.Module,
    example: Inputs,
    *,
    backends: Sequence[str] = BACKENDS,
    batches: Sequence[int] = (1,),
    threads: Sequence[int] = (),
    precision: Precision = Precision.FP32,
    rounds: int = 15,
    seed: int = 0,
) -> Bench:
    """Time the backends side by side on the CPU, in eval mode and without gradients.

    backends: of `BACKENDS`; eager is always the base. batches: the first sample of the example is repeated. threads: 1
    and all, unless given. precision: of the kernels that `sparse` may choose. A backend that is not installed here is
    left out, and the result says why. Errors: RequestError for an unknown backend, or numbers out of range.
    """
    unknown = sorted(set(backends) - set(BACKENDS))
    if unknown or min([*batches, *threads, 1]) < 1 or not batches:
        why = f"got {', '.join(unknown) or 'a batch or thread number below 1'}"
        why += f"; {near}" if unknown and (near := near_names(unknown[0], BACKENDS)) else ""
        raise RequestError("the backends cannot be measured", why, f"backends are {', '.join(BACKENDS)}")
    rows, left_out, record = list[Timed](), dict[str, str](), ""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    model = copied(model).cpu().eval().requires_grad_(False)
    for count in sorted(set(threads) or {1, usable}):
        with _threads(count), tempfile.TemporaryDirectory() as folder:
            for batch in batches:
                example_of_batch = repeated(example, batch)
                runs: dict[str, Callable[[], object]] = {"eager": partial(forward, model, example_of_batch)}
                for backend in BACKENDS:
                    if backend in backends and backend != "eager":
                        try:
                            runs[backend] = _MAKERS[backend](model, example_of_batch, precision, Path(folder), seed)
                        except PruningError as error:
                            left_out[backend] = f"{error.what}: {error.why}" if error.why else error.what
                if "sparse" in runs:
                    record = str(sparsified(cast("partial[object]", runs["sparse"]).args[0]))
                with torch.inference_mode():
                    rows += _rows(runs, batch, count, rounds, seed)
    kernels = library.isa() if library.available() else "none"
    return Bench(tuple(rows), left_out, record, cpu_name(), kernels)


def _rows(
    runs: Mapping[str, Callable[[], object]], batch: int, threads: int, rounds: int, seed: int
) -> Iterator[Timed]:
    if len(runs) == 1:
        runs = {**runs, "eager again": runs["eager"]}
    comparison: Comparison = compare_latency(runs, rounds=rounds, warmup=2, seed=seed)
    base = comparison.latencies[0].median * 1e3
    yield Timed("eager", batch, threads, base, 1.0, 1.0, 1.0)
    for latency, ratio in zip(comparison.latencies[1:], comparison.ratios, strict=True):
        if latency.name in BACKENDS:
            yield Timed(latency.name, batch, threads, latency.median * 1e3, ratio.value, ratio.low, ratio.high)


def repeated(example: Inputs, batch: int) -> Inputs:
    """The first sample of every tensor, `batch` times."""

    def one(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.dim():
            return value
        return value[:1].repeat(batch, *[1] * (value.dim() - 1)).cpu()

    batch_inputs: Inputs = tree_map(one, dict(example) if isinstance(example, Mapping) else example)
    return batch_inputs


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# -- the backends ------------------------------------------------------------------------------------------------------


def _sparse(model: nn.Module, given: Inputs, precision: Precision, folder: Path, seed: int) -> Callable[[], object]:
    return partial(forward, sparse(model, given, precision=precision, seed=seed, seconds=0.5), given)


def _fast(model: nn.Module, given: Inputs, precision: Precision, folder: Path, seed: int) -> Callable[[], object]:
    return partial(forward, dense_fast(model, given, seed=seed), given)


def _compiled(model: nn.Module, given: Inputs, precision: Precision, folder: Path, seed: int) -> Callable[[], object]:
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        raise RequestError("compiled needs a C++ compiler", "there is none", "install g++")
    import torch._inductor.config as settings

    torch._dynamo.reset()
    with settings.patch(freezing=True), torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of the compiler
        compiled = cast(nn.Module, torch.compile(copied(model), dynamic=False))
        try:
            forward(compiled, given)
        except Exception as error:  # the compiler has no error type of its own
            raise RequestError("torch.compile failed", _first(error)) from error
    return partial(forward, compiled, given)


def _onnx(model: nn.Module, given: Inputs, precision: Precision, folder: Path, seed: int) -> Callable[[], object]:
    if importlib.util.find_spec("onnxruntime") is None:
        raise RequestError("onnxruntime is not installed", "", "pip install 'prunella[onnx]'")
    import onnxruntime

    file = folder / "model.onnx"
    export(model, file, inputs=given, format="onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    session = onnxruntime.InferenceSession(file.read_bytes(), options, providers=["CPUExecutionProvider"])
    file.unlink()
    names = [entry.name for entry in session.get_inputs()]
    feed = dict(zip(names, (tensor.numpy() for tensor in tensors(given)), strict=True))
    return partial(session.run, None, feed)


_MAKERS = {"dense fast": _fast, "compiled": _compiled, "onnxruntime": _onnx, "sparse": _sparse}


def _first(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


# -- the plot ----------------------------------------------------------------------------------------------------------


def plot(bench: Bench, width: float = 7.6) -> str:
    """Speed-up of each backend against eager as an SVG, with 95 % intervals."""
    groups = sorted({(row.threads, row.batch) for row in bench.rows})
    backends = [backend for backend in BACKENDS if any(row.backend == backend for row in bench.rows)]

    def draw(axes: Axes) -> None:
        for number, backend in enumerate(backends):
            rows = {(row.threads, row.batch): row for row in bench.rows if row.backend == backend}
            places = [
                k + (number - (len(backends) - 1) / 2) * 0.8 / len(backends) for k, g in enumerate(groups) if g in rows
            ]
            mine = [rows[g] for g in groups if g in rows]
            reach = [[row.ratio - row.low for row in mine], [row.high - row.ratio for row in mine]]
            axes.bar(
                places,
                [row.ratio for row in mine],
                0.75 / len(backends),
                yerr=reach,
                color=_COLORS[backend],
                label=backend,
            )
        axes.axhline(1.0, color="#777777", linewidth=0.8)
        plural = [f"batch {batch}\n{threads} thread{'s' * (threads > 1)}" for threads, batch in groups]
        axes.set_xticks(range(len(groups)), plural)
        axes.set_ylabel("times as fast as eager")
        axes.legend(frameon=False, fontsize=8, ncols=len(backends), loc="lower left", bbox_to_anchor=(0, 1))

    return alone(figure("bench", draw, width, 3.2))
