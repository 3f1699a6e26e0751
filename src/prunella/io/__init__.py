"""Files and models: reading, writing, and the identity of results."""

import lazy_loader

from prunella.errors import suggesting

_lazy, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__getattr__ = suggesting(__name__, _lazy)
