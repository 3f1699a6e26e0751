"""Importers: plans from models pruned by other tools. Files are untrusted and read as data only."""

from typing import TYPE_CHECKING

from prunella.errors import suggesting
from prunella.io.importers.checkpoint import neural_compressor as neural_compressor
from prunella.io.importers.checkpoint import sparseml as sparseml
from prunella.io.importers.checkpoint import zeros as zeros
from prunella.io.importers.compressed import compressed_tensors as compressed_tensors
from prunella.io.importers.imported import Imported as Imported
from prunella.io.importers.plan import import_plan as import_plan
from prunella.io.importers.torch_masks import torch_ao as torch_ao
from prunella.io.importers.torch_masks import torch_prune as torch_prune

__all__ = [
    "Imported",
    "compressed_tensors",
    "import_plan",
    "neural_compressor",
    "sparseml",
    "torch_ao",
    "torch_prune",
    "zeros",
]


def __dir__() -> list[str]:
    return __all__


if not TYPE_CHECKING:
    __getattr__ = suggesting(__name__)
