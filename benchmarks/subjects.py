"""The networks of the comparison: weights, batches without labels, a test, and what the peer may ignore."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from images import cifar_input, data_folder, lite_input, read_packed
from lite0 import dense_lite0
from resnet import pretrained
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from training import batches, predict

TEST = 4000
"""Test images, or all that there are."""
Correct = list[bool]


@dataclass(frozen=True)
class Subject:
    """One network. batches: (number, seed) -> batches without labels. test: which samples a model answers rightly.

    held_out: every how many batches one judges in `pr.prune`; 0 where distillation is not part of the comparison.
    """

    name: str
    dense: Callable[[], nn.Module]
    example: Any
    batches: Callable[[int, int], list[Any]]
    test: Callable[[nn.Module], Correct | dict[str, float]]
    shares: tuple[float, ...]
    count: int
    steps: int = 0
    last: str = "linear"
    spare: tuple[str, ...] = ()
    loss: Callable[[nn.Module, Any], Any] | None = None
    measure: str = "top-1, %"


def _fast(model: nn.Module) -> nn.Module:
    """In the memory order that halves the time of these networks on a CPU."""
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


# -- CIFAR-10 ------------------------------------------------------------------------------------------------------


def _resnet(depth: int, shares: tuple[float, ...], steps: int) -> Subject:
    return Subject(
        f"ResNet-{depth}", lambda: _fast(pretrained(depth)), torch.zeros(1, 3, 32, 32), _cifar_batches, _cifar_test,
        shares, steps * 4 // 3, steps, spare=("conv1", "*.conv2"),
    )  # fmt: skip


@cache
def _cifar(part: str, stop: int) -> tuple[Tensor, Tensor]:
    return read_packed(f"cifar10_{part}.npz", stop=stop)


def _cifar_batches(count: int, seed: int) -> list[Tensor]:
    """Batches of 128 augmented training images; the first ones are the same for every count."""
    parts = batches(*_cifar("train", 128 * 80), steps=count, batch=128, seed=seed)
    return [x.contiguous(memory_format=torch.channels_last) for x, _ in parts]


def _cifar_test(model: nn.Module) -> Correct:
    pixels, labels = _cifar("test", TEST)
    return _answers(_fast(model), pixels, labels, cifar_input)


def _answers(model: nn.Module, pixels: Tensor, labels: Tensor, prepare: Callable[[Tensor], Tensor]) -> Correct:
    found: list[bool] = (predict(model, pixels, prepare, batch=250).argmax(1) == labels).tolist()
    return found


# -- Fashion-MNIST -------------------------------------------------------------------------------------------------


class Vgg(nn.Sequential):
    """Six 3x3 convolutions with batch normalization, halved twice, and one linear layer; for 28x28 gray images."""

    def __init__(self, widths: Sequence[int | None] = (24, 24, None, 48, 48, None, 96, 96)) -> None:
        layers, wide = list[nn.Module](), 1
        for width in widths:
            if width is None:
                layers.append(nn.MaxPool2d(2))
            else:
                layers += [nn.Conv2d(wide, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
                wide = width
        self_ = [*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(wide, 10)]
        super().__init__(*self_)


@cache
def _fashion() -> dict[str, Tensor]:
    with np.load(data_folder() / "fashion_mnist.npz", allow_pickle=False) as packed:
        arrays = {name: torch.from_numpy(packed[name]) for name in ("x_train", "y_train", "x_test", "y_test")}
    images = {n: arrays[n].unsqueeze(1) for n in ("x_train", "x_test")}
    return {**images, **{n: arrays[n].long() for n in ("y_train", "y_test")}}


def _gray(pixels: Tensor) -> Tensor:
    return (pixels.float() / 255 - 0.286) / 0.353


def dense_vgg(folder: Path) -> nn.Module:
    """Trained once: 3 epochs of SGD with labels on the 20,000 images, seed 0."""
    torch.manual_seed(0)
    model, path = _fast(Vgg()), folder / "vgg.safetensors"
    if not path.is_file():
        data, steps, batch = _fashion(), 3 * 156, 128
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
        rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
        for step in range(steps):
            if step % 156 == 0:
                order = torch.randperm(len(data["x_train"]))
            chosen = order[step % 156 * batch : (step % 156 + 1) * batch]
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(_gray(data["x_train"][chosen])), data["y_train"][chosen])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            rates.step()
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: t.contiguous() for name, t in model.state_dict().items()}, path)
    model.load_state_dict(load_file(path))
    return model.eval()


def _fashion_batches(count: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pixels = _fashion()["x_train"]
    return [_gray(pixels[torch.randint(len(pixels), (128,), generator=generator)]) for _ in range(count)]


def _fashion_test(model: nn.Module) -> Correct:
    return _answers(model, _fashion()["x_test"][:TEST], _fashion()["y_test"][:TEST], _gray)


# -- ImageNet ------------------------------------------------------------------------------------------------------


@cache
def _imagenet() -> Tensor:
    return read_packed("imagenet1k_sample.npz")[0]


@cache
def _choices() -> Tensor:
    """What the dense network answers on the test half."""
    return predict(_fast(dense_lite0()), _imagenet()[1::2], lite_input, batch=50).argmax(1)


def _imagenet_batches(count: int, seed: int) -> list[Tensor]:
    order = torch.randperm(500, generator=torch.Generator().manual_seed(seed))
    images = lite_input(_imagenet()[0::2][order])
    return [x.contiguous(memory_format=torch.channels_last) for x in images.split(25)][:count]


def _imagenet_test(model: nn.Module) -> Correct:
    """Agreement with the dense network's first choice on the other half."""
    return _answers(_fast(model), _imagenet()[1::2], _choices(), lite_input)


# -- sentences -----------------------------------------------------------------------------------------------------


@cache
def _minilm() -> tuple[nn.Module, Any]:
    from transformers import AutoModel, AutoTokenizer

    from prunella.app.demo.minilm import archive, unpack

    with tempfile.TemporaryDirectory() as folder:
        unpack(archive(), Path(folder))
        return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def embed(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Sentence embeddings: the mean over tokens that are not padding, of length 1."""
    hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1).float()
    return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


@cache
def _pairs(part: str) -> list[tuple[float, str, str]]:
    lines = (data_folder() / "text" / f"stsb_{part}.tsv").read_text(encoding="utf-8").splitlines()[1:]
    rows = [line.split("\t") for line in lines]
    return [(float(row[0]), row[1], row[2]) for row in rows]


def _encoded(texts: Sequence[str]) -> dict[str, Tensor]:
    return dict(_minilm()[1](list(texts), padding=True, truncation=True, max_length=96, return_tensors="pt"))


def _sentence_batches(count: int, seed: int) -> list[dict[str, Tensor]]:
    """Sentences of the training pairs, 32 at a time, of like length."""
    texts = sorted({text for _, *pair in _pairs("train") for text in pair})
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))[: 32 * count]
    chosen = sorted((texts[i] for i in order.tolist()), key=len)
    mixed = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return [_encoded(chosen[32 * k : 32 * (k + 1)]) for k in mixed]


def _sentence_test(model: nn.Module) -> dict[str, float]:
    """Spearman correlation with the gold scores, in percent."""
    return {part: _correlation(model, _pairs(part)) for part in ("dev", "test")}


def _correlation(model: nn.Module, pairs: Sequence[tuple[float, str, str]]) -> float:
    texts = sorted({text for _, *pair in pairs for text in pair}, key=len)
    with torch.inference_mode():
        parts = [embed(model, _encoded(texts[k : k + 64])) for k in range(0, len(texts), 64)]
    place, rows = {text: k for k, text in enumerate(texts)}, torch.cat(parts)
    found = [float(rows[place[a]] @ rows[place[b]]) for _, a, b in pairs]
    first, second = (_ranks(np.array(values)) for values in (found, [score for score, _, _ in pairs]))
    return 100 * float(np.corrcoef(first, second)[0, 1])


def _ranks(values: Any) -> Any:
    """Ranks; ties have their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]


def subjects(folder: Path) -> dict[str, Subject]:
    """All of them by name. folder: of weights that are trained here."""
    gray = torch.zeros(1, 1, 28, 28)
    wide = torch.zeros(1, 3, 224, 224)
    return {
        "resnet20": _resnet(20, (0.5, 0.35, 0.65), 60),
        "resnet56": _resnet(56, (0.5, 0.65, 0.35), 30),
        "vgg": Subject(
            "VGG on Fashion-MNIST", partial(dense_vgg, folder), gray, _fashion_batches, _fashion_test,
            (0.5,), 80, 60, last=str(len(Vgg()) - 1),
        ),
        "lite0": Subject(
            "EfficientNet-Lite0", lambda: _fast(dense_lite0()), wide, _imagenet_batches, _imagenet_test,
            (0.8, 0.65), 20, measure="agreement with the dense network, %",
        ),
        "minilm": Subject(
            "all-MiniLM-L6-v2", lambda: _minilm()[0], None, _sentence_batches, _sentence_test,
            (0.5,), 24, loss=embed, measure="STS-B dev / test, Spearman, %",
        ),
    }  # fmt: skip
