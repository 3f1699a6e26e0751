"""torchvision, also where its compiled operators do not fit the build of torch: the one that is needed, in Python."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

import torch
from torch import Tensor

_KEPT: list[torch.library.Library] = []


def suppressed(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """The best boxes from the best on, without those that overlap with a better one."""
    from torchvision.ops import box_iou

    overlaps = (box_iou(boxes, boxes) > iou_threshold).tolist()
    kept: list[int] = []
    for box in scores.argsort(descending=True, stable=True).tolist():
        if not any(overlaps[better][box] for better in kept):
            kept.append(box)
    return torch.tensor(kept, dtype=torch.int64)


def has_operators() -> bool:
    """Whether torchvision's library opens."""
    found = importlib.util.find_spec("torchvision")
    folder = Path(found.origin).parent if found and found.origin else Path()
    try:
        ctypes.CDLL(str(next(folder.glob("_C*.so"))))
    except (OSError, StopIteration):
        return False
    return True


def supply_operators() -> None:
    """Before torchvision is imported: give it what its library would."""
    if has_operators():
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")
    library.impl("nms", suppressed, "CPU")
    _KEPT.append(library)
    from torchvision import extension

    extension._has_ops = lambda: True


supply_operators()
