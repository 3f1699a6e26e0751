"""The same run in several processes: each has a share of the data, sums are joined, one solves and tells the others.

Started by torchrun, or by anything that makes a process group; prunella starts none and schedules nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from prunella.errors import NotSupported, RequestError
from prunella.solvers import Solved


def _near() -> torch.device:
    """Where a small tensor must lie to be sent: NCCL sends none from the memory of the CPU."""
    nccl = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


@dataclass(frozen=True)
class Processes:
    """This process is number `rank` of `count`."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and tells."""
        return self.rank == 0

    def share(self, batches: Sequence[Any]) -> list[Any]:
        """Every `count`-th batch. Errors: RequestError where a process would have none."""
        if len(batches) < self.count:
            raise RequestError(f"{len(batches)} batches for {self.count} processes", "each needs one", "give more data")
        return list(batches[self.rank :: self.count])

    def sum_(self, *tensors: Tensor) -> None:
        """Add up over the processes, in place; all get the same bits."""
        if self.count > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def agree(self, number: int, what: str) -> None:
        """Errors: NotSupported, in all processes, if the number is not the same everywhere."""
        if self.count == 1:
            return
        both = torch.tensor([number, -number], device=_near())
        dist.all_reduce(both, dist.ReduceOp.MAX)
        if int(both[0]) != -int(both[1]):
            raise NotSupported(f"the processes do not agree on {what}", "their data differ", "run it in one process")

    def total(self, number: int) -> int:
        """The sum of a number over the processes."""
        if self.count == 1:
            return number
        seen = torch.tensor(number, device=_near())
        dist.all_reduce(seen)
        return int(seen)

    def in_order(self, values: Sequence[float]) -> list[float]:
        """One number for each batch of all processes, in the order of the batches before they were shared."""
        if self.count == 1:
            return list(values)
        every = torch.zeros(self.total(len(values)), dtype=torch.float64, device=_near())
        every[self.rank :: self.count] = torch.tensor(values, dtype=torch.float64, device=every.device)
        dist.all_reduce(every)
        found: list[float] = every.tolist()
        return found

    def gradients(
        self, found: Sequence[Tensor | None] | None, like: Sequence[Tensor], owner: int
    ) -> list[Tensor | None]:
        """The gradients that the process `owner` found for the tensors `like`, in all of them."""
        if self.count == 1 and found is not None:
            return list(found)
        there = torch.tensor([found is None or g is not None for g in found or like], device=like[0].device).byte()
        dist.broadcast(there, owner)
        told: list[Tensor | None] = []
        for k, (value, here) in enumerate(zip(like, there.tolist(), strict=True)):
            mine = None if found is None else found[k]
            grad = torch.empty_like(value) if mine is None else mine.contiguous()
            if here:
                dist.broadcast(grad, owner)
            told.append(grad if here else None)
        return told

    def told(self, found: Solved | None, like: Tensor, owner: int) -> Solved:
        """What the process `owner` found, in all of them; `like` is the weight that was solved."""
        if self.count == 1 and found is not None:
            return found
        weight = torch.empty_like(like) if found is None else found.weight.contiguous()
        mask = like.new_empty(like.shape, dtype=torch.uint8) if found is None else found.mask.to(torch.uint8)
        numbers = like.new_tensor([found.error, found.damping] if found else [0.0, 0.0], dtype=torch.float64)
        for tensor in (weight, mask, numbers):
            dist.broadcast(tensor, owner)
        return Solved(weight, mask.bool(), *numbers.tolist())

    def wait(self) -> None:
        """Until all are here."""
        if self.count > 1:
            dist.barrier()


ALONE = Processes()


def processes() -> Processes:
    """Those of the process group that torchrun or the caller has made; one if there is none."""
    if dist.is_available() and dist.is_initialized():
        return Processes(dist.get_rank(), dist.get_world_size())
    return ALONE
