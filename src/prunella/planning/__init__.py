"""From a request to a plan: candidates, budgets and the accounting of a plan's costs."""

import lazy_loader

from prunella.errors import suggesting

_lazy, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__getattr__ = suggesting(__name__, _lazy)
