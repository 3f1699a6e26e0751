"""Image corruptions as small tensor functions with five levels, deterministic for each seed.

Images are `(batch, channels, height, width)`. Levels are in units of the standard deviation of the batch, so that they
do not depend on the normalization of the input. The results are not the images of ImageNet-C.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, interpolate, pad

from prunella.errors import RequestError

Corruption = Callable[[Tensor, int, int], Tensor]
"""(images, severity from 1 to 5, seed) -> images of the same shape."""


def gaussian_noise(images: Tensor, severity: int, seed: int = 0) -> Tensor:
    """Independent noise of `0.1, 0.2, 0.4, 0.6, 1` times the spread."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(images.shape, generator=generator, device="cpu").to(images)
    return images + noise * images.std() * _level(severity, (0.1, 0.2, 0.4, 0.6, 1.0))


def blur(images: Tensor, severity: int, seed: int = 0) -> Tensor:
    """A Gaussian window of `0.4, 0.7, 1, 1.5, 2.5` pixels, edges repeated."""
    width = _level(severity, (0.4, 0.7, 1.0, 1.5, 2.5))
    radius = int(3 * width) + 1
    window = torch.exp(-(torch.arange(-radius, radius + 1, device="cpu").to(images) ** 2) / (2 * width**2))
    window = window / window.sum()
    channels = images.shape[1]
    for shape, sides in (((1, -1), (radius, radius, 0, 0)), ((-1, 1), (0, 0, radius, radius))):
        kernel = window.reshape(1, 1, *shape).expand(channels, -1, -1, -1)
        images = conv2d(pad(images, sides, mode="replicate"), kernel, groups=channels)
    return images


def brightness(images: Tensor, severity: int, seed: int = 0) -> Tensor:
    """Everything lighter by `0.2, 0.4, 0.7, 1, 1.5` times the spread."""
    return images + images.std() * _level(severity, (0.2, 0.4, 0.7, 1.0, 1.5))


def contrast(images: Tensor, severity: int, seed: int = 0) -> Tensor:
    """Distances to each image's mean shrink to `0.75, 0.5, 0.4, 0.3, 0.15`."""
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + (images - mean) * _level(severity, (0.75, 0.5, 0.4, 0.3, 0.15))


def pixelate(images: Tensor, severity: int, seed: int = 0) -> Tensor:
    """Squares of `2, 2, 3, 4, 6` pixels become their mean, at level 1 mixed half with the original."""
    side = int(_level(severity, (2, 2, 3, 4, 6)))
    coarse = avg_pool2d(images, side, ceil_mode=True, count_include_pad=False)
    wide = interpolate(coarse, scale_factor=float(side), mode="nearest")[..., : images.shape[2], : images.shape[3]]
    return (wide + images) / 2 if severity == 1 else wide


CORRUPTIONS: dict[str, Corruption] = {
    "gaussian noise": gaussian_noise,
    "blur": blur,
    "brightness": brightness,
    "contrast": contrast,
    "pixelate": pixelate,
}


def _level(severity: int, levels: tuple[float, ...]) -> float:
    if severity not in range(1, 6):
        raise RequestError(f"severity {severity} is out of range", "there are five levels", "severity=1 to 5")
    return levels[severity - 1]
