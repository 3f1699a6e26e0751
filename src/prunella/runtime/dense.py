"""A fast dense model: of its two kernels for linear layers in float32, torch runs the slower one on some processors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from prunella.measure.clock import now, since
from prunella.model.copying import frozen_copy
from prunella.model.forward import forward
from prunella.runtime.convert import check_request
from prunella.runtime.layers import FastLinear
from prunella.runtime.record import LayerRecord, Sparsified, with_record
from prunella.runtime.tuning.acceptance import Acceptance, interleaved
from prunella.runtime.tuning.choice import Route
from prunella.runtime.tuning.eligible import LayerForm, bias_of, problems, read_layers, weight_of
from prunella.runtime.tuning.tune import Verdict, candidates_dense, decide, density
from prunella.types import Inputs


def dense_fast(
    model: nn.Module, example: Inputs, *, tokens: Sequence[int] = (), seconds: float = 0.5, seed: int = 0
) -> nn.Module:
    """A copy of `model` for inference whose linear layers in float32 run the faster of torch's two dense kernels.

    No zeros are skipped: compare a sparse model with this one. `sparsified(model)` says which layers were replaced. The
    names and shapes of the parameters stay the same. tokens, seconds: as in `prunella.sparse`. Errors: RequestError for
    sizes out of range or an example that the model does not accept.
    """
    check_request(tokens, seconds)
    begin, dense = now(), frozen_copy(model)
    inputs_read, fast, layers = read_layers(dense, example), frozen_copy(dense), list[LayerRecord]()
    verdicts: dict[object, tuple[Verdict, ...]] = {}
    with torch.inference_mode(False), torch.no_grad():
        for name, form in inputs_read.forms.items():
            module, shapes = fast.get_submodule(name), inputs_read.shapes[name]
            if form.plain and name and _is_plain(fast, module):
                key = (tuple(weight_of(module).shape), module.bias is None, tuple(sorted(shapes)))
                if key not in verdicts:
                    verdicts[key] = _verdicts(form, module, shapes, tokens, seconds, seed)
                layers.append(_replace(fast, name, module, verdicts[key]))
    outcome = _judge(dense, fast, example) if any(not layer.why for layer in layers) else Acceptance(_AS_FAST)
    record = Sparsified(tuple(layers), outcome, seconds=since(begin), action="run oneDNN's dense kernel")
    return with_record(fast if outcome.kept else dense, record)


_AS_FAST = "torch runs the faster kernel by itself"


def _judge(dense: nn.Module, fast: nn.Module, example: Inputs) -> Acceptance:
    """Whether the model with other kernels is kept: unless it is slower."""
    runs = {"dense": partial(forward, dense, example), "fast": partial(forward, fast, example)}
    with torch.inference_mode():
        ratio = interleaved(runs).ratio
    return Acceptance(ratio.verdict if ratio.slower else "", ratio)


def _is_plain(model: nn.Module, module: nn.Module) -> bool:
    """Whether the weight is in float32 on the CPU and not tied to another layer's."""
    weight = module.weight
    shared = sum(p is weight for _, p in model.named_parameters(remove_duplicate=False)) > 1
    return weight.dtype is torch.float32 and weight.device.type == "cpu" and not shared


def _verdicts(
    form: LayerForm,
    module: nn.Module,
    shapes: set[tuple[int, ...]],
    tokens: Sequence[int],
    seconds: float,
    seed: int,
) -> tuple[Verdict, ...]:
    todo = problems(form, shapes, tokens)
    verdicts = []
    for problem in todo:
        runs = candidates_dense(form.matrix(module), bias_of(module), problem, seed)
        verdicts.append(decide(runs, problem, seconds / len(todo), seed, lambda choice: choice is Route.TORCH))
    return tuple(verdicts)


def _replace(model: nn.Module, name: str, module: nn.Module, verdicts: tuple[Verdict, ...]) -> LayerRecord:
    zeros = 1 - density(weight_of(module))
    if all(verdict.choice is Route.TORCH for verdict in verdicts):
        return LayerRecord(name, zeros, verdicts, "F.linear is as fast")
    layer = LayerRecord(name, zeros, verdicts)
    parent, _, leaf = name.rpartition(".")
    weight, bias = module._parameters["weight"], module._parameters.get("bias")
    assert weight is not None
    fast = FastLinear(weight, bias, table=layer.table).eval()
    fast.load_state_dict(module.state_dict(), assign=True)
    setattr(model.get_submodule(parent), leaf, fast.requires_grad_(False))
    return layer
