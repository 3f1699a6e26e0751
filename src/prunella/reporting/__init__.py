"""The report of a pruned model: numbers, page, charts, and the curves of a Pareto experiment."""

import lazy_loader

from prunella.errors import suggesting

_lazy, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__getattr__ = suggesting(__name__, _lazy)
