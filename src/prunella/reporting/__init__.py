"""The report of a pruned model: numbers, page, charts, and the curves of a Pareto experiment."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
