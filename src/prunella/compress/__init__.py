"""Compression other than pruning: quantization, weight sharing, lossless codes, storage formats, low rank."""

from typing import TYPE_CHECKING

from prunella.compress.huffman import decode as decode
from prunella.compress.huffman import huffman as huffman
from prunella.compress.huffman import relative_index as relative_index
from prunella.compress.int8 import to_int8_ as to_int8_
from prunella.compress.low_rank import low_rank as low_rank
from prunella.compress.low_rank import svd_factors as svd_factors
from prunella.compress.quantize import quantization_aware as quantization_aware
from prunella.compress.quantize import quantize_weight as quantize_weight
from prunella.compress.quantize import round_weights_ as round_weights_
from prunella.compress.storage import StorageFormat as StorageFormat
from prunella.compress.storage import stored_bytes as stored_bytes
from prunella.compress.weight_sharing import CentroidInit as CentroidInit
from prunella.compress.weight_sharing import deep_compression_ as deep_compression_
from prunella.compress.weight_sharing import share_weight as share_weight
from prunella.errors import suggesting

__all__ = [
    "CentroidInit",
    "StorageFormat",
    "decode",
    "deep_compression_",
    "huffman",
    "low_rank",
    "quantization_aware",
    "quantize_weight",
    "relative_index",
    "round_weights_",
    "share_weight",
    "stored_bytes",
    "svd_factors",
    "to_int8_",
]


def __dir__() -> list[str]:
    return __all__


if not TYPE_CHECKING:
    __getattr__ = suggesting(__name__)
