"""On a GPU: linear layers of a 7B shape in 2:4 and in blocks against dense code, and blocks of a 7B in one shot.

    python benchmarks/gpu.py [--tokens 1 2048] [--blocks 2] [--device cuda]

Never run on a GPU yet. The layers are in bfloat16, with random weights made on the device; each operation is compared
with dense code in interleaved rounds (`prunella.sparse`). Blocks of a Llama shape are then pruned to 2:4 on random
hidden states, and the time of all 32 is the mean of those after the first, times 32. Last comes `prune` on the shapes
of ResNet-50 and ViT-B/16, random weights and images, in float32. Figures go to results/gpu.json after each part.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
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


class Bottleneck(nn.Module):
    """A block of ResNet-50."""

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.one, self.bn1 = nn.Conv2d(before, width, 1, bias=False), nn.BatchNorm2d(width)
        self.two, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.three, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        changes = stride > 1 or before != 4 * width
        same = nn.Sequential(nn.Conv2d(before, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width))
        self.short = same if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn2(self.two(torch.relu(self.bn1(self.one(x))))))
        return torch.relu(self.bn3(self.three(y)) + self.short(x))


def resnet50(width: int = 64, depths: tuple[int, ...] = (3, 4, 6, 3)) -> nn.Module:
    """The shapes of ResNet-50."""
    stem = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    layers: list[nn.Module] = [*stem]
    before = width
    for stage, depth in enumerate(depths):
        for block in range(depth):
            inner = width << stage
            layers.append(Bottleneck(before, inner, 2 if stage and not block else 1))
            before = 4 * inner
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 1000))


class ViTBlock(nn.Module):
    """A block of ViT-B: attention and feed-forward part, with norms before them."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.other = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        size = self.q.out_features // self.heads
        parts = (f(y).unflatten(-1, (-1, size)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.o(nn.functional.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.other(x))))


class ViT(nn.Module):
    """The shapes of ViT-B/16."""

    def __init__(self, width: int = 768, depth: int = 12, heads: int = 12, image: int = 224) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.places = nn.Parameter(torch.zeros(1, (image // 16) ** 2, width))
        self.blocks = nn.Sequential(*(ViTBlock(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.patches(x).flatten(2).mT + self.places)).mean(1))


def structured(device: torch.device, nets: dict[str, nn.Module], image: int = 224) -> dict[str, Any]:
    """Seconds of `prune` at half of the multiply-adds, without labels and without distillation."""
    seconds: dict[str, Any] = {}
    for name, net in nets.items():
        model = net.to(device).eval()
        data = [torch.randn(32, 3, image, image, device=device) for _ in range(8)]
        start = time.perf_counter()
        pruned = pr.prune(model, data[0][:4], target=pr.MACs(0.5), data=data, recover="reconstruct")
        synchronize(device)
        seconds[name] = round(time.perf_counter() - start, 1)
        print(f"{name}: {seconds[name]} s, {pruned.plan.outcome}", flush=True)
    return seconds


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
    parts: dict[str, Callable[[], Any]] = {
        "one_shot": lambda: one_shot(device, max(2, asked.blocks)),
        "structured": lambda: structured(device, {"ResNet-50": resnet50(), "ViT-B/16": ViT()}),
        "layers": lambda: [row for tokens in asked.tokens for row in layers(device, tokens, asked.seconds)],
    }
    for name, part in parts.items():
        result[name] = part()
        write_atomic(RESULTS, json.dumps(result, indent=1).encode())


if __name__ == "__main__":
    main()
