"""YOLO: prune, train on in Ultralytics' own loop, validate, predict, export. A few minutes.

Needs `pip install ultralytics`. Red and blue squares stand for your data, and a small YOLOv8 for your network.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from parts import options

import prunella as pr


def squares(folder: Path, count: int, size: int = 64) -> Path:
    """Images with one square each, and their labels; the file that names both."""
    import cv2
    import numpy as np

    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    for k in range(count):
        image = random.integers(90, 140, (size, size, 3)).astype(np.uint8)
        (x, y), kind = random.integers(2, size - 26, 2), k % 2
        image[y : y + 24, x : x + 24] = (230, 40, 40) if kind else (40, 40, 230)
        cv2.imwrite(str(folder / "images" / f"{k}.png"), image)
        box = f"{kind} {(x + 12) / size} {(y + 12) / size} {24 / size} {24 / size}\n"
        (folder / "labels" / f"{k}.txt").write_text(box)
    data = folder / "data.yaml"
    data.write_text(f"path: {folder.resolve()}\ntrain: images\nval: images\nnames: {{0: red, 1: blue}}\n")
    return data


def main() -> None:
    given = options(__doc__)
    if importlib.util.find_spec("ultralytics") is None:
        print("this example needs Ultralytics: pip install ultralytics")
        return
    import ultralytics
    import yaml

    torch.manual_seed(0)
    source = Path(ultralytics.__file__).parent / "cfg" / "models" / "v8" / "yolov8.yaml"
    size = {"nc": 2, "scales": {"n": [0.33, 0.125, 1024]}}
    (given.out / "yolov8n-two.yaml").write_text(yaml.safe_dump({**yaml.safe_load(source.read_text()), **size}))
    data = squares(given.out / "data", 8 if given.quick else 64)
    how = {"data": str(data), "imgsz": 64, "batch": 8, "device": "cpu", "workers": 0, "plots": False, "verbose": False}
    how |= {"project": str(given.out), "exist_ok": True}

    yolo = ultralytics.YOLO(str(given.out / "yolov8n-two.yaml"))
    yolo.train(epochs=1 if given.quick else 15, name="dense", **how)
    dense = sum(p.numel() for p in yolo.model.parameters())
    recipe = pr.Recipe(pr.criteria.group_norm, round_to=8)
    model = yolo.model.float().eval()
    plan = pr.plan(model, torch.zeros(1, 3, 64, 64), recipe, target=pr.MACs(0.7))
    pr.integrations.UltralyticsPruning(pr.shrink(model, plan)).attach(yolo)
    yolo.train(epochs=1 if given.quick else 10, name="pruned", **how)
    small = sum(p.numel() for p in yolo.model.parameters())
    metrics = yolo.val(name="val", **how)
    print(f"{dense:,} parameters dense, {small:,} pruned; mAP50 {metrics.box.map50:.3f}")
    assert small < dense
    print(yolo.predict(str(given.out / "data" / "images" / "0.png"), imgsz=64, verbose=False)[0].boxes.cls)
    if not given.quick:
        print(yolo.export(format="onnx", imgsz=64, dynamic=True))


if __name__ == "__main__":
    main()
