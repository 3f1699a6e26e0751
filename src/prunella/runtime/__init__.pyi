from .artifact import load_sparse as load_sparse
from .artifact import save_sparse as save_sparse
from .convert import sparse as sparse
from .dense import dense_fast as dense_fast
from .kernels.config import Precision as Precision
from .record import Sparsified as Sparsified
from .record import sparsified as sparsified

__all__ = [
    "Precision",
    "Sparsified",
    "dense_fast",
    "load_sparse",
    "save_sparse",
    "sparse",
    "sparsified",
]
