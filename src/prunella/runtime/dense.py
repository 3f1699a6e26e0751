"""Dense, but fast: torch has two kernels for a linear layer in float32, and takes the slower one on some processors."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from prunella.measure.machine import cpu_name
from prunella.model.forward import forward
from prunella.model.unwrap import unwrap
from prunella.runtime.convert import Layer, Sparsified, check_request, kernels, noted
from prunella.runtime.fx.fuse import copied
from prunella.runtime.layers import FastLinear
from prunella.runtime.tuning.acceptance import interleaved
from prunella.runtime.tuning.choice import Route
from prunella.runtime.tuning.eligible import bias_of, matrix_of, problems, sizes
from prunella.runtime.tuning.tune import Verdict, candidates_dense, decide, density
from prunella.types import Inputs


def dense_fast(
    model: nn.Module, example: Inputs, *, tokens: Sequence[int] = (), seconds: float = 0.5, seed: int = 0
) -> nn.Module:
    """A copy of `model` for inference whose linear layers in float32 run by the quicker of torch's two dense kernels.

    No zero is skipped: it is what a claim about sparsity has to be compared with. `sparsified(model)` says which layers
    changed. Names and shapes of the parameters stay. tokens, seconds: as in `prunella.sparse`. Errors: RequestError for
    sizes out of range or an example that the model does not take.
    """
    check_request(tokens, seconds)
    begin, dense = time.perf_counter(), copied(unwrap(model))
    met, made, layers = sizes(dense, example), copied(dense), list[Layer]()
    known: dict[object, tuple[Verdict, ...]] = {}
    with torch.inference_mode(False), torch.no_grad():
        for name, module in list(made.named_modules()):
            if type(module) is nn.Linear and name and name in met and _plain(made, module):
                like = (tuple(module.weight.shape), module.bias is None, tuple(sorted(met[name])))
                if like not in known:
                    known[like] = _verdicts(module, met[name], tokens, seconds, seed)
                layers.append(_swapped(made, name, module, known[like]))
    pair = {"dense": partial(forward, dense, example), "fast": partial(forward, made, example)}
    changed = any(not layer.why for layer in layers)
    with torch.inference_mode():
        ratio = interleaved(pair).ratio if changed else None
    worse = ratio is None or ratio.slower
    why = "torch takes the quicker kernel by itself" if ratio is None else f"{ratio.verdict}" if worse else ""
    record = Sparsified(
        tuple(layers), not why, why, ratio, 0.0, torch.get_num_threads(), cpu_name(), kernels(),
        time.perf_counter() - begin, does="take oneDNN's dense kernel",
    )  # fmt: skip
    return noted(dense if why else made, record)


def _plain(model: nn.Module, module: nn.Linear) -> bool:
    """Whether the weight is float32 on the CPU and no other layer's."""
    weight = module.weight
    shared = sum(p is weight for _, p in model.named_parameters(remove_duplicate=False)) > 1
    return weight.dtype is torch.float32 and weight.device.type == "cpu" and not shared


def _verdicts(
    module: nn.Linear, shapes: set[tuple[int, ...]], tokens: Sequence[int], seconds: float, seed: int
) -> tuple[Verdict, ...]:
    todo = problems(module, shapes, tokens)
    each = seconds / max(1, len(todo))
    made = []
    for problem in todo:
        runs = candidates_dense(matrix_of(module), bias_of(module), problem, seed)
        made.append(decide(runs, problem, each, seed, lambda choice: choice is Route.TORCH))
    return tuple(made)


def _swapped(model: nn.Module, name: str, module: nn.Linear, verdicts: tuple[Verdict, ...]) -> Layer:
    zeros = 1 - density(module.weight.detach())
    if all(verdict.choice is Route.TORCH for verdict in verdicts):
        return Layer(name, zeros, verdicts, "F.linear is as fast")
    layer = Layer(name, zeros, verdicts)
    parent, _, leaf = name.rpartition(".")
    fast = FastLinear(module.weight, module.bias, table=layer.table).eval()
    fast.load_state_dict(module.state_dict(), assign=True)
    setattr(model.get_submodule(parent), leaf, fast.requires_grad_(False))
    return layer
