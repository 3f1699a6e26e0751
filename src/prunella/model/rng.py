"""The state of every random generator that may decide a training run, as plain data."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

Dice = dict[str, Any]
"""States of the global generators of torch, CUDA, numpy and Python, and of those that a data loader owns."""


def dice(data: object = None) -> Dice:
    """The states now. `data`: a loader whose own generators count too."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if _cuda() else [],
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss],
        "python": random.getstate(),
        "loader": [generator.get_state() for generator in _own(data)],
    }


def throw(state: Dice, data: object = None) -> None:
    """Set all generators to a state that `dice` gave."""
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    random.setstate(state["python"])
    for generator, own in zip(_own(data), state["loader"], strict=True):
        generator.set_state(own)


def seed_all(seed: int, data: object = None) -> None:
    """Set all generators by one seed."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    for generator in _own(data):
        generator.manual_seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run the body from this seed, and give the caller the generators back as they were."""
    before = dice()
    seed_all(seed)
    try:
        yield
    finally:
        throw(before)


def _own(data: object) -> list[torch.Generator]:
    """The generators that a loader, its sampler or its batch sampler holds, each once."""
    batch_sampler = getattr(data, "batch_sampler", None)
    holders = (data, getattr(data, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    found = [getattr(holder, "generator", None) for holder in holders]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def _cuda() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
