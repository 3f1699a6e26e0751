"""Plans that drop blocks: named blocks, or the run of consecutive blocks with the smallest angular distance."""

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
from prunella.model.batches import batches
from prunella.model.copying import copied
from prunella.model.forward import first_tensor
from prunella.model.hooks import removed_after
from prunella.model.state import untouched
from prunella.model.trees import tensors
from prunella.model.unwrap import unwrap
from prunella.planning.plan import Plan
from prunella.registry.method import solver
from prunella.stats import Source
from prunella.types import Inputs, Keep, Loss


@dataclass(frozen=True)
class Blocks:
    """The prunable residual blocks of a model, by path, with models and plans without some of them."""

    model: nn.Module
    graph: Graph
    inputs: Inputs

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of all blocks, stack by stack in order."""
        return tuple(path for stack in self.graph.stacks for path in stack.paths)

    def keep(self, dropped: Iterable[str]) -> Keep:
        """The kept blocks of each stack without these blocks. Errors: RequestError for an unknown path."""
        missing = set(dropped)
        strange = sorted(missing - set(self.paths))
        if strange:
            some = f"{self.paths[0]} to {self.paths[-1]}"
            raise RequestError(
                f"{strange[0]} is not a prunable block", f"the prunable blocks are {some}", "name one of them"
            )
        if not missing:
            raise RequestError("no block is named", "there is nothing to drop", "name one, or ask for one")
        keep = {
            s.name: torch.tensor([path not in missing for path in s.paths], device="cpu") for s in self.graph.stacks
        }
        return {name: mask for name, mask in keep.items() if not bool(mask.all())}

    def without(self, dropped: Iterable[str]) -> nn.Module:
        """A model without these blocks, for evaluation: it shares its parameters with the model."""
        shared = (*self.model.parameters(), *self.model.buffers())
        small = copied(self.model, shared=shared)
        change_(small, changes(self.graph, self.keep(dropped)))
        return small

    def plan(self, dropped: Iterable[str]) -> Plan:
        """The verified plan that drops these blocks. Errors: NotSupported if the smaller model is not exact."""
        keep = self.keep(dropped)
        with untouched(self.model, 0):
            faults = unproven(self.model, self.graph, keep, self.inputs)
        if faults:
            name, why = next(iter(faults.items()))
            raise NotSupported(f"blocks of {name} cannot be dropped", why, "leave them in")
        frozen = (*self.graph.frozen, *self.graph.rooted)
        return Plan.of_structure(self.graph, keep, inputs=self.inputs, frozen=frozen)


def find_blocks(model: nn.Module, inputs: Inputs) -> Blocks:
    """The residual blocks of `model`, from the data flow. Errors: NotSupported if there are none."""
    root = unwrap(model)
    with untouched(root, 0):
        graph = counted(root, couple(root, inputs), inputs)
    if not graph.stacks:
        why = graph.rooted[0].reason if graph.rooted else "no module of a list adds something to its input"
        raise NotSupported("there is no block to drop", why, "prune Channel() or Head()")
    return Blocks(root, graph, inputs)


def drop_blocks(model: nn.Module, inputs: Inputs, dropped: Sequence[str]) -> Plan:
    """The verified plan that drops exactly the named blocks, such as `model.layers.7`.

    Errors: RequestError for a name of no prunable block, NotSupported if the smaller model is not exact.
    dropped: paths of the blocks.
    """
    return find_blocks(model, inputs).plan(dropped)


@dataclass(frozen=True)
class Turns:
    """`angle[l, m]`: mean angle, as a fraction of a half turn, between the input of block l and the output of block m.

    paths: the blocks of one stack. Infinite for m < l, and for runs with a block that must be kept.
    """

    paths: tuple[str, ...]
    angle: Tensor

    def run(self, count: int) -> tuple[str, ...]:
        """The `count` consecutive blocks with the smallest angle; the first run among equal ones."""
        if not 0 < count < len(self.paths):
            raise RequestError(
                f"a run of {count} blocks", f"there are {len(self.paths)}, and one is kept", "ask for fewer"
            )
        angles = self.angle.diagonal(count - 1)
        start = int(angles.argmin())
        if not math.isfinite(float(angles[start])):
            raise NotSupported(
                f"no {count} blocks are consecutive", "blocks between them must be kept", "ask for fewer"
            )
        return self.paths[start : start + count]


@solver(source="Gromov et al. 2024, arXiv:2403.17887")
def drop_run(
    model: nn.Module, inputs: Inputs, data: Iterable[Any], *, count: int, last: bool = False, loss: Loss | None = None
) -> Plan:
    """A plan that drops the run of consecutive blocks with the smallest angular distance between input and output.

    `l* = argmin_l mean arccos(cos(x_l, x_{l+n})) / pi`, the angular distance between the input of block l and the
    output of block l + n - 1, for the vector of each token (last axis). Unlike block influence, this is the distance
    over the full run: small rotations may add up or cancel. Data: batches, forward passes only.

    count: blocks to drop, fewer than the model has. last: use only the last position of each sample, as in the paper,
    which needs many samples; by default every position. loss: how to run the model on a batch.

    Use: several layers of a language model at once, then `match_stream_` or `distill_lm_`. Avoid: a measurable loss:
    `greedy_blocks` uses it.
    """
    blocks = find_blocks(model, inputs)
    return blocks.plan(turns(blocks, data, last=last, loss=loss).run(count))


def turns(blocks: Blocks, data: Iterable[Any], *, last: bool = False, loss: Loss | None = None) -> Turns:
    """The angles of all runs of the largest stack, in one pass over the data."""
    stack = max(blocks.graph.stacks, key=lambda group: group.size)
    size, source = stack.size, Source(None, loss)
    total, count = torch.zeros(size, size, dtype=torch.float64, device="cpu"), 0
    with untouched(blocks.model, 0), torch.no_grad(), _streams(blocks.model, stack) as (enters, leaves):
        for batch in batches(data):
            source.run(blocks.model, batch)
            inputs, outputs = (torch.stack([_unit(kept[p], last) for p in stack.paths], 1) for kept in (enters, leaves))
            for a, b in zip(torch.split(inputs, 256), torch.split(outputs, 256), strict=True):
                cosine = torch.einsum("tld,tmd->lmt", a.double(), b.double()).clamp(-1, 1)
                total += (cosine.arccos() / math.pi).sum(-1).cpu()
            count += len(inputs)
    angle = total / max(1, count)
    where = {name: k for k, name in enumerate(blocks.graph.orders[stack.name])}
    place = torch.tensor([where[path.rpartition(".")[2]] for path in stack.paths], device="cpu")
    order = torch.arange(size, device="cpu")
    side_by_side = place[None, :] - place[:, None] == order[None, :] - order[:, None]
    return Turns(stack.paths, torch.where(side_by_side & (order[None, :] >= order[:, None]), angle, torch.inf))


def _unit(stream: Tensor, last: bool) -> Tensor:
    """Unit vectors of the tokens; a zero vector stays zero."""
    rows = (stream[..., -1, :] if last and stream.dim() > 2 else stream).flatten(0, -2)
    return torch.nn.functional.normalize(rows.float(), dim=-1)


@contextmanager
def _streams(model: nn.Module, stack: Group) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Copies of the inputs and outputs of every block of a stack in the last pass; blocks may add in place."""
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
    with removed_after(handles):
        yield enters, leaves
