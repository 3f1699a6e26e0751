"""Checkpoints of compressed-tensors: a bit for each weight, and the values of the non-zero ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prunella.errors import BadInput, NotSupported
from prunella.io.importers.imported import Imported, State, tensors_of, zero_masks
from prunella.registry.method import importer
from prunella.types import Mask

PARTS = ("shape", "compressed", "bitmask", "row_offsets")
_QUANTIZED = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "scale_packed", "meta")
FORMATS = ("dense", "sparse-bitmask", "sparse-24-bitmask")


@importer(source="compressed-tensors 0.9, formats sparse-bitmask and sparse-24-bitmask, github.com/neuralmagic")
def compressed_tensors(state: State) -> Imported:
    """Weights that compressed-tensors (llm-compressor) stored as bitmask and values, decoded here.

    `W[bits] = compressed, else 0`: a module's `weight` is stored as `shape`, `bitmask` (a bit for each weight, the
    lowest first, every row filled up to bytes), `compressed` (values in rows), and `row_offsets` (values before each
    row) in `sparse-bitmask`; two values of every four in `sparse-24-bitmask`. Lengths, offsets and counts must agree.
    Weights that are stored dense are masked where they are zero.
    Data: none.
    Errors: BadInput for parts that do not agree, NotSupported for quantized weights.

    Use: folders of llm-compressor with `sparsity_config`. Avoid: quantized weights, which are refused: a plan masks
    weights of the model as it is.
    """
    tensors = tensors_of(state)
    quantized = sorted(name for name in tensors if name.rpartition(".")[2] in _QUANTIZED)
    if quantized:
        why = f"{quantized[0]} belongs to a quantized weight"
        raise NotSupported("quantized weights are not imported", why, "decompress them with the tool that made them")
    remarks = _described(state.get("config"))
    weights: dict[str, Tensor] = {}
    masks: dict[str, Mask] = {}
    packed = {name.rpartition(".")[0] for name in tensors if name.rpartition(".")[2] == "bitmask"}
    for name, value in tensors.items():
        prefix, _, leaf = name.rpartition(".")
        if prefix in packed and leaf in PARTS:
            continue
        weights[name] = value
    dense = zero_masks(weights)
    for prefix in sorted(packed):
        name = f"{prefix}.weight" if prefix else "weight"
        parts = {leaf: tensors.get(f"{prefix}.{leaf}" if prefix else leaf) for leaf in PARTS}
        weights[name], masks[name] = decode(name, parts)
    return Imported("compressed-tensors", dense | masks, weights, remarks)


def decode(name: str, parts: Mapping[str, Tensor | None]) -> tuple[Tensor, Mask]:
    """The weight and its mask from the stored parts. Errors: BadInput if they contradict each other."""
    shape = _shape(name, parts.get("shape"))
    bits = parts["bitmask"]
    values = parts.get("compressed")
    if bits is None or values is None:
        raise BadInput(f"{name} is incomplete", "its compressed values are missing", "fetch the checkpoint again")
    width = -(-shape[-1] // 8)
    rows = int(np.prod(shape[:-1], dtype=object)) if len(shape) > 1 else 1
    if bits.dtype != torch.uint8 or bits.numel() != rows * width:
        why = f"{bits.numel()} bytes of {bits.dtype} where a shape of {shape} takes {rows * width} of uint8"
        raise _broken(name, why)
    flat = np.unpackbits(bits.cpu().reshape(rows, width).numpy(), axis=1, bitorder="little")
    if flat[:, shape[-1] :].any():
        raise _broken(name, "bits are set beyond the end of a row")
    mask = torch.from_numpy(flat[:, : shape[-1]].astype(bool)).reshape(shape)
    count = int(mask.sum())
    if values.numel() != count:
        raise _broken(name, f"{values.numel()} values for {count} bits that are set")
    if not values.is_floating_point():
        raise NotSupported(f"{name} holds {values.dtype}", "a quantized weight", "decompress it with its own tool")
    offsets = parts.get("row_offsets")
    if offsets is not None:
        counts = mask.sum(-1)
        _offsets(
            name,
            offsets,
            torch.cumsum(counts, 0) - counts if mask.dim() > 1 else torch.zeros(1, dtype=torch.long, device="cpu"),
        )
    elif values.dim() == 2:
        _two_of_four(name, mask, values)
    return _place(mask, values), mask


def _place(mask: Mask, values: Tensor) -> Tensor:
    # By bytes: formats of eight bits have no such assignment.
    raw = values.detach().cpu().contiguous().reshape(-1)
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[raw.element_size()]
    dense = torch.zeros(mask.shape, dtype=whole, device="cpu")
    dense[mask] = raw.view(whole)
    return dense.view(values.dtype)


def _shape(name: str, stored: Tensor | None) -> tuple[int, ...]:
    if stored is None or stored.is_floating_point() or stored.is_complex() or not 1 <= stored.numel() <= 5:
        raise _broken(name, "its shape is missing, or is not a list of sizes")
    shape = tuple(int(size) for size in stored.flatten().tolist())
    if min(shape) < 1:
        raise _broken(name, f"a shape of {shape}")
    return shape


def _offsets(name: str, offsets: Tensor, wanted: Tensor) -> None:
    same = offsets.numel() == wanted.numel() and not offsets.is_floating_point()
    if same and bool((offsets.cpu().reshape(wanted.shape).long() == wanted).all()):
        return
    if same and int(offsets.min()) < 0:
        raise _broken(name, f"a row starts at {int(offsets.min())}")
    raise _broken(name, "row_offsets are not those of the bits")


def _two_of_four(name: str, mask: Mask, values: Tensor) -> None:
    rows, cols = mask.shape[0], mask.shape[-1]
    fits = mask.dim() == 2 and cols % 4 == 0 and tuple(values.shape) == (rows, cols // 2)
    if not fits or not bool((mask.reshape(-1, 4).sum(1) == 2).all()):
        raise _broken(name, f"values of shape {tuple(values.shape)} are not two of every four of {tuple(mask.shape)}")


def _broken(name: str, why: str) -> BadInput:
    return BadInput(f"the stored parts of {name} do not agree", why, "the file is damaged: fetch it again")


def _described(config: Any) -> tuple[str, ...]:
    """The sparsity of config.json as a remark. Errors: NotSupported for a format that is not read."""
    entries: Any = None
    if isinstance(config, Mapping):
        holders = [config, *(config.get(key) for key in ("quantization_config", "compression_config"))]
        entries = next(
            (h["sparsity_config"] for h in holders if isinstance(h, Mapping) and h.get("sparsity_config")), None
        )
    if not isinstance(entries, Mapping):
        return ()
    kind = str(entries.get("format", "dense"))
    if kind not in FORMATS:
        todo = "decompress it with the tool that made it"
        raise NotSupported(f"the format {kind!r} is not read", f"{', '.join(FORMATS)} are", todo)
    said = [f"{key}={entries[key]}" for key in ("global_sparsity", "sparsity_structure") if key in entries]
    return (f"config.json says {kind}: {', '.join(said) or 'nothing more'}",)
