"""torchvision: every classification, segmentation, video and detection model that this machine can trace."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torchvision import models

KINDS = ("", "segmentation", "video", "detection", "optical_flow")
LARGE = ("vit_h_14", "regnet_y_128gf")
"""Too many parameters for the float64 comparison in 24 GiB with other processes beside it."""
FIXED = dict.fromkeys(["vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "maxvit_t"], 224) | {"inception_v3": 128}
SINGLE_OUTPUT = {name: {"aux_logits": False, "init_weights": False} for name in ("googlenet", "inception_v3")}


def names() -> list[str]:
    """Names as torchvision lists them; `segmentation/NAME` and so on for the others."""
    found = []
    for kind in KINDS:
        module = getattr(models, kind) if kind else models
        found += [f"{kind}/{name}" if kind else name for name in models.list_models(module=module)]
    return [name.replace("/", ".") for name in dict.fromkeys(found) if name not in LARGE]


def build(name: str) -> tuple[nn.Module, Any]:
    """The model with random weights, and an example."""
    torch.manual_seed(0)
    kind, _, plain = name.rpartition(".")
    if kind == "detection":
        # random weights are sure of nothing: with the usual threshold there would be no boxes to compare
        threshold = {"box_score_thresh": 0.0} if "rcnn" in plain else {"score_thresh": 0.0}
        size = {} if plain.startswith("ssd") else {"min_size": 96, "max_size": 96}
        model = models.get_model(plain, weights=None, weights_backbone=None, **size, **threshold)
        return model.eval(), ([torch.rand(3, 96, 96)],)
    extra: dict[str, Any] = SINGLE_OUTPUT.get(plain, {})
    if kind == "segmentation":
        extra = {"weights_backbone": None}
    model = models.get_model(plain, weights=None, **extra).eval()
    if kind == "optical_flow":
        return model, (torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128))
    if kind == "video":
        size = 224 if "mvit" in plain or plain == "s3d" else 64
        return model, torch.randn(1, 3, 16, size, size)
    size = FIXED.get(plain, 64)
    return model, torch.randn(1 if size == 224 else 2, 3, size, size)
