"""Neurons chosen for each token: exact at 100 %, by hand below, and by a predictor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import prunella as pr
from prunella.tokens.contextual import contextual_, keep_top


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(torch.tanh(self.up(x)))
        return out


def test_two_tokens_by_hand() -> None:
    hidden = torch.tensor([[3.0, -4.0, 1.0, 0.5], [0.0, 1.0, -2.0, 3.0]])
    assert keep_top(hidden, 0.5).tolist() == [[3.0, -4.0, 0.0, 0.0], [0.0, 0.0, -2.0, 3.0]]
    assert keep_top(hidden, 0.3, -hidden).tolist() == [[0.0, -4.0, 0.0, 0.5], [0.0, 0.0, -2.0, 0.0]]
    assert keep_top(hidden, 1.0) is hidden
    with pytest.raises(pr.PruningError, match="fraction of the neurons"):
        keep_top(hidden, 0.0)


def test_all_neurons_are_the_dense_model_and_all_comes_back() -> None:
    torch.manual_seed(0)
    model, x = Mlp().eval(), torch.randn(2, 7, 4)
    dense = model(x)
    with contextual_(model, x, keep=1.0) as paths:
        assert paths == ("down",) and torch.equal(model(x), dense)
    inner = torch.tanh(model.up(x))
    with contextual_(model, x, keep=0.3):
        kept = inner.abs() >= inner.abs().sort(-1, descending=True).values[..., 2:3]
        torch.testing.assert_close(model(x), model.down(inner * kept))
    assert torch.equal(model(x), dense)


def test_a_predictor_that_knows_is_the_oracle() -> None:
    torch.manual_seed(0)
    model, x = Mlp().eval(), torch.randn(2, 7, 4)
    with contextual_(model, x, keep=0.4):
        oracle = model(x)
    with contextual_(model, x, keep=0.4, predictors={"down": lambda v: (v @ model.up.weight.T + model.up.bias).abs()}):
        torch.testing.assert_close(model(x), oracle)
    with contextual_(model, x, keep=0.4, predictors={"down": lambda v: -(v @ model.up.weight.T).abs()}):
        assert not torch.allclose(model(x), oracle)


def test_requests_that_make_no_sense_are_refused() -> None:
    model, x = Mlp().eval(), torch.randn(7, 4)
    with (
        pytest.raises(pr.PruningError, match="reads no neurons"),
        contextual_(model, x, keep=0.5, predictors={"a": abs}),
    ):
        pass
    with pytest.raises(pr.PruningError, match="no neurons"), contextual_(nn.Linear(4, 2), x, keep=0.5):
        pass
