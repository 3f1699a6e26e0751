"""Prune a neural network, recover its accuracy, and verify the result.

The names for a start are here; every other method is in the namespace of its subject, such as `pr.criteria` or
`pr.recovery`. Everything is imported on first use, so that the command line answers before torch is imported. The list
of names is `__init__.pyi`, which type checkers and editors read too.
"""

import lazy_loader

from prunella._version import __version__ as __version__
from prunella.errors import suggesting

_lazy, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__getattr__ = suggesting(__name__, _lazy)
