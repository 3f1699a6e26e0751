"""Low-rank adapters on a sparse base: trained and merged so that what is pruned stays pruned.

An adapter is recognised by what it computes, whoever wrote it: a module whose output is that of one inner layer plus
`s B A x`. This holds for peft's linear layers and for the usual hand-written ones, and is measured in float64 on random
inputs before anything is merged.
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
"""A module with more matrices than this is no adapter."""
Matrices = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Merged:
    """One adapter that became part of its base. lost: the part of `|B A|` that the mask took, 0 to 1."""

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
        found = []
        for a, b in self.pairs:
            first, second = module.get_parameter(a).detach(), module.get_parameter(b).detach()
            product = _product(first.double(), second.double(), self.shape)
            found.append(product.T if self.flip else product)
        return found

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
        """After the first layer: what it was given, dropout included."""
        self._inputs = arguments[0]

    def multiply(self, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        """After the second layer: the masked product instead of its output."""
        assert self._inputs is not None
        inputs, self._inputs = self._inputs, None
        a, b = self.first.get_parameter("weight"), self.second.get_parameter("weight")
        return F.linear(inputs, (b @ a) * self.mask(b.device), self.second._parameters.get("bias"))

    def mask(self, device: torch.device) -> Mask:
        """The mask of the base `(out, in)`: the recorded one, else where it was not zero."""
        packed = self.base.__dict__.get(RECORD, {}).get("weight", self.zeros)
        if self._mask is None or self._mask[0] is not packed or self._mask[1].device != device:
            mask = packed.unpack(device)
            self._mask = packed, mask.T if self.flip else mask
        return self._mask[1]


@recovery(source="Hu et al. 2021, arXiv:2106.09685; Lu et al. 2024, arXiv:2405.16057 (products that keep the sparsity)")
def mask_adapters_(model: nn.Module) -> tuple[str, ...]:
    """Make every low-rank adapter in `model` respect the zeros of its base, and return their names.

    `y = W x + s (m * (B A)) x`, m the mask that the base carries, or else where its weight is not zero. Nothing is
    renamed or replaced: hooks on the two layers of each adapter compute the masked product, dropout in front of them
    stays, and the trained function is exactly the one that `merge_adapters_` leaves. Costs one matrix product of the
    size of the base and step.

    peft's linear layers and hand-written ones with two linear layers are recognised by what they compute.

    Data: none.

    Use: before training adapters on a pruned model that shall stay sparse. Avoid: for a dense base, where it only
    costs.
    """
    model = unwrap(model)
    done = []
    for adapter in _required(model):
        if any(isinstance(_owner(adapter.module, a), MaskedProduct) for a, _ in adapter.pairs):
            continue
        for a, b in adapter.pairs:
            first, second = (adapter.module.get_submodule(name.rpartition(".")[0]) for name in (a, b))
            if first is adapter.module or second is adapter.module or first._parameters.get("bias") is not None:
                raise NotSupported(
                    f"the adapter {adapter.path} cannot be masked",
                    "its two factors are no linear layers, the first without a bias",
                    "write it with nn.Linear for both, or mask the product in its forward",
                )
            product = MaskedProduct(adapter.base, first, second, adapter.flip)
            first.register_forward_hook(product.keep_inputs)
            second.register_forward_hook(product.multiply)
        done.append(adapter.path)
    return tuple(done)


@recovery(source="Hu et al. 2021, arXiv:2106.09685 (merging); Lu et al. 2024, arXiv:2405.16057 (with a mask)")
def merge_adapters_(model: nn.Module, *, allow_loss: bool = False) -> tuple[Merged, ...]:
    """Add every low-rank adapter to its base, in place, under the mask of the base; the layers are then plain ones.

    `W <- W + m * (s B A)`, m the mask that the base carries, or else where its weight is not zero: the zeros of the
    base are exactly the zeros it had. Each adapter module is replaced by its base, under its own name. With peft,
    `model.get_base_model()` is the plain model afterwards.

    allow_loss: merge also where the adapter was trained without the mask, so that the mask takes a part of it.

    `CheckFailed` for such an adapter otherwise, with the part that would be lost; `NotSupported` for an adapter that
    adds something else than `s B A x` (DoRA for example). The model is then as it was.

    Data: none.

    Use: to ship a sparse model after training adapters with `mask_adapters_`. Avoid: while the adapters still train.
    """
    model = unwrap(model)
    jobs = [(adapter, *_change(adapter)) for adapter in _required(model)]
    for adapter, _, lost in jobs:
        if lost and not allow_loss:
            raise CheckFailed(
                f"merging {adapter.path} would lose {lost:.1%} of its adapter",
                "the base is sparse and the adapter is not: it was trained without the mask",
                "train with mask_adapters_(model), or pass allow_loss=True and judge what is left",
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
    found = list(_adapters(model))
    if not found:
        raise RequestError(
            "the model has no low-rank adapters",
            "no module computes the output of an inner layer plus s B A x",
            "call this on the model that holds them, before merging",
        )
    return found


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
                    "what it adds to its base is not s B A x",
                    "merge it with the library that made it",
                )


def _candidate(path: str, module: nn.Module, leaf: str, base: nn.Module, weight: nn.Parameter) -> _Adapter | None:
    """An adapter by the shapes of its matrices."""
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
    raise ValueError("these are no factors of the base")


def _is_linear(base: nn.Module, weight: nn.Parameter, flip: bool) -> bool:
    """Whether the base computes `W x + b`, W stored as `(in, out)` if flipped."""
    twin = copied(base).double().eval()
    x = _probe(weight.shape[0] if flip else weight.shape[1], weight.device)
    matrix = weight.detach().double()
    with torch.no_grad():
        found = twin(x) - twin(torch.zeros_like(x))
    return isinstance(found, Tensor) and _close(found, x @ (matrix if flip else matrix.T))


def _probe(width: int, device: torch.device) -> Tensor:
    return torch.randn(1, PROBES, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)


def _close(found: Tensor, wanted: Tensor) -> bool:
    scale = max(float(wanted.norm()), float(found.norm()))
    return found.shape == wanted.shape and float((found - wanted).norm()) <= EXACT * scale


def _added(adapter: _Adapter) -> Tensor | None:
    """The change of the base weight that the module computes, `sum_i s_i B_i A_i`; None if it is something else."""
    twin = copied(adapter.module).double()
    weight = adapter.base.get_parameter("weight")
    x = _probe(adapter.shape[1], weight.device)
    try:
        with torch.no_grad(), mode(twin, training=False):
            found = first_tensor(twin(x)) - first_tensor(twin.get_submodule(adapter.leaf)(x))
    except Exception:  # whatever it is, a module that cannot be run on its own input is not known to be an adapter
        return None
    deltas = adapter.deltas(adapter.module)
    mask = _mask(adapter.base)
    for mine in [[delta * mask for delta in deltas], deltas]:
        flat = torch.stack([(x @ (d if adapter.flip else d.T)).flatten() for d in mine], 1)
        scales = _rounded(torch.linalg.lstsq(flat, found.flatten()[:, None], driver="gelsd").solution[:, 0].cpu())
        change = torch.stack([s * d for s, d in zip(scales, mine, strict=True)]).sum(0)
        answer = x @ (change if adapter.flip else change.T)
        scale = float(torch.stack([delta.norm() for delta in deltas]).max()) * float(x.norm())
        if found.shape == answer.shape and float((found - answer).norm()) <= EXACT * max(scale, float(found.norm())):
            return change
    return None


def _rounded(values: Tensor) -> list[float]:
    """To 10 digits: scales are written by people."""
    return [float(f"{value:.10g}") for value in values.tolist()]


def _change(adapter: _Adapter) -> tuple[Tensor, float]:
    """What to add to the base weight, and the part of the adapter that its mask takes."""
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
    """What is hooked to the layer of a factor, if it is one of ours."""
    layer = module.get_submodule(name.rpartition(".")[0])
    owners = (getattr(hook, "__self__", None) for hook in layer._forward_hooks.values())
    return next((owner for owner in owners if isinstance(owner, MaskedProduct)), None)
