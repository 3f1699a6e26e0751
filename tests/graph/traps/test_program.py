"""Sizes typed into the source: each is refused where it stands, and follows the cut in a program."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from tests.oracle import check_exact, frozen_because, produced_by, settle
from torch import Tensor, nn

import prunella
from prunella.errors import NotSupported
from prunella.graph.solve.groups import couple
from prunella.graph.verify import verify

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
Forward = Callable[["Typed", Tensor], Tensor]


class Typed(nn.Module):
    """Two layers with a forward of its own between them, where sizes are typed."""

    def __init__(self, middle: Forward, wide: int, narrow: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, wide), nn.Linear(narrow, 5)
        self.gate = nn.Linear(8, 1)
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.middle(self, x))
        return out


def viewed(net: Typed, x: Tensor) -> Tensor:
    y = net.first(x).view(x.shape[0], 3, 4)
    return y[:, 0] * y[:, 1] + y[:, 2]


def unflattened(net: Typed, x: Tensor) -> Tensor:
    y = net.first(x).unflatten(1, (3, 4))
    return y[:, 0] * y[:, 1] + y[:, 2]


def split(net: Typed, x: Tensor) -> Tensor:
    a, b, c = torch.split(net.first(x), 4, dim=1)
    return a * b + c


def split_by_list(net: Typed, x: Tensor) -> Tensor:
    a, b, c = torch.split(net.first(x), [4, 4, 4], dim=-1)
    return a * b + c


def sliced(net: Typed, x: Tensor) -> Tensor:
    y = net.first(x)
    return y[:, :6] * torch.sigmoid(y[:, 6:])


def sliced_from_the_end(net: Typed, x: Tensor) -> Tensor:
    y = net.first(x)
    return y[:, :-6] * torch.sigmoid(y[:, -6:])


def narrowed(net: Typed, x: Tensor) -> Tensor:
    y = net.first(x)
    return y.narrow(1, 0, 6) * torch.sigmoid(y.narrow(1, 6, 6))


def expanded(net: Typed, x: Tensor) -> Tensor:
    return net.first(x) * net.gate(x).expand(-1, 12)


def repeated(net: Typed, x: Tensor) -> Tensor:
    return net.first(x) * net.gate(x).repeat(1, 12)


def made(net: Typed, x: Tensor) -> Tensor:
    return torch.cat([net.first(x), torch.ones(x.shape[0], 2)], dim=1) + torch.zeros(x.shape[0], 14)


def calculated(net: Typed, x: Tensor) -> Tensor:
    y = net.first(x)
    half = int(0.5 * y.shape[1])
    return y[:, :half] * torch.sigmoid(y[:, half:])


@dataclass(frozen=True)
class Case:
    """A forward, the width before and after it, and how many units of which size the program lets go."""

    middle: Forward
    wide: int
    narrow: int
    units: int
    per_unit: int


CASES = [
    Case(viewed, 12, 4, 4, 3),
    Case(unflattened, 12, 4, 4, 3),
    Case(split, 12, 4, 4, 3),
    Case(split_by_list, 12, 4, 4, 3),
    Case(sliced, 12, 6, 6, 2),
    Case(sliced_from_the_end, 12, 6, 6, 2),
    Case(narrowed, 12, 6, 6, 2),
    Case(expanded, 12, 12, 12, 1),
    Case(repeated, 12, 12, 12, 1),
    Case(made, 12, 14, 12, 1),
    Case(calculated, 12, 6, 6, 2),
]
X = torch.linspace(-1, 1, 24).view(3, 8) ** 3


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.middle.__name__)
def test_a_typed_size_is_refused_where_it_stands_and_follows_in_a_program(case: Case) -> None:
    model = settle(Typed(case.middle, case.wide, case.narrow))
    held = [f for f in couple(model, X).frozen if f.entity == "first.weight" and f.axis == 0]
    assert [f.count for f in held] == [case.wide] and held[0].where.startswith("traps/test_program.py:")
    program = prunella.as_program(model, X)
    checked = check_exact(program, X, fraction=0.5)
    group = produced_by(checked.graph, "first")
    member = next(m for m in group.members if m.entity == "first.weight" and m.axis == 0)
    assert (group.size, len(member.index) // group.size) == (case.units, case.per_unit)
    pruned = int((~checked.keep[group.name]).sum())
    assert checked.small.get_parameter("first.weight").shape == (case.wide - pruned * case.per_unit, 8)
    assert checked.moved > 1e-6


class Attention(nn.Module):
    """As many tokens as heads, as wide a head as the batch: every typed size means one thing only."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(12, 12) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).view(x.shape[0], 4, 4, 3).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape[0], 4, 12)
        out: Tensor = self.o(y)
        return out


def test_equal_sizes_are_told_apart() -> None:
    x = torch.randn(3, 4, 12, generator=torch.Generator().manual_seed(0))
    assert not couple(settle(Attention()), x).groups
    program = prunella.as_program(settle(Attention()), x)
    checked = check_exact(program, x, fraction=0.5)
    (group,) = checked.graph.groups
    assert (group.size, group.kind) == (4, "head")
    changed = {a.name: a.new(checked.keep) for a in checked.graph.attributes if a.new(checked.keep) != a.value}
    assert sorted(changed.values()) == [2, 2, 2, 6]
    seen = {name: value for name, value in vars(checked.small).items() if "_size_" in name}
    assert sorted(seen.values()) == [2, 2, 2, 3, 3, 3, 4, 4, 4, 4, 6]  # heads, their width, tokens


class Convolved(nn.Module):
    """Groups typed into calls of the functional interface."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 5, 1)
        self.depth, self.scale = nn.Parameter(torch.randn(12, 1, 3, 3)), nn.Parameter(torch.randn(12))

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(self.first(x), self.depth, groups=12)
        out: Tensor = self.last(F.group_norm(y, 4, self.scale))
        return out


def test_typed_groups_follow() -> None:
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    model = settle(Convolved())
    assert frozen_because(couple(model, x), "first.weight", 0, "typed into the source")
    checked = check_exact(prunella.as_program(model, x), x)
    assert produced_by(checked.graph, "first").size == 4
    pruned = int((~checked.keep["first"]).sum())
    assert checked.small.get_parameter("depth").shape[0] == 12 - 3 * pruned


def test_what_has_no_rule_stays_in_a_program_too() -> None:
    def transformed(net: Typed, x: Tensor) -> Tensor:
        return torch.fft.fft(net.first(x)).abs()

    program = prunella.as_program(settle(Typed(transformed, 12, 12)), X)
    assert frozen_because(couple(program, X), "first.weight", 0, "has no rule")
    with pytest.raises(NotSupported, match="has no rule"):
        prunella.plan(program, X, target=prunella.Params(0.5))


def test_a_refusal_offers_the_program() -> None:
    model = settle(Typed(viewed, 12, 4))
    with pytest.raises(NotSupported, match=r"typed into the source \(traps/test_program.py:\d+\)") as refused:
        prunella.plan(model, X, target=prunella.Params(0.5))
    assert "prunella.as_program(model, inputs)" in refused.value.todo and "--program" in refused.value.todo


class Tied(nn.Module):
    """A tied head, an unused layer, a frozen weight, buffers in and out of the state dict, dropout, typed heads."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(11, 12), nn.Linear(12, 11, bias=False)
        self.head.weight = self.table.weight
        self.up, self.down, self.unused = nn.Linear(12, 16), nn.Linear(8, 12), nn.Linear(2, 2)
        self.register_buffer("shift", torch.randn(8))
        self.register_buffer("ramp", torch.randn(16), persistent=False)
        self.dropout = nn.Dropout(0.5)
        self.up.weight.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        y = (self.up(x) + self.get_buffer("ramp")).view(x.shape[0], x.shape[1], 2, 8)
        y = self.dropout(y[:, :, 0] * torch.tanh(y[:, :, 1]) + self.get_buffer("shift"))
        out: Tensor = self.head(x + self.down(y) * torch.tensor(0.5))
        return out


TOKENS = torch.arange(10).view(2, 5) % 11


def test_a_program_has_the_names_ties_and_flags_of_the_model() -> None:
    model = settle(Tied()).train()
    program = prunella.as_program(model, TOKENS)
    assert model.training and all(module.training for module in model.modules())
    for other in (program, copy.deepcopy(program)):
        assert list(other.state_dict()) == list(model.state_dict())
        assert other.get_parameter("head.weight") is other.get_parameter("table.weight")
        flags = {name: p.requires_grad for name, p in other.named_parameters()}
        assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
        assert {"ramp", "shift"} < {name for name, _ in other.named_buffers()}
        assert not other.training
    assert all(p is model.get_parameter(name) for name, p in program.named_parameters())
    torch.testing.assert_close(program.train()(TOKENS), model.eval()(TOKENS))  # the flag means nothing


def test_a_program_takes_any_batch_and_any_length() -> None:
    model = settle(Tied())
    program = prunella.as_program(model, TOKENS)
    plan = prunella.plan(program, TOKENS, target=prunella.Params(0.8))
    small = prunella.shrink(program, plan)
    tokens = torch.arange(21).view(3, 7) % 11
    torch.testing.assert_close(program(tokens), model(tokens))
    assert small(tokens).shape == (3, 7, 11) and small(tokens[:1]).shape == (1, 7, 11)


def test_a_shrunk_program_learns() -> None:
    program = prunella.as_program(settle(Tied()), TOKENS)
    optimizer = torch.optim.AdamW(program.parameters(), lr=1e-2)
    program(TOKENS).square().mean().backward()
    optimizer.step()
    plan = prunella.plan(program, TOKENS, target=prunella.Params(0.8))
    small = prunella.shrink(program, plan)
    assert verify(program, small, plan.changes, TOKENS).error <= 1e-9
    prunella.transform.carry_(optimizer, program, small, plan)
    before = small.get_parameter("down.weight").detach().clone()
    loss = small(TOKENS).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    assert small.get_parameter("up.weight").grad is None and small.get_parameter("down.weight").grad is not None
    assert not torch.equal(before, small.get_parameter("down.weight"))
    assert small(TOKENS).square().mean() < loss
