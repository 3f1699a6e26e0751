"""Smaller attempts where an accelerator is out of memory: batches in halves, then hidden states on the CPU."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import nn

from prunella.model.device import device_is_full, devices_of, free_cached_memory, halved, short_of_memory
from prunella.model.state import restored_on_error

log = logging.getLogger(__name__)
T = TypeVar("T")
Attempt = Callable[[Sequence[Any], bool], T]
"""A run on batches; the second argument tells whether hidden states wait on the CPU."""


def in_less_memory(model: nn.Module, attempt: Attempt[T], batches: Sequence[Any], *, splits: bool) -> T:
    """`attempt`, again in less memory as long as an accelerator is full; the model is as before in each attempt.

    splits: whether the result does not depend on how samples are batched. Errors: OutOfResources after the last one.
    """
    host = False
    while True:
        try:
            with restored_on_error(model):
                return attempt(batches, host)
        except Exception as error:
            if not short_of_memory(error):
                raise
            what, full = f"{devices_of(model)} is out of memory", device_is_full(error, _told(devices_of(model)))
        free_cached_memory()  # outside of the handler, whose traceback keeps tensors alive
        halves = halved(batches) if splits and not host else None
        if halves is not None:
            log.warning("%s: again with %d batches in place of %d", what, len(halves), len(batches))
            batches = halves
        elif not host:
            log.warning("%s: again with the hidden states on the CPU", what)
            host = True
        else:
            raise full


def _told(devices: str) -> str:
    return f"{devices} is out of memory, with one sample a batch or batches as they are, and hidden states on the CPU"
