"""`prunella.sparse` on an accelerator: the fastest operation of torch for each layer and number of tokens."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from prunella.graph.verify import relative_error
from prunella.model.device import device_name, devices_of, short_of_memory
from prunella.runtime.assemble import MIN_SPARSITY, Forms, put
from prunella.runtime.fx.fuse import has_hooks
from prunella.runtime.kernels.accelerator import AcceleratorKernel, kernels_of
from prunella.runtime.kernels.config import Precision
from prunella.runtime.record import Environment, LayerRecord, why_not_faster
from prunella.runtime.tuning.choice import Choice, Problem, Route, Table, is_dense
from prunella.runtime.tuning.eligible import Layers, bias_of, problems, weight_of
from prunella.runtime.tuning.tune import Run, Verdict, decide, density

log = logging.getLogger(__name__)
LAYER_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
"""The largest difference of a kernel's output from that of dense code, relative to the largest value, by dtype."""
_NO_PATTERN = "its zeros have no pattern that a kernel of the device skips: 2:4 in half precision, or whole blocks"


@final
class AcceleratedLinear(nn.Module):
    """A linear layer that picks its operation by the number of tokens; dense wherever the others do not apply.

    It keeps its dense weight, from which the operands are packed at their first use and whenever it has changed. torch
    does not count writes through `weight.data`: after one, convert the model again.
    """

    bias: nn.Parameter | None

    def __init__(self, weight: Tensor, bias: Tensor | None, *, table: Table) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
        self.table = table
        self._packed: dict[Choice, tuple[tuple[int, int], Any]] = {}

    def forward(self, x: Tensor) -> Tensor:
        """`x W^T + b`."""
        choice = self.table.at(x.numel() // max(1, x.shape[-1]))
        kernel = kernels_of(self.weight.device).get(choice) if isinstance(choice, Route) else None
        if kernel is None or not self._applies(x):
            return functional.linear(x, self.weight, self.bias)
        return kernel.linear(x, self._operand(choice, kernel), self.bias)

    def _applies(self, x: Tensor) -> bool:
        grads = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        alike = x.dtype == self.weight.dtype and x.device == self.weight.device
        kind = x.device.type
        return alike and not grads and not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind))

    def _operand(self, choice: Choice, kernel: AcceleratorKernel) -> Any:
        state = self.weight.data_ptr(), self.weight._version
        if choice not in self._packed or self._packed[choice][0] != state:
            with torch.inference_mode(False), torch.no_grad():
                self._packed[choice] = state, kernel.pack(self.weight.detach())
        return self._packed[choice][1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_packed": {}}

    def extra_repr(self) -> str:
        """The sizes."""
        rows, columns = self.weight.shape
        return f"in_features={columns}, out_features={rows}, bias={self.bias is not None}"


@dataclass
class AcceleratorTuner:
    """Measures each kind of layer once: layers of one shape, pattern and problem share a verdict."""

    seconds: float
    seed: int
    evict: Callable[[Choice], object] | None = None
    known: dict[tuple[object, ...], Verdict] = field(default_factory=dict)

    def linear(
        self, weight: Tensor, bias: Tensor | None, routes: Mapping[Route, AcceleratorKernel], problem: Problem
    ) -> Verdict:
        """The verdict on a linear layer for one number of tokens."""
        shape = (tuple(weight.shape), weight.dtype, weight.device, bias is None)
        key = (*shape, round(density(weight), 2), tuple(routes), problem)
        if key not in self.known:
            runs = self._runs(weight, bias, routes, problem)
            device = str(weight.device)
            self.known[key] = decide(runs, problem, self.seconds, self.seed, before=self.evict, device=device)
        return self.known[key]

    def _runs(
        self, weight: Tensor, bias: Tensor | None, routes: Mapping[Route, AcceleratorKernel], problem: Problem
    ) -> dict[Choice, Run]:
        """Choice -> a call of the layer on noise. A kernel that fails, or differs from dense code, is left out."""
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.randn((problem.size, weight.shape[1]), generator=generator, device="cpu").to(weight)
        runs: dict[Choice, Run] = {}
        expected = functional.linear(x, weight, bias)
        for choice in (Route.TORCH, *routes):
            layer = AcceleratedLinear(weight, bias, table=Table(((1, choice),))).eval()
            try:
                with torch.inference_mode():
                    difference = relative_error([expected], [layer(x)])
            except Exception as error:  # a kernel may raise anything, from its compiler too
                if short_of_memory(error):
                    raise
                log.info("%s does not take a weight of shape %s: %s", choice.value, tuple(weight.shape), error)
                continue
            if difference <= LAYER_TOLERANCE.get(weight.dtype, 1e-3):
                runs[choice] = _call(layer, x)
            else:
                log.warning("%s is left out: its output differs by %.1e", choice.value, difference)
        return runs


def _call(layer: nn.Module, x: Tensor) -> Run:
    return lambda: layer(x)


def measured(
    model: nn.Module, layers: Layers, tokens: Sequence[int], seconds: float, seed: int
) -> tuple[LayerRecord, ...]:
    """The choices for every layer of a model on accelerators; also for weights that stay dense, with the reasons."""
    tuner = AcceleratorTuner(seconds, seed, eviction(model))
    with torch.inference_mode(False), torch.no_grad():
        return tuple(_record(model, name, layers, tokens, tuner) for name in layers.forms)


def _record(model: nn.Module, name: str, layers: Layers, tokens: Sequence[int], tuner: AcceleratorTuner) -> LayerRecord:
    module, form = model.get_submodule(name), layers.forms[name]
    weight = weight_of(module)
    zeros = 1 - density(weight) if weight.numel() else 0.0
    why = _why_not_measured(module, form.plain, zeros)
    routes = {} if why else {r: k for r, k in kernels_of(weight.device).items() if k.applies(weight)}
    if not why and all(is_dense(route) for route in routes):
        why = _NO_PATTERN
    todo = () if why else problems(form, layers.shapes[name], tokens)
    if why or not todo:
        return LayerRecord(name, zeros, (), why or "the sizes of its input are unknown")
    tuner_seconds, tuner.seconds = tuner.seconds, tuner.seconds / len(todo)
    try:
        verdicts = tuple(tuner.linear(weight, bias_of(module), routes, problem) for problem in todo)
    finally:
        tuner.seconds = tuner_seconds
    wins = any(not is_dense(verdict.choice) for verdict in verdicts)
    return LayerRecord(name, zeros, verdicts, "" if wins else why_not_faster(verdicts[-1]))


def _why_not_measured(module: nn.Module, plain: bool, zeros: float) -> str:
    """Why a layer stays dense without a measurement; empty if it is measured."""
    weight = weight_of(module)
    if not kernels_of(weight.device):
        return f"there are no kernels for {weight.device.type}"
    if not plain:
        return "the kernels of accelerators take linear layers alone"
    if has_hooks(module):
        return "it has hooks or a parametrization"
    return "it has hardly any zeros" if zeros < MIN_SPARSITY else ""


def eviction(model: nn.Module) -> Callable[[Choice], object] | None:
    """A call that empties the cache of a device; None if all weights fit in it, as they do in the model then."""
    device = next((p.device for p in model.parameters() if p.device.type == "cuda"), None)
    if device is None:
        return None
    cache = int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0))
    if sum(p.nbytes for p in model.parameters()) <= cache or not cache:
        return None
    other = torch.ones(2 * cache, dtype=torch.uint8, device=device)
    return lambda choice: other.add_(1)


def assembled_there(model: nn.Module, forms: Forms, tables: Mapping[str, Table]) -> nn.Module:
    """`model`, changed in place, with these layers replaced."""
    for name, table in tables.items():
        layer = model.get_submodule(name)
        new = AcceleratedLinear(weight_of(layer), bias_of(layer), table=table).eval()
        if not name:
            return new
        put(model, name, new)
    return model


def environment(model: nn.Module) -> Environment:
    """The conditions under which measurements of this model are valid."""
    places = devices_of(model).split(", ")
    names = ", ".join(dict.fromkeys(device_name(torch.device(place)) for place in places))
    return Environment(torch.get_num_threads(), names, f"those of torch {torch.__version__}")


def precision_of(model: nn.Module) -> Precision:
    """The precision by whose tolerance two models are compared: that of the weights."""
    halves = any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters())
    return Precision.BF16 if halves else Precision.FP32
