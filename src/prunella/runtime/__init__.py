"""Sparse CPU inference: kernels that skip unstructured zeros, layers that use them, and the choice by measurement."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
