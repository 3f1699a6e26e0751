"""The same run in several processes: each has a share of the data, sums are joined, one solves and tells the others.

Started by torchrun, or by anything that makes a process group; prunella starts none and schedules nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from prunella.errors import NotSupported, RequestError
from prunella.solvers import Solved


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
        both = torch.tensor([number, -number])
        if self.count > 1:
            dist.all_reduce(both, dist.ReduceOp.MAX)
        if int(both[0]) != -int(both[1]):
            raise NotSupported(f"the processes do not agree on {what}", "their data differ", "run it in one process")

    def told(self, found: Solved | None, like: Tensor, owner: int) -> Solved:
        """What the process `owner` found, in all of them; `like` is the weight that was solved."""
        if self.count == 1 and found is not None:
            return found
        weight = torch.empty_like(like) if found is None else found.weight.contiguous()
        mask = torch.empty(like.shape, dtype=torch.uint8) if found is None else found.mask.to(torch.uint8)
        numbers = torch.tensor([found.error, found.damping] if found else [0.0, 0.0], dtype=torch.float64)
        for tensor in (weight, mask, numbers):
            dist.broadcast(tensor, owner)
        return Solved(weight, mask.bool(), *numbers.tolist())

    def copy_first_(self, module: nn.Module) -> None:
        """Give a module the weights that it has in the first process."""
        if self.count > 1:
            for parameter in module.parameters():
                dist.broadcast(parameter.detach(), 0)

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
