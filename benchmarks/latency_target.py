"""Asked against measured: is a `Latency` hit on this machine?

    PYTHONPATH=src:. python benchmarks/latency_target.py [--quick] [--out FILE]

For every network and ratio a plan is made for `Latency(ratio)`, the model is really shrunk, and both are timed anew in
interleaved rounds, which the plan has not seen. Prints a table; --out writes the rows as JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))

import prunella as pr
from prunella.errors import TargetMissed
from prunella.measure.timing import side_by_side
from prunella.targets import TOLERANCE


def demo_cnn() -> tuple[nn.Module, Tensor]:
    """The plain convolutional network of the digits demo, wider."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for wide_in, wide_out in ((1, 32), (32, 64), (64, 64), (64, 64)):
        layers += [nn.Conv2d(wide_in, wide_out, 3, padding=1, bias=False), nn.BatchNorm2d(wide_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)), torch.randn(16, 1, 16, 16)


def resnet20() -> tuple[nn.Module, Tensor]:
    """ResNet-20 for 32x32 images; random weights, which take the same time."""
    from resnet import CifarResNet

    torch.manual_seed(0)
    return CifarResNet(3), torch.randn(8, 3, 32, 32)


NETS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {"demo CNN": demo_cnn, "ResNet-20": resnet20}


def row(name: str, ratio: float) -> dict[str, object]:
    """One network at one ratio."""
    model, inputs = NETS[name]()
    model.eval()
    start = time.perf_counter()
    try:
        plan = pr.plan(model, inputs, pr.Recipe(criterion=pr.criteria.group_norm), target=pr.Latency(ratio))
    except TargetMissed as error:
        return {"net": name, "asked": ratio, "missed": str(error).splitlines()[0]}
    spent = time.perf_counter() - start
    found = side_by_side(model, pr.shrink(model, plan), inputs, inputs, seconds=10.0)
    return {
        "net": name,
        "asked": ratio,
        "said": round(plan.got, 4),
        "measured": round(found.ratio, 4),
        "low": round(found.low, 4),
        "high": round(found.high, 4),
        "macs": round(plan.after.macs / plan.before.macs, 4),
        "hit": abs(found.ratio / ratio - 1) <= TOLERANCE,
        "seconds": round(spent, 1),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two ratios")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    ratios = (0.7, 0.4) if options.quick else (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
    print("| network | asked | the plan says | measured anew | 95 % | MACs | within 5 % | s |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    rows = []
    for name in NETS:
        for ratio in ratios:
            rows.append(found := row(name, ratio))
            if "missed" in found:
                print(f"| {name} | {ratio:g} | {found['missed']} | | | | | |", flush=True)
                continue
            cells = [found[key] for key in ("said", "measured")]
            interval = f"{found['low']}-{found['high']}"
            hit = "yes" if found["hit"] else "no"
            print(f"| {name} | {ratio:g} | {cells[0]} | {cells[1]} | {interval} | {found['macs']} | {hit} | "
                  f"{found['seconds']} |", flush=True)  # fmt: skip
    if options.out:
        options.out.write_text(json.dumps({"threads": torch.get_num_threads(), "rows": rows}, indent=1) + "\n")


main()
