"""Random networks with torch's attention modules: what feeds them, what they are given, what reads them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

FEATURES, TIME, BATCH = 6, 5, 3
MASKS = ("none", "bool", "float", "padding", "padding and bool")
READS = ("output", "weights of heads", "unused weights", "no weights")
USES = ("self", "cross", "keys alone")
BACKS = ("linear", "product", "norm by batch", "recurrent", "hand-written heads")


@dataclass(frozen=True)
class Spec:
    """What a network is made of."""

    heads: int = 4
    size: int = 3
    use: str = "self"
    other_widths: bool = False
    bias: bool = True
    bias_of_keys: bool = False
    zero: bool = False
    batch_first: bool = True
    mask: str = "none"
    reads: str = "unused weights"
    back: str = "linear"
    layers: int = 1
    batched: bool = True


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    """Any of them that fit together."""
    use = draw(st.sampled_from(USES))
    return Spec(
        draw(st.sampled_from([2, 3, 4, 6])),
        draw(st.integers(2, 4)),
        use,
        use != "self" and draw(st.booleans()),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.sampled_from(MASKS)),
        draw(st.sampled_from(READS)),
        draw(st.sampled_from(BACKS)),
        draw(st.integers(1, 2)),
        draw(st.sampled_from([True, True, False])),
    )


class HandWritten(nn.Module):
    """Attention whose head size is the width of the stream divided by the number of heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        mixed: Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, c))
        return mixed


class Attending(nn.Module):
    """A linear layer, attention modules in a residual stream, and something that reads it."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec, width = spec, spec.heads * spec.size
        self.enter = nn.Linear(FEATURES, width)
        self.keys = nn.Linear(FEATURES, 7 if spec.other_widths else width)
        self.values = nn.Linear(FEATURES, 9 if spec.other_widths else width)
        options: dict[str, Any] = {"kdim": 7, "vdim": 9} if spec.other_widths else {}
        self.attention = nn.ModuleList(
            nn.MultiheadAttention(
                width,
                spec.heads,
                bias=spec.bias,
                add_bias_kv=spec.bias_of_keys,
                add_zero_attn=spec.zero,
                batch_first=spec.batch_first,
                **options,
            )
            for _ in range(spec.layers)
        )
        self.back = self._back(width)
        self.out = nn.Linear(width, 3)

    def _back(self, width: int) -> nn.Module:
        made: dict[str, Callable[[], nn.Module]] = {
            "norm by batch": lambda: nn.BatchNorm1d(width),
            "recurrent": lambda: nn.GRU(width, 5, batch_first=True),
            "hand-written heads": lambda: HandWritten(width, self.spec.heads),
        }
        return made.get(self.spec.back, nn.Identity)()

    def forward(self, x: Tensor) -> Tensor:
        if not self.spec.batched:
            x = x[0]
        turned = self.spec.batched and not self.spec.batch_first
        x = x.transpose(0, 1) if turned else x
        h = torch.tanh(self.enter(x))
        for attention in self.attention:
            h = h + self._attend(attention, h, x)
        h = h.transpose(0, 1) if turned else h
        return self._read(h if self.spec.batched else h[None])

    def _attend(self, attention: nn.Module, h: Tensor, x: Tensor) -> Tensor:
        keys, values = h, h
        if self.spec.use != "self":
            keys = self.keys(x)
            values = self.values(x) if self.spec.other_widths or self.spec.use == "keys alone" else keys
        mask, padding = self._masks(x)
        reads = self.spec.reads
        found, weights = attention(
            h,
            keys,
            values,
            key_padding_mask=padding,
            attn_mask=mask,
            need_weights=reads != "no weights",
            average_attn_weights=reads != "weights of heads",
        )
        total: Tensor = found * (1 + weights.amax()) if reads == "output" else found
        return total

    def _masks(self, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        kind, padding = self.spec.mask, None
        upper = torch.ones(TIME, TIME, dtype=torch.bool).triu(1)
        mask = upper if "bool" in kind else (upper * -3.0).to(x.dtype) if kind == "float" else None
        if "padding" in kind:
            padding = torch.zeros(TIME, dtype=torch.bool)
            padding[-1] = True
            padding = padding.expand(BATCH, TIME) if self.spec.batched else padding
        return mask, padding

    def _read(self, h: Tensor) -> Tensor:
        back = self.spec.back
        if back == "norm by batch":
            h = self.back(h.transpose(1, 2)).transpose(1, 2)
        elif back == "recurrent":
            h = self.out(h) + self.back(h)[0].sum(-1, keepdim=True)
            return h
        elif back == "hand-written heads":
            h = h + self.back(h)
        elif back == "product":
            h = h * torch.sigmoid(h)
        out: Tensor = self.out(h)
        return out
