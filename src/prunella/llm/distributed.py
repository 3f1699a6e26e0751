"""Data-parallel pruning: each process holds a shard of the data, sums are all-reduced, one process solves each matrix.

The process group is made by torchrun or by the caller; prunella starts no processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from prunella.errors import NotSupported, RequestError
from prunella.solvers.layer import Solved


def _device() -> torch.device:
    """Where a small tensor must be to be sent: NCCL sends none from the memory of the CPU."""
    nccl = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")


@dataclass(frozen=True)
class ProcessGroup:
    """The rank of this process, and the number of processes."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and messages."""
        return self.rank == 0

    def shard(self, batches: Sequence[Any]) -> list[Any]:
        """The batches of this process: every `world_size`-th. Errors: RequestError if a process would have none."""
        if len(batches) < self.world_size:
            what = f"{len(batches)} batches for {self.world_size} processes"
            raise RequestError(what, "each needs one", "give more data")
        return list(batches[self.rank :: self.world_size])

    def all_reduce_(self, *tensors: Tensor) -> None:
        """Sum over the processes, in place; all get the same bits."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def check_equal(self, number: int, what: str) -> None:
        """Errors: NotSupported, in all processes, if the number differs between them."""
        if self.world_size == 1:
            return
        both = torch.tensor([number, -number], device=_device())
        dist.all_reduce(both, dist.ReduceOp.MAX)
        if int(both[0]) != -int(both[1]):
            raise NotSupported(f"the processes do not agree on {what}", "their data differ", "run it in one process")

    def total(self, number: int) -> int:
        """The sum of a number over the processes."""
        if self.world_size == 1:
            return number
        total = torch.tensor(number, device=_device())
        dist.all_reduce(total)
        return int(total)

    def gather_in_order(self, values: Sequence[float]) -> list[float]:
        """The numbers of the batches of all processes, one per batch, in the order of the batches before sharding."""
        if self.world_size == 1:
            return list(values)
        gathered = torch.zeros(self.total(len(values)), dtype=torch.float64, device=_device())
        gathered[self.rank :: self.world_size] = torch.tensor(values, dtype=torch.float64, device=gathered.device)
        dist.all_reduce(gathered)
        numbers: list[float] = gathered.tolist()
        return numbers

    def broadcast_gradients(
        self, gradients: Sequence[Tensor | None] | None, like: Sequence[Tensor], owner: int
    ) -> list[Tensor | None]:
        """The gradients for the tensors `like` that the process `owner` computed, in all processes."""
        if self.world_size == 1 and gradients is not None:
            return list(gradients)
        flags = [gradients is None or g is not None for g in gradients or like]
        present = torch.tensor(flags, device=like[0].device).byte()
        dist.broadcast(present, owner)
        received: list[Tensor | None] = []
        for k, (value, exists) in enumerate(zip(like, present.tolist(), strict=True)):
            own = None if gradients is None else gradients[k]
            gradient = torch.empty_like(value) if own is None else own.contiguous()
            if exists:
                dist.broadcast(gradient, owner)
            received.append(gradient if exists else None)
        return received

    def broadcast_solution(self, solved: Solved | None, like: Tensor, owner: int) -> Solved:
        """The solution of the process `owner`, in all processes; `like` is the weight that was solved."""
        if self.world_size == 1 and solved is not None:
            return solved
        weight = torch.empty_like(like) if solved is None else solved.weight.contiguous()
        mask = like.new_empty(like.shape, dtype=torch.uint8) if solved is None else solved.mask.to(torch.uint8)
        numbers = like.new_tensor([solved.error, solved.damping] if solved else [0.0, 0.0], dtype=torch.float64)
        for tensor in (weight, mask, numbers):
            dist.broadcast(tensor, owner)
        return Solved(weight, mask.bool(), *numbers.tolist())

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            dist.barrier()


SINGLE_PROCESS = ProcessGroup()


def process_group() -> ProcessGroup:
    """The process group of torch that torchrun or the caller has initialized; a single process if there is none.

    Not named `distributed`, which is this module.
    """
    if dist.is_available() and dist.is_initialized():
        return ProcessGroup(dist.get_rank(), dist.get_world_size())
    return SINGLE_PROCESS
