"""Prune a neural network, recover it, prove it: smaller, measurably faster, and as accurate as can be had.

The names of the first hour stand here; every other method is in the namespace of its subject, `pr.criteria` or
`pr.recovery` for example. Everything is loaded when it is first used, so that the command line answers before torch is
imported. The list is `__init__.pyi`, which type checkers and editors read too.
"""

import lazy_loader

from prunella._version import __version__ as __version__
from prunella.errors import suggesting

_lazy, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__getattr__ = suggesting(__name__, _lazy)
