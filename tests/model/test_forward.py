from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunella.errors import NotSupported, RequestError
from prunella.model.batches import batches
from prunella.model.forward import first_tensor, forward, outputs_of
from prunella.model.trees import tensors


class _Takes(nn.Module):
    def forward(self, a: Any, b: Any = None) -> tuple[Any, Any]:
        return a, b


def test_the_batch_decides_how_the_model_is_called() -> None:
    x, y, model = torch.ones(1), torch.zeros(1), _Takes()
    assert forward(model, {"b": x, "a": y}) == (y, x)
    assert forward(model, (x, y)) == (x, y)
    assert forward(model, x) == (x, None)
    assert forward(model, [x, y]) == ([x, y], None)


def test_tensors_are_found_in_order_and_the_rest_is_ignored() -> None:
    a, b, c = (torch.tensor(float(i)) for i in range(3))
    assert [float(t) for t in tensors({"x": a, "y": (b, [c, "no"], None, 3)})] == [0, 1, 2]
    assert first_tensor([None, {"z": b}]) is b


def test_tensors_of_a_transformers_output() -> None:
    outputs = pytest.importorskip("transformers.modeling_outputs")
    hidden, pooled = torch.zeros(1), torch.ones(1)
    found = tensors(outputs.BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=pooled))
    assert found[0] is hidden and found[1] is pooled and len(found) == 2


def test_an_output_without_a_tensor_is_refused() -> None:
    with pytest.raises(NotSupported, match="without a tensor"):
        first_tensor({"loss": 3.0})


def test_no_batches_is_an_error() -> None:
    with pytest.raises(RequestError, match="no batches"):
        list(batches([]))
    assert list(batches([1, 2])) == [1, 2]


def test_forward_passes_gradients() -> None:
    x = torch.ones(2, requires_grad=True)
    out: Tensor = forward(nn.Linear(2, 1), x)
    out.sum().backward()
    assert x.grad is not None


class Lazily(nn.Module):
    """Returns a generator and an iterator: what they give is computed when it is taken."""

    def forward(self, x: Tensor) -> Any:
        return {"scaled": (x * k for k in (1, 2)), "listed": iter([x + 1])}


def test_what_generators_and_iterators_give_is_output() -> None:
    x = torch.randn(2, 3)
    outputs = outputs_of(Lazily(), x)
    assert len(outputs) == 3 and all(torch.equal(a, b) for a, b in zip(outputs, (x, 2 * x, x + 1), strict=True))
