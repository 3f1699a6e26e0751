"""Small networks with the unusual habits of real code: sharing, tying, gates, parametrizations, buffers, detaching."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations


class SharedTwice(nn.Module):
    """One layer used twice, so that its inputs and its outputs are the same units."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        return self.last(F.relu(self.shared(F.relu(self.shared(x)))))


class TiedAutoencoder(nn.Module):
    """The decoder is the transposed encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.middle = nn.Linear(10, 16), nn.Linear(16, 16)
        self.bias = nn.Parameter(torch.zeros(10))

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.encoder(x))
        return F.linear(F.relu(self.middle(h)), self.encoder.weight.t(), self.bias)


class TiedLanguageModel(nn.Module):
    """Embedding and output head are one parameter with two names; a hidden layer between them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(20, 12), nn.Linear(12, 24), nn.Linear(24, 12)
        self.head = nn.Linear(12, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.head(x + self.down(F.gelu(self.up(x))))


class Unused(nn.Module):
    """A layer and a parameter that forward never touches."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.never, self.last = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 4)
        self.spare = nn.Parameter(torch.randn(12))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.first(x)))


class WeightNorm(nn.Module):
    """Weight norm by parametrization: the norm of a row is over its inputs, those that are left."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 12)
        self.normed = parametrizations.weight_norm(nn.Linear(12, 10))
        self.last = nn.Linear(10, 4)
        self.wide, self.narrow = nn.Linear(6, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.normed(F.relu(self.first(x))))) + self.narrow(F.relu(self.wide(x)))


class Largest(nn.Module):
    """Divide a weight by its largest entry."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight / weight.abs().amax()


class Normalized(nn.Module):
    """As in spectral norm, one number of the whole weight scales it: no unit may go without changing the others."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.normed, self.last = nn.Linear(6, 12), nn.Linear(12, 10), nn.Linear(10, 4)
        nn.utils.parametrize.register_parametrization(self.normed, "weight", Largest())
        self.wide, self.narrow = nn.Linear(6, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.normed(F.relu(self.first(x))))) + self.narrow(F.relu(self.wide(x)))


class GatedChunk(nn.Module):
    """GLU: one layer makes values and gates, chunk or `F.glu` parts them; unit i is row i and row i + half."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down = nn.Linear(6, 24), nn.Linear(12, 8)
        self.second, self.last = nn.Linear(8, 20), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.first(x).chunk(2, dim=-1)
        x = self.down(value * F.silu(gate))
        return self.last(F.glu(self.second(x), dim=-1))


class NormedBlocks(nn.Module):
    """Residual stream under layer norm, which reduces over it: the stream stays, hidden neurons go."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.norm1, self.up1, self.down1 = nn.LayerNorm(8), nn.Linear(8, 20), nn.Linear(20, 8)
        self.norm2, self.up2, self.down2 = nn.RMSNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.down1(F.gelu(self.up1(self.norm1(x))))
        x = x + self.down2(F.gelu(self.up2(self.norm2(x))))
        return self.head(x)


class Detached(nn.Module):
    """Channels travel through `.detach()`, `.data` and `no_grad` as well."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 12), nn.Linear(12, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        with torch.no_grad():
            target = self.second(x.detach())
        return self.last(x.data * 0.5 + target.detach())


class ChannelBuffers(nn.Module):
    """Buffers with one number per channel: a mean taken off in forward, a constant mask, one that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 10, 3), nn.Conv2d(10, 4, 1)
        self.register_buffer("mean", torch.randn(10, 1, 1))
        self.register_buffer("mask", torch.rand(1, 10, 1, 1))
        self.register_buffer("scale", torch.rand(10) + 0.5, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = (self.first(x) - self.mean) * self.mask
        return self.last(x / self.scale.view(1, -1, 1, 1))


class Attention(nn.Module):
    """Self-attention that keeps its own sizes; `kv_heads` below `heads` is GQA; scores by hand or by the fused call."""

    def __init__(self, width: int, heads: int, kv_heads: int, fused: bool = True) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.fused = heads, kv_heads, width // heads, fused
        self.repeats = heads // kv_heads
        self.query, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.key, self.value = (nn.Linear(width, kv_heads * self.head_dim) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        batch, time, _ = x.shape
        q = self.query(x).view(batch, time, self.heads, self.head_dim).transpose(1, 2)
        k = self.key(x).view(batch, time, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.value(x).view(batch, time, self.kv_heads, self.head_dim).transpose(1, 2)
        if self.repeats > 1:
            k, v = k.repeat_interleave(self.repeats, 1), v.repeat_interleave(self.repeats, 1)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = torch.softmax(q @ k.transpose(-1, -2) * self.head_dim**-0.5, -1) @ v
        return self.out(y.transpose(1, 2).reshape(batch, time, self.heads * self.head_dim))


class AttentionBlock(nn.Module):
    """Pre-norm transformer block with a head of its own."""

    def __init__(self, heads: int = 4, kv_heads: int = 4, fused: bool = True) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(16), Attention(16, heads, kv_heads, fused)
        self.norm2, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 24), nn.Linear(24, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return self.head(x + self.down(F.gelu(self.up(self.norm2(x)))))


class PackedAttention(nn.Module):
    """ViT as in timm: one `qkv` layer, `reshape(b, t, 3, heads, -1)`, `unbind`."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 4, 4
        self.norm, self.qkv, self.proj = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, _ = x.shape
        qkv = self.qkv(self.norm(x)).reshape(batch, time, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.proj(y)
