"""Clocks that wait for the GPU, and the kernels of `prunella.sparse` against dense code."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import prunella as pr
from prunella.graph.verify import relative_error
from prunella.measure.timing import compare_latency
from prunella.runtime.kernels.accelerator import BLOCKS, kernels_of
from prunella.runtime.tuning.choice import Route
from tests.runtime.test_accelerated import two_of_four


def by_events(run: object, device: torch.device, calls: int = 20) -> float:
    """Seconds of one call, by events of CUDA."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    for _ in range(calls):
        run()  # type: ignore[operator]
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1e3 / calls


def test_the_clock_agrees_with_events(real: torch.device) -> None:
    small, large = (torch.randn(size, size, device=real) for size in (2048, 4096))
    runs = {"large": lambda: large @ large, "small": lambda: small @ small}
    compared = compare_latency(runs, rounds=9, warmup=3, device=str(real))
    for samples in compared.latencies:
        assert samples.median == pytest.approx(by_events(runs[samples.name], real), rel=0.25)
    assert compared.ratio.value > 4


def blocked(weight: Tensor, block: int, density: float = 0.2) -> Tensor:
    shape = weight.shape[0] // block, weight.shape[1] // block
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < density
    return weight * mask.repeat_interleave(block, 0).repeat_interleave(block, 1).to(weight)


@pytest.mark.parametrize("tokens", [1, 16, 100, 2048])
@pytest.mark.parametrize("route", [Route.COMPILED, Route.SEMI, *BLOCKS], ids=lambda r: r.value)
def test_each_kernel_computes_what_dense_code_computes(real: torch.device, route: Route, tokens: int) -> None:
    kernel = kernels_of(real)[route]
    dense = torch.randn(512, 1024, device=real, dtype=torch.bfloat16)
    weight = two_of_four(dense) if route is Route.SEMI else blocked(dense, BLOCKS.get(route, 16))
    assert kernel.applies(weight)
    x, bias = (torch.randn(n, device=real, dtype=torch.bfloat16) for n in ((tokens, 1024), (512,)))
    with torch.inference_mode():
        y = kernel.linear(x, kernel.pack(weight), bias)
    assert relative_error([functional.linear(x, weight, bias).float()], [y.float()]) < 3e-2


@pytest.mark.parametrize("zeros", ["2:4", "blocks"])
def test_a_sparse_model_is_not_slower_and_computes_the_same(real: torch.device, zeros: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4096, 11008), nn.SiLU(), nn.Linear(11008, 4096)).eval().to(real, torch.bfloat16)
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.copy_(two_of_four(layer.weight) if zeros == "2:4" else blocked(layer.weight, 64))
    x = torch.randn(2048, 4096, device=real, dtype=torch.bfloat16)
    quick = pr.sparse(model, x, seconds=2.0)
    record = pr.runtime.sparsified(quick)
    print(f"\n{record}")
    with torch.inference_mode():
        assert relative_error([model(x).float()], [quick(x).float()]) < 0.1
    assert record.outcome.full_model is None or not (record.replaced and record.outcome.full_model.slower)
