"""Recovery in several processes: masks stay in force while FSDP2 shards the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prunella.errors import RequestError
from prunella.model.masks import records
from prunella.model.unwrap import bare_optimizer


def hold_sharded_(model: nn.Module, optimizer: Optimizer) -> Callable[[], None]:
    """Keep the masks of `model` in force while `optimizer` trains its shards; the returned function ends this.

    After each step every process sets the masked weights of its own shard and their optimizer state to zero, as
    `Pruner` does in one process. No communication is needed. Call it in every process, after `fully_shard` and after
    making the optimizer from the sharded parameters. Optimizers that are not element-wise (Adafactor, Muon) are not
    supported. Errors: RequestError if the model carries no mask, or is not sharded.
    """
    from torch.distributed.tensor import DTensor  # the import takes a third of a second

    removed_by_parameter = [
        (parameter, _local_mask(parameter, packed.unpack())) for _, parameter, packed in records(model, sharded=True)
    ]
    if not removed_by_parameter:
        raise RequestError(
            "the model carries no mask", "apply_ and solve_ record masks", "prune the model before sharding"
        )

    optimizer = bare_optimizer(optimizer)

    def hold(*_: Any) -> None:
        with torch.no_grad():
            for parameter, removed in removed_by_parameter:
                for value in (parameter, *optimizer.state.get(parameter, {}).values()):
                    if isinstance(value, DTensor) and value.shape == parameter.shape:
                        value.to_local().masked_fill_(removed, 0)

    hold()
    return optimizer.register_step_post_hook(hold).remove


def _local_mask(parameter: nn.Parameter, mask: Tensor) -> Tensor:
    """True at the removed weights of this process's shard."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(parameter.data, DTensor):
        raise RequestError("the model is not sharded", "its parameters are plain tensors", "use Pruner in one process")
    shards: Any = parameter.data
    removed = distribute_tensor((~mask).to(torch.uint8).to(shards.device), shards.device_mesh, shards.placements)
    return removed.to_local().bool()
