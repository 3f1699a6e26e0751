"""The packed image sets of the benchmarks: JPEG files one after the other in an `.npz`, decoded with Pillow.

The folder is `$PRUNELLA_DATA`, or `../shared/data` beside the repository.
"""

from __future__ import annotations

import io
import os
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

CIFAR_MEAN, CIFAR_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def data_folder() -> Path:
    """Where the benchmark data should be."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "data"
    return Path(os.environ.get("PRUNELLA_DATA", beside))


def missing(*names: str) -> list[str]:
    """Those of `names` that the data folder does not hold."""
    return [name for name in names if not (data_folder() / name).is_file()]


def read_packed(name: str, *, stop: int | None = None) -> tuple[Tensor, Tensor]:
    """Decode the first `stop` images: uint8 (N, 3, H, W) and int64 labels (N,)."""
    with np.load(data_folder() / name, allow_pickle=False) as packed:
        head, rest, ends = packed["header"].tobytes(), packed["jpeg"].tobytes(), packed["offsets"]
        labels = torch.from_numpy(packed["labels"][:stop].astype(np.int64))
    files = (head + rest[a:b] for a, b in pairwise(ends[: len(labels) + 1]))
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), labels


def cifar_input(pixels: Tensor) -> Tensor:
    """uint8 pixels to the float input that the CIFAR networks were trained on."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CIFAR_MEAN, CIFAR_STD))
    return (pixels.float() / 255 - mean) / std


def lite_input(pixels: Tensor) -> Tensor:
    """uint8 pixels to the input of EfficientNet-Lite: about -1 to 1."""
    return (pixels.float() - 127) / 128


def jitter(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Random shift by up to 4 pixels with zero border and random mirror, one draw an image."""
    count, _, height, width = pixels.shape
    wide = torch.nn.functional.pad(pixels, (4, 4, 4, 4))
    top, left = torch.randint(0, 9, (2, count), generator=generator)
    mirror = torch.rand(count, generator=generator) < 0.5
    rows = top[:, None] + torch.arange(height)
    columns = left[:, None] + torch.arange(width)
    columns = torch.where(mirror[:, None], columns.flip(1), columns)
    return wide[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
