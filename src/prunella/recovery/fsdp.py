"""Recovery in several processes: masks that hold while FSDP2 shards the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from prunella.errors import RequestError
from prunella.model.masks import records


def hold_sharded_(model: nn.Module, optimizer: Optimizer) -> Callable[[], None]:
    """Keep the masks that `model` carries while `optimizer` trains its shards; the function returned ends it.

    After each step every process sets the masked weights of its own shard to zero, and what the optimizer remembers of
    them, as `Pruner` does in one process: no communication. Call it after `fully_shard` and after the optimizer was
    made of the sharded parameters; every process must. Optimizers whose weights do not step alone (Adafactor, Muon) are
    not for this. Errors: RequestError where the model carries no mask, or was not sharded.
    """
    from torch.distributed.tensor import DTensor  # takes a third of a second, and few need it

    held = [
        (parameter, _local_mask(parameter, packed.unpack())) for _, parameter, packed in records(model, sharded=True)
    ]
    if not held:
        raise RequestError(
            "the model carries no mask", "apply_ and solve_ leave masks", "prune it before it is sharded"
        )

    def hold(*_: Any) -> None:
        with torch.no_grad():
            for parameter, gone in held:
                for value in (parameter, *optimizer.state.get(parameter, {}).values()):
                    if isinstance(value, DTensor) and value.shape == parameter.shape:
                        value.to_local().masked_fill_(gone, 0)

    hold()
    return optimizer.register_step_post_hook(hold).remove


def _local_mask(parameter: nn.Parameter, mask: Tensor) -> Tensor:
    """What of this process's shard is removed."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(parameter.data, DTensor):
        raise RequestError("the model is not sharded", "its parameters are ordinary", "use Pruner in one process")
    spread: Any = parameter.data
    gone = distribute_tensor((~mask).to(torch.uint8).to(spread.device), spread.device_mesh, spread.placements)
    return gone.to_local().bool()
