"""The models of `digests.py`: small, with random weights, one for each kind of coupling."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import timm
import torch
import torchvision
import transformers
from torch import Tensor, nn
from torch.nn import functional

import prunella as pr
import vision  # noqa: F401 (before torchvision)

LANGUAGE = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
LANGUAGE |= {"max_position_embeddings": 64, "initializer_range": 0.3}
DECODER = {**LANGUAGE, "num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": False}
ENDLESS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
GPT2 = {"vocab_size": 61, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "initializer_range": 0.3}
VIT = {"img_size": 32, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 5}


@dataclass(frozen=True)
class Net:
    """A model with what it is fed. units: kinds of units that it has. trainable: whether a loss can train it.

    every: only each n-th method is applied, for a model that takes long.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], Any]
    units: tuple[str, ...] = ("channel",)
    trainable: bool = True
    every: int = 1

    def model(self) -> nn.Module:
        """A copy of its own in eval mode, the same each time."""
        return copy.deepcopy(_built(self))

    def batches(self, count: int = 2) -> list[Any]:
        """Random inputs, the same each time."""
        return [self.batch(torch.Generator().manual_seed(seed)) for seed in range(count)]


@cache
def _built(net: Net) -> nn.Module:
    torch.manual_seed(0)
    model = net.build().eval()
    rng = torch.Generator().manual_seed(1)
    vectors = [*model.named_parameters(), *model.named_buffers()]
    with torch.no_grad():
        for name, vector in vectors:
            if vector.dim() == 1 and vector.is_floating_point() and not name.endswith("inv_freq"):
                vector.copy_(0.5 + torch.rand(vector.shape, generator=rng))
    return model


def call(model: nn.Module, batch: Any) -> Any:
    """The model on a batch: keywords, several arguments or one."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def tensors(output: Any) -> list[Tensor]:
    """All tensors of an output in order."""
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else ()
    return [tensor for part in parts for tensor in tensors(part)]


@torch.no_grad()
def outputs(model: nn.Module, batch: Any) -> list[Tensor]:
    """What the model computes in eval mode."""
    return tensors(call(model.eval(), batch))


def loss(model: nn.Module, batch: Any) -> Tensor:
    """A loss whose gradient no unit escapes."""
    found = [tensor for tensor in tensors(call(model, batch)) if tensor.is_floating_point()]
    return torch.stack([(tensor - 1).square().mean() for tensor in found]).sum()


# -- networks of our own -----------------------------------------------------------------------------------------


def plain() -> nn.Sequential:
    """Two convolutions with batch norms, a flattened map and two linear layers."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3, stride=2, padding=1),
        nn.BatchNorm2d(24), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(96, 20), nn.ReLU(),
        nn.Linear(20, 4),
    )  # fmt: skip


def conv(inputs: int, wide: int) -> nn.Sequential:
    """Convolution, batch norm, ReLU."""
    return nn.Sequential(nn.Conv2d(inputs, wide, 3, padding=1, bias=False), nn.BatchNorm2d(wide), nn.ReLU())


class UNet(nn.Module):
    """Down, up by a transposed convolution and by interpolation, with skips that are concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.down3 = conv(3, 8), conv(8, 12), conv(12, 16)
        self.up2, self.mix2, self.mix1 = nn.ConvTranspose2d(16, 12, 2, 2), conv(24, 12), conv(20, 8)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        one = self.down1(x)
        two = self.down2(functional.max_pool2d(one, 2))
        three = self.down3(functional.max_pool2d(two, 2))
        two = self.mix2(torch.cat([self.up2(three), two], 1))
        up = functional.interpolate(two, scale_factor=2, mode="bilinear", align_corners=False)
        out: Tensor = self.out(self.mix1(torch.cat([up, one], 1)))
        return out


class Dense(nn.Module):
    """Each layer reads all before it; the norm comes before the convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, widths = nn.Conv2d(3, 8, 3, padding=1), (8, 14, 20)
        self.norms = nn.ModuleList(nn.BatchNorm2d(wide) for wide in widths)
        self.convs = nn.ModuleList(nn.Conv2d(wide, 6, 3, padding=1, bias=False) for wide in widths)
        self.head = nn.Linear(26, 5)

    def forward(self, x: Tensor) -> Tensor:
        seen = [self.stem(x)]
        for norm, layer in zip(self.norms, self.convs, strict=True):
            seen.append(layer(torch.relu(norm(torch.cat(seen, 1)))))
        out: Tensor = self.head(torch.cat(seen, 1).relu().mean((2, 3)))
        return out


class Normed(nn.Module):
    """Group norm, instance norm, a transposed convolution in groups, pixel shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 12, 3, padding=1), nn.GroupNorm(4, 12)
        self.conv2, self.norm2 = nn.Conv2d(12, 16, 3, padding=1), nn.InstanceNorm2d(16, affine=True)
        self.up, self.wide = nn.ConvTranspose2d(16, 16, 2, 2, groups=16), nn.Conv2d(16, 32, 1)
        self.out = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.conv1(x)))
        x = self.up(torch.relu(self.norm2(self.conv2(x))))
        out: Tensor = self.out(functional.pixel_shuffle(self.wide(x), 2))
        return out


class Typed(nn.Module):
    """Sizes that are written into the source, so that only its program can be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 24), nn.Linear(8, 12)
        self.q, self.k, self.v, self.out = (nn.Linear(12, 12) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = torch.split(self.first(x), 8, dim=-1)
        x = self.last(a * torch.sigmoid(b) + c)
        q, k, v = (part(x).view(x.shape[0], x.shape[1], 4, 3).transpose(1, 2) for part in (self.q, self.k, self.v))
        y = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        out: Tensor = self.out(y.reshape(x.shape[0], x.shape[1], 12))
        return out


def program() -> nn.Module:
    """`Typed` as an exported program."""
    return pr.as_program(Typed().eval(), torch.randn(2, 5, 8))


class Mixture(nn.Module):
    """A router over stacked experts."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(6, 4)
        self.up, self.down = nn.Parameter(torch.randn(4, 5, 6)), nn.Parameter(torch.randn(4, 6, 5))

    def forward(self, x: Tensor) -> Tensor:
        weights, index = self.router(x).topk(2, -1)
        inner = torch.relu(torch.einsum("tkoi,ti->tko", self.up[index], x))
        return torch.einsum("tkio,tko,tk->ti", self.down[index], inner, weights.softmax(-1))


# -- networks of others ------------------------------------------------------------------------------------------


def language(kind: str, config: str, **sizes: Any) -> nn.Module:
    """A small model of transformers."""
    made: nn.Module = getattr(transformers, kind)(getattr(transformers, config)(**sizes))
    return made


def detector() -> nn.Module:
    """SSDlite, which keeps every box, since random weights are sure of none."""
    found: nn.Module = torchvision.models.get_model(
        "ssdlite320_mobilenet_v3_large", weights=None, weights_backbone=None, score_thresh=0.0, num_classes=3,
        topk_candidates=20, detections_per_img=20,
    )  # fmt: skip
    return found


def image(*shape: int) -> Callable[[torch.Generator], Tensor]:
    """Random numbers of a shape."""
    return lambda rng: torch.randn(shape, generator=rng)


def words(rng: torch.Generator) -> dict[str, Any]:
    """Random tokens for a decoder."""
    return {"input_ids": torch.randint(0, 61, (3, 12), generator=rng), "use_cache": False}


def padded(rng: torch.Generator) -> dict[str, Any]:
    """Random tokens for an encoder, some of them padding."""
    mask = torch.ones(3, 12, dtype=torch.int64)
    mask[1, 8:] = 0
    return {"input_ids": torch.randint(1, 61, (3, 12), generator=rng), "attention_mask": mask}


TRANSFORMER = ("channel", "head", "width", "depth")
NETS = (
    Net("plain", plain, image(4, 3, 12, 12)),
    Net("resnet18", lambda: torchvision.models.resnet18(num_classes=10), image(1, 3, 64, 64), every=2),
    Net("mobilenet", lambda: torchvision.models.mobilenet_v3_small(num_classes=10), image(2, 3, 32, 32)),
    Net("unet", UNet, image(2, 3, 16, 16)),
    Net("densenet", Dense, image(2, 3, 8, 8)),
    Net("normed", Normed, image(2, 3, 8, 8)),
    Net("vit", lambda: timm.create_model("vit_tiny_patch16_224", pretrained=False, **VIT), image(2, 3, 32, 32),
        TRANSFORMER),
    Net("bert", lambda: language("BertForMaskedLM", "BertConfig", **LANGUAGE, num_hidden_layers=2), padded,
        (*TRANSFORMER, "vocabulary")),
    Net("gpt2", lambda: language("GPT2LMHeadModel", "GPT2Config", **GPT2, **ENDLESS), words,
        (*TRANSFORMER, "vocabulary")),
    Net("llama", lambda: language("LlamaForCausalLM", "LlamaConfig", **DECODER, **ENDLESS), words,
        (*TRANSFORMER, "vocabulary")),
    Net("mixtral", lambda: language("MixtralForCausalLM", "MixtralConfig", **DECODER, **ENDLESS,
        num_local_experts=4, num_experts_per_tok=2), words, (*TRANSFORMER, "expert")),
    Net("mixture", lambda: nn.Sequential(Mixture(), nn.Linear(6, 3)), image(32, 6), ("channel", "expert")),
    Net("program", program, image(2, 5, 8), ("channel", "head")),
    Net("detector", detector, lambda rng: ([torch.rand(3, 96, 96, generator=rng)],), trainable=False, every=3),
)  # fmt: skip
