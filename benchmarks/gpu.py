"""On a GPU: linear layers of a 7B shape in 2:4 and in blocks against dense code, and blocks of a 7B in one shot.

    python benchmarks/gpu.py [--tokens 1 2048] [--blocks 2] [--device cuda]

Never run on a GPU yet. The layers are in bfloat16, with random weights made on the device; each operation is compared
with dense code in interleaved rounds (`prunella.sparse`). Blocks of a Llama shape are then pruned to 2:4 on random
hidden states, and the time of all 32 is the mean of those after the first, times 32. Figures go to results/gpu.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import prunella as pr
from prunella.io.files import write_atomic
from prunella.model.device import device_name, synchronize

RESULTS = Path(__file__).parent / "results" / "gpu.json"
SHAPES = {"attention": (4096, 4096), "up": (11008, 4096), "down": (4096, 11008)}
BLOCKS, SEQUENCE, WINDOWS = 32, 2048, 32


def two_of_four(weight: Tensor) -> Tensor:
    pattern = torch.tensor([1.0, 0.0, 1.0, 0.0], device=weight.device).repeat(weight.shape[1] // 4)
    return weight * pattern.to(weight.dtype)


def blocked(weight: Tensor, block: int) -> Tensor:
    shape = weight.shape[0] // block, weight.shape[1] // block
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.2
    return weight * mask.to(weight).repeat_interleave(block, 0).repeat_interleave(block, 1)


def layers(device: torch.device, tokens: int, seconds: float) -> list[dict[str, Any]]:
    """One row for each shape and pattern."""
    rows = []
    for name, (out, width) in SHAPES.items():
        for pattern in ("2:4", "16", "32", "64"):
            layer = nn.Linear(width, out, bias=False, device=device, dtype=torch.bfloat16).eval()
            with torch.no_grad():
                zeros = two_of_four(layer.weight) if pattern == "2:4" else blocked(layer.weight, int(pattern))
                layer.weight.copy_(zeros)
            x = torch.randn(tokens, width, device=device, dtype=torch.bfloat16)
            record = pr.runtime.sparsified(pr.sparse(layer, x, seconds=seconds))
            verdicts = [v for one in record.layers for v in one.verdicts if v.problem.size == tokens]
            ratio = verdicts[-1].ratio if verdicts else None
            speed = None if ratio is None else [round(value, 3) for value in (ratio.value, ratio.low, ratio.high)]
            row = {"layer": name, "pattern": pattern, "tokens": tokens, "speed": speed, "record": str(record)}
            print(f"{name:10} {pattern:4} {tokens:5} tokens  {speed}", flush=True)
            rows.append(row)
    return rows


class Block(nn.Module):
    """The matrices of a block of a Llama of 7B, with a product of heads in place of attention."""

    def __init__(self, device: torch.device, width: int = 4096, inner: int = 11008) -> None:
        super().__init__()
        made: dict[str, Any] = {"bias": False, "device": device, "dtype": torch.bfloat16}
        self.norm, self.other = (nn.RMSNorm(width, device=device, dtype=torch.bfloat16) for _ in range(2))
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, **made) for _ in range(4))
        self.gate, self.up, self.down = (
            nn.Linear(*s, **made) for s in ((width, inner), (width, inner), (inner, width))
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        parts = (f(y).unflatten(-1, (-1, 128)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.o(nn.functional.scaled_dot_product_attention(*parts, is_causal=True).transpose(1, 2).flatten(2))
        z = self.other(x)
        return x + self.down(nn.functional.silu(self.gate(z)) * self.up(z))


def one_shot(device: torch.device, blocks: int) -> dict[str, Any]:
    """Seconds of a block, and of 32."""
    model = nn.Sequential(*(Block(device) for _ in range(blocks))).eval()
    data = [torch.randn(1, SEQUENCE, 4096, device=device, dtype=torch.bfloat16) for _ in range(WINDOWS)]
    ends: list[float] = []

    def note(*_: Any) -> None:
        synchronize(device)
        ends.append(time.perf_counter())

    start = time.perf_counter()
    pr.llm.solve_(model, data[0][:, :64], pr.llm.OneShot(pr.NM(2, 4)), data=data, on_layer=note)
    each = (ends[-1] - ends[6]) / max(1, blocks - 1)
    print(f"a block of 7B: {each:.1f} s, {BLOCKS} of them {each * BLOCKS / 60:.1f} min", flush=True)
    return {"block": each, "all": each * BLOCKS, "seconds": ends[-1] - start, "windows": WINDOWS, "sequence": SEQUENCE}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2048])
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--device", default="cuda")
    asked = parser.parse_args()
    if asked.device == "cuda" and not torch.cuda.is_available():
        print(f"skipped: torch {torch.__version__} finds no GPU")
        return
    device = torch.device(asked.device)
    result: dict[str, Any] = {"device": device_name(device), "torch": torch.__version__}
    result["layers"] = [row for tokens in asked.tokens for row in layers(device, tokens, asked.seconds)]
    result["one_shot"] = one_shot(device, max(2, asked.blocks))
    write_atomic(RESULTS, json.dumps(result, indent=1).encode())


if __name__ == "__main__":
    main()
