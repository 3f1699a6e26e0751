from .artifact import load_sparse as load_sparse
from .artifact import save_sparse as save_sparse
from .convert import Sparsified as Sparsified
from .convert import sparse as sparse
from .convert import sparsified as sparsified
from .dense import dense_fast as dense_fast
from .kernels.library import Precision as Precision

__all__ = [
    "Precision",
    "Sparsified",
    "dense_fast",
    "load_sparse",
    "save_sparse",
    "sparse",
    "sparsified",
]
