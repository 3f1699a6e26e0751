"""Low-rank adapters on a sparse base: pruned weights stay pruned in training and merging.

An adapter is recognized by its function: a module whose output is the output of one inner layer plus `s B A x`. This
holds for peft's linear layers and for common hand-written ones. The function is measured in float64 on random inputs
before merging.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunella.errors import CheckFailed, NotSupported, RequestError
from prunella.model.copying import copied
from prunella.model.forward import first_tensor
from prunella.model.masks import RECORD, Packed, pack
from prunella.model.state import mode
from prunella.model.unwrap import unwrap
from prunella.registry.method import recovery
from prunella.types import Mask

PROBES = 32
EXACT = 1e-9
MOST = 16
"""A module with more matrices is not an adapter."""
Matrices = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Merged:
    """One adapter that was merged into its base. lost: the fraction of `|B A|` that the mask removed, 0 to 1."""

    name: str
    rank: int
    sparsity: float
    lost: float = 0.0

    def __str__(self) -> str:
        lost = f", {self.lost:.1%} of the adapter lost" if self.lost else ""
        return f"{self.name}: rank {self.rank}, {self.sparsity:.1%} of the base stay zero{lost}"


@dataclass(frozen=True)
class _Adapter:
    """`pairs`: names of (A, B) inside the module. flip: the base stores its weight as (in, out)."""

    path: str
    module: nn.Module
    leaf: str
    base: nn.Module
    pairs: Matrices
    flip: bool

    def deltas(self, module: nn.Module) -> list[Tensor]:
        """`B A` of each pair in the layout of the base weight, from `module` or a copy of it."""
        products = []
        for a, b in self.pairs:
            first, second = module.get_parameter(a).detach(), module.get_parameter(b).detach()
            product = _product(first.double(), second.double(), self.shape)
            products.append(product.T if self.flip else product)
        return products

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the base."""
        rows, columns = self.base.get_parameter("weight").shape
        return (columns, rows) if self.flip else (rows, columns)


class MaskedProduct:
    """Hooks on the two layers of an adapter: together they compute `(m * (B A)) x`, with the mask of the base."""

    def __init__(self, base: nn.Module, first: nn.Module, second: nn.Module, flip: bool) -> None:
        self.base, self.first, self.second, self.flip = base, first, second, flip
        self.zeros = pack(base.get_parameter("weight") != 0)
        self._inputs: Tensor | None = None
        self._mask: tuple[Packed, Mask] | None = None

    def keep_inputs(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        """After the first layer: keep its inputs, with dropout applied."""
        self._inputs = arguments[0]

    def multiply(self, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        """After the second layer: return the masked product instead of its output."""
        assert self._inputs is not None
        inputs, self._inputs = self._inputs, None
        a, b = self.first.get_parameter("weight"), self.second.get_parameter("weight")
        return F.linear(inputs, (b @ a) * self.mask(b.device), self.second._parameters.get("bias"))

    def mask(self, device: torch.device) -> Mask:
        """The mask of the base `(out, in)`: the recorded mask, else the non-zeros of the weight."""
        packed = self.base.__dict__.get(RECORD, {}).get("weight", self.zeros)
        if self._mask is None or self._mask[0] is not packed or self._mask[1].device != device:
            mask = packed.unpack(device)
            self._mask = packed, mask.T if self.flip else mask
        return self._mask[1]


@recovery(source="Hu et al. 2021, arXiv:2106.09685; Lu et al. 2024, arXiv:2405.16057 (products that keep the sparsity)")
def mask_adapters_(model: nn.Module) -> tuple[str, ...]:
    """Make every low-rank adapter in `model` respect the zeros of its base, and return the adapters' names.

    `y = W x + s (m * (B A)) x`, with m the recorded mask of the base, or else the non-zeros of its weight. No module is
    renamed or replaced: hooks on the two layers of each adapter compute the masked product. Dropout before the adapter
    is kept, and the trained function is exactly the function after `merge_adapters_`. The cost is one matrix product of
    the size of the base per step.

    peft's linear layers and hand-written ones with two linear layers are recognized by their function.

    Data: none.
    Errors: NotSupported for an adapter whose factors are not linear layers.

    Use: before training adapters on a pruned model that must remain sparse. Avoid: a dense base: the hooks only cost
    time.
    """
    model = unwrap(model)
    paths = []
    for adapter in _required(model):
        if any(isinstance(_owner(adapter.module, a), MaskedProduct) for a, _ in adapter.pairs):
            continue
        for a, b in adapter.pairs:
            first, second = (adapter.module.get_submodule(name.rpartition(".")[0]) for name in (a, b))
            if first is adapter.module or second is adapter.module or first._parameters.get("bias") is not None:
                raise NotSupported(
                    f"the adapter {adapter.path} cannot be masked",
                    "its two factors must be linear layers, the first without a bias",
                    "write it with nn.Linear for both, or mask the product in its forward",
                )
            product = MaskedProduct(adapter.base, first, second, adapter.flip)
            first.register_forward_hook(product.keep_inputs)
            second.register_forward_hook(product.multiply)
        paths.append(adapter.path)
    return tuple(paths)


@recovery(source="Hu et al. 2021, arXiv:2106.09685 (merging); Lu et al. 2024, arXiv:2405.16057 (with a mask)")
def merge_adapters_(model: nn.Module, *, allow_loss: bool = False) -> tuple[Merged, ...]:
    """Merge every low-rank adapter into its base, in place, under the mask of the base; the layers are then plain.

    `W <- W + m * (s B A)`, with m the recorded mask of the base, or else the non-zeros of its weight: the zeros of the
    base do not change. Each adapter module is replaced by its base, under the name of the adapter. With peft,
    `model.get_base_model()` is the plain model afterwards.

    allow_loss: merge adapters that were trained without the mask, too; the mask removes a part of them.

    `CheckFailed` for such an adapter without allow_loss, with the fraction that would be lost; `NotSupported` for an
    adapter that does not add `s B A x` (DoRA for example). The model then does not change.

    Data: none.

    Use: shipping a sparse model after training adapters with `mask_adapters_`. Avoid: merging before training ends.
    """
    model = unwrap(model)
    jobs = [(adapter, *_change(adapter)) for adapter in _required(model)]
    for adapter, _, lost in jobs:
        if lost and not allow_loss:
            raise CheckFailed(
                f"merging {adapter.path} would lose {lost:.1%} of its adapter",
                "the base is sparse and the adapter is not: it was trained without the mask",
                "train with mask_adapters_(model), or pass allow_loss=True and evaluate the result",
            )
    merged = []
    for adapter, change, lost in jobs:
        weight = adapter.base.get_parameter("weight")
        with torch.no_grad():
            weight.copy_(weight.double() + change)
        parent, _, leaf = adapter.path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, adapter.base)
        rank = sum(min(adapter.module.get_parameter(a).shape) for a, _ in adapter.pairs)
        zeros = 1 - int(_mask(adapter.base).sum()) / weight.numel()
        merged.append(Merged(adapter.path, rank, zeros, lost))
    return tuple(merged)


def _required(model: nn.Module) -> list[_Adapter]:
    adapters = list(_adapters(model))
    if not adapters:
        raise RequestError(
            "the model has no low-rank adapters",
            "no module computes the output of an inner layer plus s B A x",
            "pass the model with its adapters, before merging",
        )
    return adapters


def _adapters(model: nn.Module) -> Iterator[_Adapter]:
    for path, module in model.named_modules():
        for leaf, base in module.named_children():
            weight = base._parameters.get("weight")
            if not path or weight is None or weight.dim() != 2 or not weight.is_floating_point():
                continue
            adapter = _candidate(path, module, leaf, base, weight)
            if adapter is None:
                continue
            if _added(adapter) is not None:
                yield adapter
                break
            if not weight.requires_grad and any(module.get_parameter(a).requires_grad for a, _ in adapter.pairs):
                raise NotSupported(
                    f"the adapter {path} cannot be merged",
                    "it does not add s B A x to its base",
                    "merge the adapter with the library that made it",
                )


def _candidate(path: str, module: nn.Module, leaf: str, base: nn.Module, weight: nn.Parameter) -> _Adapter | None:
    """The adapter whose matrices have fitting shapes, or None."""
    names = [n for n, p in module.named_parameters() if p.dim() == 2 and not n.startswith(f"{leaf}.")]
    half = len(names) // 2
    if not names or len(names) % 2 or len(names) > MOST:
        return None
    pairs = tuple(zip(names[:half], names[half:], strict=True))
    for flip in (False, True):
        adapter = _Adapter(path, module, leaf, base, pairs, flip)
        try:
            fits = all(len(adapter.deltas(module)) == half for _ in pairs)
            if fits and _is_linear(base, weight, flip):
                return adapter
        except (RuntimeError, TypeError, ValueError):
            continue
    return None


def _product(first: Tensor, second: Tensor, shape: tuple[int, int]) -> Tensor:
    out, width = shape
    if first.shape[1] == width and second.shape[0] == out and first.shape[0] == second.shape[1]:
        return second @ first
    if first.shape[0] == width and second.shape[1] == out and first.shape[1] == second.shape[0]:
        return (first @ second).T
    raise ValueError("these matrices are not factors of the base")


def _is_linear(base: nn.Module, weight: nn.Parameter, flip: bool) -> bool:
    """Whether the base computes `W x + b`, W stored as `(in, out)` if flipped."""
    replica = copied(base).double().eval()
    x = _probe(weight.shape[0] if flip else weight.shape[1], weight.device)
    matrix = weight.detach().double()
    with torch.no_grad():
        outputs = replica(x) - replica(torch.zeros_like(x))
    return isinstance(outputs, Tensor) and _close(outputs, x @ (matrix if flip else matrix.T))


def _probe(width: int, device: torch.device) -> Tensor:
    return torch.randn(
        1, PROBES, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu"
    ).to(device)


def _close(actual: Tensor, expected: Tensor) -> bool:
    scale = max(float(expected.norm()), float(actual.norm()))
    return actual.shape == expected.shape and float((actual - expected).norm()) <= EXACT * scale


def _added(adapter: _Adapter) -> Tensor | None:
    """The change of the base weight that the module computes, `sum_i s_i B_i A_i`; None for any other function."""
    replica = copied(adapter.module).double()
    weight = adapter.base.get_parameter("weight")
    x = _probe(adapter.shape[1], weight.device)
    try:
        with torch.no_grad(), mode(replica, training=False):
            outputs = first_tensor(replica(x)) - first_tensor(replica.get_submodule(adapter.leaf)(x))
    except Exception:  # of any kind: a module that fails on its own input is not a known adapter
        return None
    deltas = adapter.deltas(adapter.module)
    mask = _mask(adapter.base)
    for terms in [[delta * mask for delta in deltas], deltas]:
        flat = torch.stack([(x @ (d if adapter.flip else d.T)).flatten() for d in terms], 1)
        scales = _rounded(torch.linalg.lstsq(flat, outputs.flatten()[:, None], driver="gelsd").solution[:, 0].cpu())
        change = torch.stack([s * d for s, d in zip(scales, terms, strict=True)]).sum(0)
        answer = x @ (change if adapter.flip else change.T)
        scale = float(torch.stack([delta.norm() for delta in deltas]).max()) * float(x.norm())
        bound = EXACT * max(scale, float(outputs.norm()))
        if outputs.shape == answer.shape and float((outputs - answer).norm()) <= bound:
            return change
    return None


def _rounded(values: Tensor) -> list[float]:
    """Rounded to 10 digits: people write scales with few digits."""
    return [float(f"{value:.10g}") for value in values.tolist()]


def _change(adapter: _Adapter) -> tuple[Tensor, float]:
    """The change of the base weight, and the fraction of the adapter that the mask removes."""
    full = _added(adapter)
    assert full is not None
    kept = full * _mask(adapter.base)
    size = float(full.norm())
    return kept, float((full - kept).norm()) / size if size else 0.0


def _mask(base: nn.Module) -> Mask:
    weight = base.get_parameter("weight")
    packed = base.__dict__.get(RECORD, {}).get("weight")
    return packed.unpack(weight.device) if packed is not None else weight != 0


def _owner(module: nn.Module, name: str) -> object:
    """The `MaskedProduct` hooked to the layer of a factor, or None."""
    layer = module.get_submodule(name.rpartition(".")[0])
    owners = (getattr(hook, "__self__", None) for hook in layer._forward_hooks.values())
    return next((owner for owner in owners if isinstance(owner, MaskedProduct)), None)
