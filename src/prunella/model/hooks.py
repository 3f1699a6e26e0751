"""Hooks of torch that live as long as a block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch.utils.hooks import RemovableHandle


@contextmanager
def removed_after(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    """Remove the hooks at the end of the block, including those added to the list inside it.

    For a single handle, torch itself provides `with handle:`.
    """
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
