"""The states of all random number generators of a run, as plain data."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

RngState = dict[str, Any]
"""States of the global generators of torch, numpy and Python, and of those that a data loader owns.

`cuda` holds those of all devices of the accelerator in use, whatever its type.
"""


def rng_state(data: object = None) -> RngState:
    """The current states. `data`: a loader whose own generators are included."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": [module.get_rng_state(*which) for module, which in _of_accelerator()],
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss],
        "python": random.getstate(),
        "loader": [generator.get_state() for generator in _generators_of(data)],
    }


def restore_rng_(state: RngState, data: object = None) -> None:
    """Set all generators to a state from `rng_state`; one of a device that is not here is left out."""
    torch.set_rng_state(state["torch"])
    for own, (module, which) in zip(state["cuda"], _of_accelerator(), strict=False):
        module.set_rng_state(own, *which)
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    random.setstate(state["python"])
    for generator, own in zip(_generators_of(data), state["loader"], strict=True):
        generator.set_state(own)


def seed_rng_(seed: int, data: object = None) -> None:
    """Set all generators by one seed."""
    torch.default_generator.manual_seed(seed)
    for module in {id(module): module for module, _ in _of_accelerator()}.values():
        getattr(module, "manual_seed_all", module.manual_seed)(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
    for generator in _generators_of(data):
        generator.manual_seed(seed)


@contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Run the body with this seed, then restore the caller's generators.

    seed: None does not seed the generators; their states are still restored.
    """
    before = rng_state()
    try:
        if seed is not None:
            seed_rng_(seed)
        yield
    finally:
        restore_rng_(before)


def _generators_of(data: object) -> list[torch.Generator]:
    """The generators that a loader, its sampler or its batch sampler holds, each once."""
    batch_sampler = getattr(data, "batch_sampler", None)
    holders = (data, getattr(data, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    generators = [getattr(holder, "generator", None) for holder in holders]
    return list({id(g): g for g in generators if isinstance(g, torch.Generator)}.values())


def _of_accelerator() -> list[tuple[Any, tuple[int, ...]]]:
    """The module of torch for the accelerator in use, with the number of each of its devices, if it has numbers.

    None before it is initialized: its generators would initialize it, and a deferred seed would outlive the guard.
    """
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None or not torch.accelerator.is_available():
        return []
    module: Any = torch.get_device_module(accelerator)
    if not getattr(module, "is_initialized", module.is_available)():
        return []
    if accelerator.type == "mps":  # the only device, and its functions take none
        return [(module, ())]
    return [(module, (number,)) for number in range(torch.accelerator.device_count())]
