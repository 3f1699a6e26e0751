"""Paths through sparse networks: by hand, and against trying every weight."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import prunella as pr
from tests.graphs import Attention, convnet, images, mlp


def masked(model: nn.Module, density: float, seed: int) -> nn.Module:
    """The model with random zeros in its weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(torch.rand(parameter.shape, generator=generator) < density)
    return model


def by_trying(model: nn.Module, inputs: Tensor) -> dict[str, Tensor]:
    """Make all weights and inputs positive, so that nothing cancels, then zero one weight at a time and look."""
    model = copy.deepcopy(model).double().eval()
    generator = torch.Generator().manual_seed(0)
    found = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            size = torch.rand(parameter.shape, generator=generator, dtype=torch.float64) + 0.5
            parameter.copy_((parameter != 0) * size if "weight" in name else torch.zeros_like(parameter))
        x = torch.rand(inputs.shape, generator=generator, dtype=torch.float64) + 0.5
        dense = model(x)
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                continue
            used = torch.zeros(parameter.shape, dtype=torch.bool)
            for at in parameter.nonzero().tolist():
                kept = parameter[tuple(at)].clone()
                parameter[tuple(at)] = 0
                used[tuple(at)] = not torch.allclose(model(x), dense, rtol=1e-12, atol=0)
                parameter[tuple(at)] = kept
            found[name] = used
    return found


class Residual(nn.Module):
    """Two blocks on one stream: a unit may be written by the second block only, after the first has read it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(3, 5), nn.Linear(5, 2)
        self.up, self.down = (nn.ModuleList(nn.Linear(5, 5) for _ in range(2)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(up(x).relu())
        return self.head(x)  # type: ignore[no-any-return]


def by_hand() -> nn.Sequential:
    """2 -> 2 -> 2. Hidden unit 1 has no input, output 1 reads nothing but it."""
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -1.0], [0.0, 0.0]]))  # type: ignore[operator]
        model[2].weight.copy_(torch.tensor([[1.0, 1.0], [0.0, 1.0]]))  # type: ignore[operator]
    return model


def test_two_layers_by_hand() -> None:
    found = pr.metrics.effective_sparsity(by_hand(), torch.randn(3, 2))
    assert (found.direct, found.effective) == (3 / 8, 5 / 8) and found.compression == 8 / 3
    assert found.masks["2.weight"].tolist() == [[True, False], [False, False]]
    assert [(row.kept, row.effective, row.units, row.dead) for row in found.rows] == [(2, 2, 2, 1), (3, 1, 2, 1)]
    assert "62.50% effective; 2 dead units" in str(found) and found.unfollowed == ()


def test_a_unit_that_reaches_no_output_takes_its_weights_along() -> None:
    model = by_hand()
    with torch.no_grad():
        model[0].weight.fill_(1)  # type: ignore[operator, union-attr]
        model[2].weight.copy_(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))  # type: ignore[operator]
    assert pr.metrics.effective_sparsity(model, torch.randn(3, 2)).masks["0.weight"].tolist() == [
        [True, True],
        [False, False],
    ]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("make", [Residual, lambda: mlp(6)], ids=["residual", "mlp"])
def test_it_is_what_trying_every_weight_finds(make: type[Residual], seed: int) -> None:
    torch.manual_seed(seed)
    model = masked(make(), 0.25, seed)
    x = torch.randn(2, next(model.parameters()).shape[1])
    found, wanted = pr.metrics.effective_sparsity(model, x).masks, by_trying(model, x)
    assert found.keys() == wanted.keys() and all(found[name].equal(wanted[name]) for name in wanted)
    assert sum(int(mask.sum()) for mask in wanted.values()) < sum(int((p != 0).sum()) for p in model.parameters())


class Convolutions(nn.Module):
    """Grouped and transposed convolutions beside each other, joined by a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.grouped = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 1, groups=2)
        self.turned, self.last = nn.ConvTranspose2d(4, 6, 1, groups=2), nn.Conv2d(10, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        x = torch.cat([self.grouped(x), self.turned(x)], 1)
        return self.last(nn.functional.max_pool2d(x, 2))  # type: ignore[no-any-return]


@pytest.mark.parametrize("seed", range(3))
def test_groups_transposed_and_concatenated(seed: int) -> None:
    torch.manual_seed(seed)
    model, x = masked(Convolutions(), 0.4, seed), torch.randn(1, 2, 2, 2)
    found, wanted = pr.metrics.effective_sparsity(model, x), by_trying(model, x)
    # a maximum hides what is smaller, so that trying finds less than there is for spatial reasons only
    assert all(bool((found.masks[name] | ~wanted[name]).all()) for name in wanted) and not found.unfollowed
    assert found.masks["first.weight"].equal(wanted["first.weight"])


def test_a_dense_network_has_no_dead_weight_and_stays_as_it_was() -> None:
    model = convnet()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = pr.metrics.effective_sparsity(model, images()[0])
    assert found.effective == 0 and found.dead == 0 and not found.unfollowed and model.training
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_scale_of_zero_closes_a_channel() -> None:
    model = convnet()
    with torch.no_grad():
        model[1].weight[2] = 0  # type: ignore[union-attr, index]
    found = pr.metrics.effective_sparsity(model, images()[0])
    assert not found.masks["0.weight"][2].any() and not found.masks["3.weight"][:, 2].any()
    assert found.masks["0.weight"][[0, 1, 3]].all()


def test_attention_connects_what_it_mixes() -> None:
    found = pr.metrics.effective_sparsity(Attention(), torch.randn(2, 3, 8))
    assert found.effective == 0 and not found.unfollowed


class Spelled(nn.Module):
    """Products of many spellings, one after the other, and a weight that is read twice."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"weight_a": (4, 5), "weight_b": (5, 2, 3), "weight_c": (2, 3, 4), "weight_d": (6, 4)}
        for name, size in sizes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(size)))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = (x @ self.weight_a).relu()
        x = torch.einsum("ti,ihd->htd", x, self.weight_b).relu()
        x = torch.bmm(x, self.weight_c).sum(0)
        x = x @ self.weight_d.t() + torch.nn.functional.linear(x.square(), self.weight_d)
        return self.head(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("seed", range(4))
def test_products_of_any_spelling_are_followed(seed: int) -> None:
    torch.manual_seed(seed)
    model, x = masked(Spelled(), 0.4, seed), torch.randn(2, 4)
    found, wanted = pr.metrics.effective_sparsity(model, x), by_trying(model, x)
    assert found.unfollowed == () and all(found.masks[name].equal(wanted[name]) for name in wanted)
    assert found.effective > found.direct
    assert {row.name: row.units for row in found.rows} == {
        "weight_a": 5, "weight_b": 6, "weight_c": 8, "weight_d": 6, "head.weight": 3,
    }  # fmt: skip


def test_a_table_that_is_the_head_as_well() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.inner, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.table.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.inner(self.table(x))))  # type: ignore[no-any-return]

    model = Net()
    with torch.no_grad():
        model.inner.weight[:, 0] = 0  # nothing reads the first column of the table but the head
        model.inner.weight[1] = 0  # and nothing writes what the head reads of the second
    found = pr.metrics.effective_sparsity(model, torch.tensor([[1, 2, 3]]))
    assert found.unfollowed == () and [row.units for row in found.rows] == [4 + 7, 4]
    assert bool(found.masks["table.weight"].all()) and not bool(found.masks["inner.weight"][1].any())


@pytest.mark.parametrize("same", [True, False])
def test_heads_that_nothing_reads_are_on_no_path(same: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            other = x if same else x + 1
            made, weights = self.attend(x, other, other)
            return torch.cat([made, weights @ made], -1)

    model = Net()
    with torch.no_grad():
        model.attend.out_proj.weight[:, :4] = 0  # all that the first head gives
    found = pr.metrics.effective_sparsity(model, torch.randn(2, 3, 8))
    assert found.unfollowed == () and bool(found.masks["attend.out_proj.weight"][:, 4:].all())
    values = found.masks["attend.in_proj_weight"].view(3, 2, 4, 8)[2]
    assert not bool(values[0].any()) and bool(values[1].all())
    assert [row.units for row in found.rows] == [24, 8]


def test_calls_that_hide_their_weights_are_named_with_the_reason() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.recurrent, self.head = nn.LSTM(3, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.recurrent(x)[0])  # type: ignore[no-any-return]

    found = pr.metrics.effective_sparsity(Net(), torch.randn(5, 2, 3))
    assert found.unfollowed[0] == "lstm (its steps run inside one call, which hides them)"


class Odd(nn.Module):
    """A call without a rule between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.cumsum(self.a(x), -1))  # type: ignore[no-any-return]


def test_what_cannot_be_followed_is_connected_and_named() -> None:
    model = Odd()
    with torch.no_grad():
        model.a.weight[1] = 0
    found = pr.metrics.effective_sparsity(model, torch.randn(2, 3))
    assert found.unfollowed == ("cumsum",) and bool(found.masks["b.weight"].all())
    assert "taken as connected: cumsum" in str(found)


def test_a_model_without_weights_is_refused() -> None:
    with pytest.raises(pr.PruningError, match="no weights"):
        pr.metrics.effective_sparsity(nn.ReLU(), torch.randn(2, 3))
