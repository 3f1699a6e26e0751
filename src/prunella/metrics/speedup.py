"""Theoretical and measured speed-up, effective multiply-adds and energy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from prunella.errors import NotSupported, RequestError
from prunella.measure.clock import now, since
from prunella.measure.count import compression, count_work, effective, measured_macs
from prunella.measure.profile import peak_memory
from prunella.measure.text import byte_size
from prunella.measure.timing import Comparison, compare_latency
from prunella.model.forward import forward
from prunella.model.state import mode
from prunella.model.trees import own, tensors
from prunella.registry.method import metric
from prunella.types import Inputs

_RAPL = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Speedup:
    """Multiply-adds before, after, and after with zeros left out; the measured latencies; counted memory in bytes."""

    macs: tuple[int, int]
    effective: float
    latency: Comparison
    batch: int
    memory: tuple[int, int]

    @property
    def theoretical(self) -> float:
        """Ratio of the multiply-adds."""
        return compression(self.macs[0], self.macs[1])

    @property
    def ideal(self) -> float:
        """The ratio if no zero were multiplied: what a perfect sparse kernel could reach."""
        return compression(self.macs[0], self.effective)

    @property
    def measured(self) -> float:
        """Ratio of the median latencies; its interval is `latency.ratio`."""
        return self.latency.ratio.value

    @property
    def throughput(self) -> tuple[float, float]:
        """Examples a second, dense and pruned."""
        first, second = self.latency.latencies[:2]
        return self.batch / first.median, self.batch / second.median

    def __str__(self) -> str:
        rate = "{:.4g} -> {:.4g} examples a second".format(*self.throughput)
        return "\n".join((
            f"multiply-adds: {self.theoretical:.3g}x fewer, {self.ideal:.3g}x without the zeros",
            f"measured: {self.latency.ratio.verdict}, {rate} (medians of {self.latency.rounds} interleaved rounds, "
            f"{self.latency.threads} threads, {self.latency.device})",
            f"peak memory, counted tensors: {byte_size(self.memory[0])} -> {byte_size(self.memory[1])}",
        ))  # fmt: skip


@metric(source="Blalock et al. 2020, arXiv:2003.03033; interval: Efron 1979, doi:10.1214/aos/1176344552")
def speedup(dense: nn.Module, pruned: nn.Module, inputs: Inputs, *, rounds: int = 40, seed: int = 0) -> Speedup:
    """Theoretical speed-up (multiply-adds) and measured speed-up (latency, with its interval).

    `C_out * (C_in / g) * k^2 * H_out * W_out` a convolution, from its real padding, stride, dilation and groups;
    effective multiply-adds are a layer's times the density of its weight. Latency is measured in turn, in random order,
    warmed up, as medians. Peak memory is counted over the tensors of a pass (`reporting.profile.peak_memory`): scratch
    memory inside kernels is not seen. Data: one batch; its first axis is taken as the number of examples.

    rounds: 5 or more. seed: of the order of the rounds.
    Errors: RequestError for inputs without a batch.

    Use: the speed-up on this machine, compared to the theoretical one. Avoid: predictions for another machine, batch
    size or number of threads.
    """
    first = next(iter(tensors(inputs)), None)
    if first is None or not first.dim():
        raise RequestError("the inputs hold no batch", "no tensor with an axis is in them", "pass an example batch")
    example = own(inputs)
    with mode(dense, training=False, compiled=True), mode(pruned, training=False, compiled=True), torch.no_grad():
        latency = compare_latency(
            {
                "dense": lambda: forward(dense, example, copy=False),
                "pruned": lambda: forward(pruned, example, copy=False),
            },
            rounds=rounds,
            seed=seed,
            device=str(first.device),
        )
    memory = peak_memory(dense, inputs), peak_memory(pruned, inputs)
    macs = measured_macs(dense, inputs), measured_macs(pruned, inputs)
    return Speedup(macs, effective_macs(pruned, inputs), latency, len(first), memory)


@metric(source="Evci et al. 2020, arXiv:1911.11134 (cost of a sparse layer, as a part of the dense one)")
def effective_macs(model: nn.Module, inputs: Inputs) -> float:
    """Multiply-adds of one forward pass that do not multiply by a zero of a weight.

    `sum over weights of MACs * (non-zeros / weights)`; work without a weight of its own, such as attention products,
    counts in full. For a masked model this equals the number in its plan. Data: one batch.

    Example:

        >>> import torch, prunella as pr
        >>> layer = torch.nn.Linear(4, 2)
        >>> layer.weight.data[0] = 0
        >>> pr.metrics.effective_macs(layer, torch.randn(1, 4))
        4.0

    Use: comparing masks, which do not change shapes. Avoid: as a speed: dense kernels multiply zeros too.
    """
    return effective(model, count_work(model, inputs))


@metric(source="Intel running average power limit, by Linux's powercap interface")
def energy(run: Callable[[], object], *, seconds: float = 2.0, root: Path = _RAPL) -> float:
    """Joules of the processor packages per call, including all other load on the machine.

    `(counter after - counter before) / calls`, over as many calls as fit into `seconds`; a counter that starts over is
    corrected once. Data: none. root: where Linux shows the counters.

    Errors: NotSupported, "not measurable here", where there are no counters or they may not be read (a virtual machine,
    another system, or no permission).
    run: the function to measure.

    Use: an otherwise idle machine. Avoid: short calls, and busy machines.
    """
    before, start = _counters(root), now()
    calls = 0
    while not calls or since(start) < seconds:
        run()
        calls += 1
    after = _counters(root)
    spent = sum(after[at][0] - now + (limit if after[at][0] < now else 0) for at, (now, limit) in before.items())
    return spent / 1e6 / calls


def _counters(root: Path) -> dict[Path, tuple[int, int]]:
    """The counter of each package in microjoules, and its largest value before it restarts."""
    counters = {}
    for package in sorted(root.glob("*-rapl:[0-9]*")):
        if package.name.count(":") == 1:  # what is in a package has a name with a second number
            try:
                limit = int((package / "max_energy_range_uj").read_text())
                counters[package] = int((package / "energy_uj").read_text()), limit
            except (OSError, ValueError) as error:
                raise _unmeasurable(f"{package.name} cannot be read: {error}") from error
    if not counters:
        raise _unmeasurable("this machine shows no energy counters")
    return counters


def _unmeasurable(why: str) -> NotSupported:
    return NotSupported("energy is not measurable here", why, "use a bare machine with RAPL, or an external meter")
