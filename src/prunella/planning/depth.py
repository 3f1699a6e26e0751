"""Plans that drop blocks: those that are named, or the run of blocks that turns the stream least."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prunella.errors import NotSupported, RequestError
from prunella.graph.cut.changes import changes
from prunella.graph.cut.surgery import change_
from prunella.graph.data import Graph, Group
from prunella.graph.solve.block_counters import counted
from prunella.graph.solve.groups import couple
from prunella.graph.verify import unproven
from prunella.model.copying import copied
from prunella.model.forward import batches, first_tensor, tensors
from prunella.model.state import untouched
from prunella.model.unwrap import unwrap
from prunella.planning.plan import Plan
from prunella.registry.method import solver
from prunella.stats import Source
from prunella.types import Inputs, Keep, Loss


@dataclass(frozen=True)
class Blocks:
    """The residual blocks of a model that may go, by path, and models and plans without some of them."""

    model: nn.Module
    graph: Graph
    inputs: Inputs

    @property
    def paths(self) -> tuple[str, ...]:
        """All of them, stack by stack in order."""
        return tuple(path for stack in self.graph.stacks for path in stack.paths)

    def keep(self, gone: Iterable[str]) -> Keep:
        """What stays of each stack without these blocks. Errors: RequestError for a path that is no such block."""
        missing = set(gone)
        strange = sorted(missing - set(self.paths))
        if strange:
            some = f"{self.paths[0]} to {self.paths[-1]}"
            raise RequestError(
                f"{strange[0]} is no block that may go", f"those that may are {some}", "name one of them"
            )
        if not missing:
            raise RequestError("no block is named", "there is nothing to drop", "name one, or ask for one")
        keep = {s.name: torch.tensor([path not in missing for path in s.paths]) for s in self.graph.stacks}
        return {name: mask for name, mask in keep.items() if not bool(mask.all())}

    def without(self, gone: Iterable[str]) -> nn.Module:
        """The model without these blocks, for a look: what stays shares its parameters with the model."""
        shared = (*self.model.parameters(), *self.model.buffers())
        twin = copied(self.model, shared=shared)
        change_(twin, changes(self.graph, self.keep(gone)))
        return twin

    def plan(self, gone: Iterable[str]) -> Plan:
        """The plan that takes these blocks out, proven. Errors: NotSupported where the smaller model is not exact."""
        keep = self.keep(gone)
        with untouched(self.model, 0):
            faults = unproven(self.model, self.graph, keep, self.inputs)
        if faults:
            name, why = next(iter(faults.items()))
            raise NotSupported(f"blocks of {name} cannot be dropped", why, "leave them in")
        frozen = (*self.graph.frozen, *self.graph.rooted)
        return Plan.of_structure(self.graph, keep, inputs=self.inputs, frozen=frozen)


def find_blocks(model: nn.Module, inputs: Inputs) -> Blocks:
    """The residual blocks of `model`, found from the data flow. Errors: NotSupported where there are none."""
    root = unwrap(model)
    with untouched(root, 0):
        graph = counted(root, couple(root, inputs), inputs)
    if not graph.stacks:
        why = graph.rooted[0].reason if graph.rooted else "no module of a list adds something to its input"
        raise NotSupported("there is no block to drop", why, "prune Channel() or Head()")
    return Blocks(root, graph, inputs)


def drop_blocks(model: nn.Module, inputs: Inputs, gone: Sequence[str]) -> Plan:
    """The plan that takes out exactly the blocks that are named, as `model.layers.7`, proven as any other plan.

    Errors: RequestError for a name that is no block that may go, NotSupported where the smaller model is not exact.
    """
    return find_blocks(model, inputs).plan(gone)


@dataclass(frozen=True)
class Turns:
    """`angle[l, m]`: mean angle, as a fraction of a half turn, between what enters block l and what leaves block m.

    paths: the blocks of one stack. Infinite for m < l, and for runs that hold a block that must stay.
    """

    paths: tuple[str, ...]
    angle: Tensor

    def run(self, count: int) -> tuple[str, ...]:
        """The `count` consecutive blocks whose removal turns the stream least; the first of equal ones."""
        if not 0 < count < len(self.paths):
            raise RequestError(
                f"a run of {count} blocks", f"there are {len(self.paths)}, and one stays", "ask for less"
            )
        found = self.angle.diagonal(count - 1)
        start = int(found.argmin())
        if not math.isfinite(float(found[start])):
            raise NotSupported(f"no {count} blocks stand side by side", "others between them must stay", "ask for less")
        return self.paths[start : start + count]


@solver(source="Gromov et al. 2024, arXiv:2403.17887")
def drop_run(
    model: nn.Module, inputs: Inputs, data: Iterable[Any], *, count: int, last: bool = False, loss: Loss | None = None
) -> Plan:
    """A plan that drops the run of consecutive blocks after which the stream has turned least.

    `l* = argmin_l mean arccos(cos(x_l, x_{l+n})) / pi`, the angular distance between what enters block l and what
    leaves block l + n - 1, of the vector of each token (last axis). Unlike block influence it looks at a run as a
    whole: small turns may add up or cancel. Data: batches, forward passes only.

    count: blocks to drop, fewer than there are. last: the last position of each sample alone, as in the paper, which
    needs many samples; by default every position. loss: how to run the model on a batch.

    Use: several layers of a language model at once, then `match_stream_` or `distill_lm_`. Avoid: where a loss can be
    measured: `greedy_blocks` chooses by it.
    """
    found = find_blocks(model, inputs)
    return found.plan(turns(found, data, last=last, loss=loss).run(count))


def turns(blocks: Blocks, data: Iterable[Any], *, last: bool = False, loss: Loss | None = None) -> Turns:
    """The angles of all runs of the largest stack, in one pass over the data."""
    stack = max(blocks.graph.stacks, key=lambda group: group.size)
    size, source = stack.size, Source(None, loss)
    total, count = torch.zeros(size, size, dtype=torch.float64), 0
    with untouched(blocks.model, 0), torch.no_grad(), _streams(blocks.model, stack) as (enters, leaves):
        for batch in batches(data):
            source.run(blocks.model, batch)
            one, other = (torch.stack([_unit(kept[p], last) for p in stack.paths], 1) for kept in (enters, leaves))
            for a, b in zip(torch.split(one, 256), torch.split(other, 256), strict=True):
                cosine = torch.einsum("tld,tmd->lmt", a.double(), b.double()).clamp(-1, 1)
                total += (cosine.arccos() / math.pi).sum(-1).cpu()
            count += len(one)
    angle = total / max(1, count)
    where = {name: k for k, name in enumerate(blocks.graph.orders[stack.name])}
    place = torch.tensor([where[path.rpartition(".")[2]] for path in stack.paths])
    order = torch.arange(size)
    side_by_side = place[None, :] - place[:, None] == order[None, :] - order[:, None]
    return Turns(stack.paths, torch.where(side_by_side & (order[None, :] >= order[:, None]), angle, torch.inf))


def _unit(stream: Tensor, last: bool) -> Tensor:
    """Vectors of length 1, one for each token that counts; a vector of zeros stays one."""
    rows = (stream[..., -1, :] if last and stream.dim() > 2 else stream).flatten(0, -2)
    return torch.nn.functional.normalize(rows.float(), dim=-1)


@contextmanager
def _streams(model: nn.Module, stack: Group) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """What enters and what leaves every block of a stack in the last pass; copies, since blocks may add in place."""
    enters: dict[str, Tensor] = {}
    leaves: dict[str, Tensor] = {}
    handles = []
    for path in stack.paths:
        block = model.get_submodule(path)

        def before(module: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
            enters[path] = tensors([list(args), kwargs])[0].detach().clone()

        def after(module: nn.Module, args: Any, output: Any, path: str = path) -> None:
            leaves[path] = first_tensor(output).detach().clone()

        handles += [block.register_forward_pre_hook(before, with_kwargs=True), block.register_forward_hook(after)]
    try:
        yield enters, leaves
    finally:
        for handle in handles:
            handle.remove()
