"""From a request to a plan: candidates, budgets and the accounting of what a plan gives."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
