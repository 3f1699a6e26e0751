"""Operations to put between two layers, with what the engine must make of each. See test_every_operation.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tests.graph.traps.nets import Between
from torch import nn

# Operation -> units that must be found behind `first`; 0: the axis must stay; None: either, but exact.
FLAT: dict[str, tuple[Between, int | None]] = {
    "nothing": (lambda m, x: x, 12),
    "pointwise": (lambda m, x: F.gelu(x * 2 + 1).clamp(-3, 3).abs().sqrt(), 12),
    "where": (lambda m, x: torch.where(x > 0.5, x, -x), 12),
    "masked fill": (lambda m, x: x.masked_fill(x > 0.5, 0.25), 12),
    "parameter per channel": (lambda m, x: x * m.table + m.constant, 12),
    "parameter as data": (lambda m, x: x * m.table.data, 12),
    "weight without module": (lambda m, x: F.relu(x @ m.square), 12),
    "weight without module, other side": (lambda m, x: (m.square @ x.t()).t(), 12),
    "einsum": (lambda m, x: torch.einsum("bi,ij->bj", x, m.square), 12),
    "chunk and add": (lambda m, x: sum(x.chunk(3, dim=1)), 4),
    "chunk and cat": (lambda m, x: torch.cat(x.chunk(2, 1)[::-1], 1), 6),
    "split by attribute": (lambda m, x: torch.cat(x.split(m.third, 1)[::-1], 1), 4),
    "split by attributes": (lambda m, x: torch.cat(x.split([m.third, m.width - m.third], 1)[::-1], 1), None),
    "split by shape": (lambda m, x: torch.mul(*x.split(x.shape[1] // 2, dim=1)), 6),
    "split by size()": (lambda m, x: torch.mul(*x.split(x.size(1) // 2, dim=-1)), 6),
    "split by literal": (lambda m, x: torch.mul(*x.split(6, dim=1)), 0),
    "tensor_split": (lambda m, x: torch.mul(*x.tensor_split(2, 1)), None),
    "hsplit": (lambda m, x: torch.mul(*x.hsplit(2)), None),
    "slices by attribute": (lambda m, x: x[:, : m.half] * x[:, m.half :], None),
    "slices by shape": (lambda m, x: x[:, : x.shape[1] // 2] * x[:, x.shape[1] // 2 :], None),
    "slice by literal": (lambda m, x: x[:, :5], None),
    "slice from the end": (lambda m, x: x[:, -4:], None),
    "slice up to the end": (lambda m, x: x[:, :-4], None),
    "slice in the middle": (lambda m, x: x[:, 3:-3], None),
    "slice by negative attribute": (lambda m, x: x[:, -m.half :], None),
    "every second": (lambda m, x: x[:, ::2], None),
    "ellipsis": (lambda m, x: x[..., :], 12),
    "narrow": (lambda m, x: x.narrow(1, 2, 5), None),
    "narrow from the end": (lambda m, x: x.narrow(1, -5, 5), None),
    "bound equal to the axis": (lambda m, x: x[:, None].narrow(m.two, 0, m.pair)[:, 0], None),
    "start equal to the length": (lambda m, x: x.narrow(1, m.half, m.half), None),
    "third of thirds": (lambda m, x: x[:, m.third : m.third + m.third], None),
    "attribute equal to the batch": (lambda m, x: x.view(m.three, m.four, m.three).flatten(1), None),
    "attribute for two axes": (lambda m, x: (F.relu(x.view(3, m.width)) @ m.square).view(3, m.width), None),
    "attribute for an axis and its half": (lambda m, x: sum(x.view(3, m.width).split(m.half, 1)), None),
    "attribute times attribute": (lambda m, x: x.view(3, m.three * m.four), None),
    "select": (lambda m, x: x[:, 3:4] * x, None),
    "last position": (lambda m, x: x[:, -1:] + x, None),
    "index by list": (lambda m, x: x[:, [0, 2, 4]], None),
    "index by mask": (lambda m, x: x[:, m.constant > 0], None),
    "index_select": (lambda m, x: x.index_select(1, torch.tensor([3, 1, 2])), None),
    "gather": (lambda m, x: x.gather(1, torch.zeros(3, 5, dtype=torch.int64)), None),
    "take": (lambda m, x: x.take(torch.tensor([[0, 5], [14, 20], [3, 3]])), None),
    "topk": (lambda m, x: x.topk(4, 1).values, 0),
    "sort": (lambda m, x: x.sort(1).values, 0),
    "argmax": (lambda m, x: x + x.argmax(1, keepdim=True), 0),
    "cumsum": (lambda m, x: x.cumsum(1), None),
    "cumprod": (lambda m, x: (x + 1).cumprod(1), None),
    "cummax": (lambda m, x: x.cummax(1).values, None),
    "diff": (lambda m, x: x.diff(dim=1), None),
    "softmax": (lambda m, x: x.softmax(1), 0),
    "log_softmax": (lambda m, x: x.log_softmax(-1), 0),
    "mean": (lambda m, x: x - x.mean(1, keepdim=True), 0),
    "sum": (lambda m, x: x / (1 + x.sum(1, keepdim=True)), None),
    "max": (lambda m, x: x - x.max(1, keepdim=True).values, 0),
    "std": (lambda m, x: x / (1 + x.std(1, keepdim=True)), 0),
    "norm": (lambda m, x: x / (1 + x.norm(dim=1, keepdim=True)), None),
    "normalize": (lambda m, x: F.normalize(x, dim=1), None),
    "mean over all": (lambda m, x: x * x.mean(), 0),
    "amax over all": (lambda m, x: x / (1 + x.abs().amax()), 0),
    "logsumexp": (lambda m, x: x - x.logsumexp(1, keepdim=True), 0),
    "layer norm": (lambda m, x: F.layer_norm(x, x.shape[1:]), 0),
    "group norm": (lambda m, x: F.group_norm(x, 4), None),
    "fft": (lambda m, x: torch.fft.rfft(x, dim=1).real, 0),
    "fft of another axis": (lambda m, x: torch.fft.fft(x, dim=0).real, None),
    "sorted over the batch": (lambda m, x: x.sort(0).values, 12),
    "flip": (lambda m, x: x.flip(1), 12),
    "roll": (lambda m, x: x.roll(3, 1), None),
    "pad": (lambda m, x: F.pad(x, (2, 1)), 12),
    "pad by replication": (lambda m, x: F.pad(x[:, None], (2, 1), mode="replicate")[:, 0], None),
    "crop by pad": (lambda m, x: F.pad(x, (-2, -1)), None),
    "repeat": (lambda m, x: x.repeat(1, 2), 12),
    "tile": (lambda m, x: x.tile((1, 3)), None),
    "repeat_interleave": (lambda m, x: x.repeat_interleave(2, 1), 12),
    "stack": (lambda m, x: torch.stack([x, x * 2], 2).flatten(1), 12),
    "expand": (lambda m, x: x[:, :, None].expand(-1, -1, 3).flatten(1), 12),
    "cat of itself": (lambda m, x: torch.cat([x, x, m.constant.expand(3, -1)], 1), None),
    "cat with the input's size": (lambda m, x: torch.cat([x, torch.ones(x.shape[0], 2, dtype=x.dtype)], 1), 12),
    "fold rows": (lambda m, x: x.view(3, 4, 3).transpose(1, 2).reshape(3, 12), None),
    "fold by shape": (lambda m, x: x.view(x.shape[0], 4, x.shape[1] // 4).transpose(1, 2).reshape(*x.shape), 3),
    "fold by -1": (lambda m, x: x.view(-1, m.third, 3).amax(2), None),
    "unflatten": (lambda m, x: x.unflatten(1, (3, -1)).sum(1), None),
    "view to one": (lambda m, x: x.view(-1).view(3, -1), None),
    "batch into channels": (lambda m, x: x.reshape(1, -1).expand(3, -1), None),
    "squeeze": (lambda m, x: x.unsqueeze(1).squeeze(1), 12),
    "transpose back": (lambda m, x: x.t().contiguous().t(), 12),
    "as_strided": (lambda m, x: x.as_strided((3, 6), (12, 2)), None),
    "unfold": (lambda m, x: x.unfold(1, 3, 3).amax(2), None),
    "diagonal": (lambda m, x: x.diagonal().expand(3, -1), None),
    "outer": (lambda m, x: (x[:, :, None] * x[:, None, :]).flatten(1), None),
    "gram": (lambda m, x: (x.t() @ x)[:3], None),
    "cdist": (lambda m, x: torch.cdist(x, x), 0),
    "bilinear": (lambda m, x: F.bilinear(x, x, m.square[None].repeat(5, 1, 1)), None),
    "cosine": (lambda m, x: x * F.cosine_similarity(x, m.constant[None], 1)[:, None], None),
    "embedding": (lambda m, x: F.embedding((x[:, 0] > 0.5).long(), m.square) + x, None),
    "scatter": (
        lambda m, x: torch.zeros(3, 12, dtype=x.dtype).scatter(1, torch.arange(12).flip(0).expand(3, -1), x),
        None,
    ),
    "setitem": (lambda m, x: set_part(x, 5), None),
    "in place": (lambda m, x: x.clone().mul_(2).add_(m.constant).relu_(), 12),
    "copy_": (lambda m, x: torch.empty_like(x).copy_(x), 12),
    "out buffer": (lambda m, x: torch.zeros(3, x.shape[1], dtype=x.dtype).add_(x), None),
    "detach": (lambda m, x: x.detach() + x.data, 12),
    "numpy": (lambda m, x: torch.from_numpy(np.array(x.detach().numpy()) * 2), 0),
    "tolist": (lambda m, x: torch.tensor(x.tolist(), dtype=x.dtype), 0),
    "item": (lambda m, x: x * x[0, 0].item(), None),
    "double and back": (lambda m, x: x.double().to(x.dtype), 12),
    "size as a factor": (lambda m, x: x / x.shape[1], 0),
    "size() as a factor": (lambda m, x: x / x.size(-1), 0),
    "size under a root": (lambda m, x: x / math.sqrt(x.shape[1]), 0),
    "size to a power": (lambda m, x: x * x.shape[1] ** -0.5, 0),
    "int of a size": (lambda m, x: x / int(x.shape[1]), 0),
    "float of a size": (lambda m, x: x * float(x.shape[1]), 0),
    "size minus one": (lambda m, x: x * (x.shape[1] - 1), 0),
    "negative size": (lambda m, x: x * -x.shape[1], 0),
    "sliced size as a factor": (lambda m, x: x / x.shape[1:][0], 0),
    "numel as a factor": (lambda m, x: x / x.numel(), 0),
    "len as a factor": (lambda m, x: x / len(x[0]), 0),
    "stride as a factor": (lambda m, x: x / x.stride(0), 0),
    "size in a tensor": (lambda m, x: x / torch.tensor(float(x.shape[1])), 0),
    "size as a fill value": (lambda m, x: x / torch.full((1,), x.shape[1]), 0),
    "arange of a size": (lambda m, x: x / (1 + torch.arange(x.shape[1])), 0),
    "largest of arange": (lambda m, x: x / torch.arange(x.shape[1]).max(), 0),
    "linspace": (lambda m, x: x * torch.linspace(0, 1, x.shape[1], dtype=x.dtype), 0),
    "eye": (lambda m, x: x @ torch.eye(x.shape[1], dtype=x.dtype), None),
    "attribute as a factor": (lambda m, x: x.view(3, m.width) / m.width, 0),
    "attribute under a root": (lambda m, x: x.view(3, m.width) * m.width**-0.5, 0),
    "branch on a size": (lambda m, x: x * 2 if x.shape[1] == 12 else x, 0),
    "branch on more than a size": (lambda m, x: x * 2 if x.shape[1] > 8 else x, 0),
    "branch on an even size": (lambda m, x: x * 2 if x.shape[1] % 2 == 0 else x, 0),
    "loop over positions": (lambda m, x: torch.stack([x[:, i] for i in range(x.shape[1])], 1), None),
    "loop over unbind": (lambda m, x: torch.stack([t * 2 for t in x.unbind(1)], 1), None),
    "minimum of sizes": (lambda m, x: x * min(x.shape[1], 100), 0),
    "linear by hand": (lambda m, x: F.linear(x, m.square, m.table), 12),
    "linear by addmm": (lambda m, x: torch.addmm(m.table, x, m.square), 12),
    "baddbmm": (lambda m, x: torch.baddbmm(x[None], x[None], m.square[None])[0], None),
    "matrix of the weight": (lambda m, x: x @ (m.square @ m.square), None),
    "weight plus identity": (lambda m, x: x @ (m.square + torch.eye(12, dtype=x.dtype)), None),
    "softmaxed weight": (lambda m, x: x @ m.square.softmax(0), None),
    "normalized weight rows": (lambda m, x: x @ (m.square / m.square.norm(dim=1, keepdim=True)), None),
    "weight inverse": (lambda m, x: x @ torch.linalg.inv(m.square + 5 * torch.eye(12, dtype=x.dtype)), 0),
    "one column of a weight": (lambda m, x: x * m.square[:, 0], None),
    "convolution over channels": (lambda m, x: F.conv1d(x[:, None], m.table[:3].view(1, 1, 3), padding=1)[:, 0], 0),
    "average pooling over channels": (lambda m, x: F.avg_pool1d(x[:, None], 2)[:, 0], 0),
    "interpolation over channels": (lambda m, x: F.interpolate(x[:, None], scale_factor=2.0)[:, 0], 0),
    "interpolation to a size": (lambda m, x: F.adaptive_avg_pool1d(x[:, None], 4)[:, 0], 0),
    "rotary": (lambda m, x: x * m.constant + torch.cat([-x[:, m.half :], x[:, : m.half]], 1), None),
    "dropout": (lambda m, x: F.dropout(x, 0.5, m.training), 12),
    "one_hot": (lambda m, x: x + F.one_hot(torch.tensor([0, 1, 2]), 12), None),
    "complex": (lambda m, x: torch.view_as_real(torch.complex(x, x * 2)).flatten(1), None),
    "batch norm": (lambda m, x: F.batch_norm(x, m.constant, m.constant.abs() + 1, m.table, m.table), 12),
    "checkpointed": (lambda m, x: checkpoint(lambda y: y * m.table, x), 12),
    "vmap": (lambda m, x: torch.vmap(lambda row: row * m.table)(x), None),
    "scan": (lambda m, x: x.cumsum(0), None),
    "squared error": (lambda m, x: x * (1 + F.mse_loss(x, x.flip(0))), 0),
    "cross entropy": (lambda m, x: x * (1 + F.cross_entropy(x, torch.tensor([0, 1, 2]))), 0),
    "binary cross entropy": (lambda m, x: x * (1 + F.binary_cross_entropy_with_logits(x, (x > 0).to(x.dtype))), 0),
    "divergence": (lambda m, x: x * (1 + F.kl_div(x, x.flip(0).exp(), reduction="batchmean")), None),
    "loss without reduction": (lambda m, x: x + F.smooth_l1_loss(x, x.flip(0), reduction="none"), None),
    "quantile": (lambda m, x: x - x.quantile(0.5, 1, keepdim=True), 0),
    "median": (lambda m, x: x - x.median(1, keepdim=True).values, 0),
    "covariance": (lambda m, x: torch.cov(x.t())[:3], None),
    "bucketize": (lambda m, x: x + torch.bucketize(x, m.constant.sort().values), None),
    "renorm": (lambda m, x: x.renorm(2, 1, 0.5), None),
    "renorm of rows": (lambda m, x: x.renorm(2, 0, 0.5), None),
    "batch norm of rows": (lambda m, x: F.batch_norm(x[None], None, None, training=True)[0], 0),
    "batch norm of rows, transposed": (lambda m, x: F.batch_norm(x.t(), None, None, training=True).t(), 0),
    "group norm, channels last": (lambda m, x: F.group_norm(x[None], 1)[0], 0),
    "instance norm of rows": (lambda m, x: F.instance_norm(x[None])[0], 0),
    "batch norm of a weight": (lambda m, x: x @ F.batch_norm(m.square[None], None, None, training=True)[0], None),
    "batch norm of a weight's columns": (lambda m, x: x @ F.batch_norm(m.square, None, None, training=True), 0),
    "kron": (lambda m, x: torch.kron(x, torch.ones(1, 2, dtype=x.dtype)), None),
    "matrix times vector": (lambda m, x: x * (x @ m.table)[:, None], None),
    "dot": (lambda m, x: x * (x[0] @ m.table), None),
    "power of a weight": (lambda m, x: x @ torch.linalg.matrix_power(m.square, 2), None),
    "singular values": (lambda m, x: x * torch.linalg.svdvals(m.square)[0], 12),
    "attention over rows": (lambda m, x: F.scaled_dot_product_attention(x[None], x[None], x[None])[0], 0),
    "attention with a scale": (
        lambda m, x: F.scaled_dot_product_attention(x[None], x[None], x[None], scale=1.0)[0],
        None,
    ),
    "rows meet rows": (lambda m, x: x @ x.t() @ x, None),
    "index_put": (lambda m, x: x.index_put((torch.tensor([0, 1]), torch.tensor([3, 4])), x[0, :2]), None),
    "index_add": (lambda m, x: x.index_add(1, torch.tensor([2, 5]), x[:, :2]), None),
    "scatter_add": (lambda m, x: x.scatter_add(1, torch.zeros(3, 12, dtype=torch.int64), x), None),
    "masked_select": (lambda m, x: x.masked_select(x > -1).view(3, -1), None),
    "movedim": (lambda m, x: x[None].movedim(2, 0).swapaxes(0, 2)[0], None),
    "rot90": (lambda m, x: x.rot90(2, (0, 1)), None),
    "tril": (lambda m, x: x.tril(), None),
    "mask by position": (lambda m, x: torch.where(torch.arange(x.shape[1]) < 4, x, -x), 0),
    "table by position": (lambda m, x: x @ m.square[torch.arange(x.shape[1])], None),
    "slice of a table": (lambda m, x: x * m.table[: x.shape[1]], None),
    "slice of a longer table": (lambda m, x: x * m.long[: x.shape[1]], None),
    "end of a longer table": (lambda m, x: x * m.long[-x.shape[1] :], None),
    "slice of a longer table by literal": (lambda m, x: x * m.long[:12], None),
    "middle of a longer table": (lambda m, x: x * m.long[4 : 4 + x.shape[1]], None),
    "expand by literal": (lambda m, x: x * m.table.expand(3, 12), None),
    "zeros by literal": (lambda m, x: x + torch.zeros(3, 12, dtype=x.dtype), 0),
    "zeros by size": (lambda m, x: x + x.new_zeros(x.shape[1]), None),
    "ones like a table": (lambda m, x: x + torch.ones_like(m.table), 12),
    "custom function": (lambda m, x: Double.apply(x), None),
    "sparse": (lambda m, x: torch.sparse.mm(x.t().to_sparse(), torch.eye(3, dtype=x.dtype)).t(), None),
    "fake quantization": (
        lambda m, x: torch.fake_quantize_per_tensor_affine(x.float(), 0.1, 0, -128, 127).to(x.dtype),
        None,
    ),
    "branch on a value": (lambda m, x: x * 2 if bool((x > 0.5).any()) else x, 0),
    "branch on one value": (lambda m, x: x * 2 if x[0, 0] > 0.1 else x, None),
    "loop until small": (lambda m, x: until_small(x), None),
    "map of a dictionary": (lambda m, x: {"a": x, "b": x * 2}["b"], 12),
}
# Sizes that no tracked integer can follow: `float.__mul__` and C code take its bare value without a call.
BEYOND: dict[str, Between] = {
    "one over a size": lambda m, x: x * (1.0 / x.shape[1]),
    "part of a size": lambda m, x: x * (0.5 * x.shape[1]),
    "size as an exponent": lambda m, x: x * 1.01 ** x.shape[1],
    "shape.numel": lambda m, x: x / x.shape.numel(),
    "numpy prod of sizes": lambda m, x: x / float(np.prod(x.shape)),
    "loop over a size": lambda m, x: x + sum(0.1 for _ in range(x.shape[1])),
    "string of a size": lambda m, x: x * int(str(x.shape[1])),
    "square root by numpy": lambda m, x: x / np.sqrt(x.shape[1]),
    "attribute in a loop": lambda m, x: x.view(3, m.width) + sum(0.1 for _ in range(m.width)),
}
IMAGE: dict[str, tuple[Between, int | None]] = {
    "pooling": (lambda m, x: F.avg_pool2d(F.max_pool2d(x, 3, 1, 1), 2), 12),
    "pooling over channels": (lambda m, x: F.max_pool3d(x[:, None], (2, 1, 1))[:, 0], 0),
    "local response norm": (lambda m, x: F.local_response_norm(x, 3), 0),
    "instance norm": (lambda m, x: F.instance_norm(x), 12),
    "channel mean": (lambda m, x: torch.cat([x, x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1), 0),
    "channels last": (lambda m, x: x.to(memory_format=torch.channels_last) * 2, 12),
    "layer norm by permutation": (lambda m, x: F.layer_norm(x.permute(0, 2, 3, 1), (12,)).permute(0, 3, 1, 2), 0),
    "pixel shuffle": (lambda m, x: F.pixel_shuffle(x, 2), 3),
    "pixel unshuffle": (lambda m, x: F.pixel_unshuffle(x, 2), 12),
    "channel shuffle": (lambda m, x: F.channel_shuffle(x, 3), 4),
    "native shuffle": (lambda m, x: torch.native_channel_shuffle(x, 3), None),
    "shuffle by view": (
        lambda m, x: x.view(2, 3, x.shape[1] // 3, 4, 4).transpose(1, 2).reshape(2, x.shape[1], 4, 4),
        4,
    ),
    "space to depth": (
        lambda m, x: x.view(2, x.shape[1], 2, 2, 2, 2).permute(0, 3, 5, 1, 2, 4).reshape(2, 4 * x.shape[1], 2, 2),
        12,
    ),
    "patches": (lambda m, x: F.unfold(x, 2, stride=2).view(2, -1, 2, 2), None),
    "patches back": (lambda m, x: F.fold(F.unfold(x, 2, stride=2), (4, 4), 2, stride=2), None),
    "temporal shift": (lambda m, x: shift(x), None),
    "ghost": (lambda m, x: torch.cat([x, x.flip(3)], 1)[:, : m.width], None),
    "mean of halves": (lambda m, x: x.view(2, 2, -1, 4, 4).mean(1), None),
    "attention over channels": (lambda m, x: (x.flatten(2) @ x.flatten(2).transpose(1, 2)).softmax(-1)[..., None], 0),
    "attention over pixels": (
        lambda m, x: F.scaled_dot_product_attention(*[x.flatten(2).transpose(1, 2)] * 3).transpose(1, 2).view(*x.shape),
        0,
    ),
    "pooled part": (lambda m, x: torch.cat([x, F.max_pool2d(x[:, : m.half], 3, 1, 1)], 1), None),
    "grid sample": (lambda m, x: F.grid_sample(x, torch.zeros(2, 4, 4, 2, dtype=x.dtype), align_corners=False), None),
    "dropout2d": (lambda m, x: F.dropout2d(x, 0.5, m.training), 12),
    "squeeze a spatial one": (lambda m, x: x.mean((2, 3), keepdim=True).squeeze().view(2, -1, 1, 1), None),
}


MODULES: dict[str, tuple[Callable[[], nn.Module], int | None]] = {
    "prelu": (lambda: nn.PReLU(12), 12),
    "batch norm": (lambda: nn.BatchNorm1d(12), 12),
    "batch norm without scale": (lambda: nn.BatchNorm1d(12, affine=False), 12),
    "batch norm without statistics": (lambda: nn.BatchNorm1d(12, track_running_stats=False), 12),
    "bilinear": (lambda: Twice(nn.Bilinear(12, 12, 5)), None),
    "lstm": (lambda: First(nn.LSTM(12, 8)), None),
    "gru": (lambda: First(nn.GRU(12, 8, num_layers=2, bidirectional=True)), None),
    "rnn cell": (lambda: nn.RNNCell(12, 8), None),
    "multihead attention": (lambda: Attend(nn.MultiheadAttention(12, 3)), None),
    "encoder layer": (lambda: nn.TransformerEncoderLayer(12, 3, 20), 0),
    "softmax": (lambda: nn.Softmax(1), 0),
    "linear without bias": (lambda: nn.Linear(12, 7, bias=False), 12),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(12, 7)), None),
    "weight norm by columns": (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(12, 7), dim=1), None),
    "spectral norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(12, 7)), None),
    "orthogonal": (lambda: nn.utils.parametrizations.orthogonal(nn.Linear(12, 12)), None),
    "unflatten and flatten": (lambda: nn.Sequential(nn.Unflatten(1, (3, 4)), nn.Flatten()), None),
    "list of branches": (lambda: Branches(), 12),
}


class First(nn.Module):
    """The first of a module's outputs."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> Any:
        return self.inner(x)[0]


class Twice(First):
    """The same input on both sides."""

    def forward(self, x: torch.Tensor) -> Any:
        return self.inner(x, x)


class Attend(First):
    """Self-attention of torch's own module."""

    def forward(self, x: torch.Tensor) -> Any:
        return self.inner(x[None], x[None], x[None], need_weights=False)[0][0]


class Branches(nn.Module):
    """A `ModuleDict` and a `ParameterList`, as configurable code uses them."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"a": nn.Linear(12, 5), "b": nn.Linear(12, 5)})
        self.scales = nn.ParameterList([torch.rand(12), torch.rand(5)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(part(x * self.scales[0]) for part in self.parts.values()) * self.scales[1]


class Double(torch.autograd.Function):
    """An operation with a gradient of its own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * 2


def until_small(x: torch.Tensor) -> torch.Tensor:
    """Halve while the norm is large: the number of rounds depends on all values."""
    while float(x.norm()) > 1.0:
        x = x / 2
    return x


def set_part(x: torch.Tensor, count: int) -> torch.Tensor:
    """Write zeros into the first columns."""
    y = x.clone()
    y[:, :count] = 0
    return y


def shift(x: torch.Tensor) -> torch.Tensor:
    """Move a quarter of the channels by one pixel, as temporal shift modules do."""
    y, quarter = torch.zeros_like(x), x.shape[1] // 4
    y[:, :quarter, 1:] = x[:, :quarter, :-1]
    y[:, quarter:] = x[:, quarter:]
    return y


def checkpoint(function: Any, x: torch.Tensor) -> torch.Tensor:
    """Gradient checkpointing, as training code leaves it in forward."""
    from torch.utils.checkpoint import checkpoint as run

    result: torch.Tensor = run(function, x, use_reentrant=False)
    return result
