"""For all tests: transformers imports torchvision, whose own operators may not fit a CPU build of torch."""

from __future__ import annotations

import importlib.util
import warnings

from prunella.io.load import import_module

if importlib.util.find_spec("torchvision") is not None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own import
        import_module("torchvision")
