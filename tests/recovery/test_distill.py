from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from prunella.errors import RequestError
from prunella.recovery.distill import (
    distill,
    distill_attention,
    distill_attention_probabilities,
    distill_features,
    distill_logits,
)


class _Fixed(nn.Module):
    """Returns its parameter, whatever the batch."""

    def __init__(self, logits: list[list[float]]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.logits


def _net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Dropout(0.5), nn.Linear(6, 3))


def test_kl_by_hand() -> None:
    """Teacher softmax(ln 9, 0) at T = 2 is (3/4, 1/4), the student's is (1/2, 1/2)."""
    teacher, student = _Fixed([[2.1972245773362196, 0.0]]), _Fixed([[1.0, 1.0]])
    value = distill_logits(teacher, temperature=2.0)(student, torch.zeros(1))
    p = torch.tensor([0.75, 0.25], dtype=torch.float64)
    assert value.item() == pytest.approx(4 * float((p * (p / 0.5).log()).sum()), rel=1e-12)


def test_the_gradient_is_t_times_the_difference_of_the_probabilities() -> None:
    """d(T^2 KL)/dz = T (softmax(z/T) - softmax(z_teacher/T)), averaged over the rows."""
    teacher, student = _Fixed([[1.0, 2.0, 0.0], [0.0, 0.0, 3.0]]), _Fixed([[0.5, 0.0, 0.0], [1.0, 2.0, 3.0]])
    distill_logits(teacher, temperature=3.0)(student, torch.zeros(1)).backward()
    expected = 3.0 * ((student.logits / 3).softmax(-1) - (teacher.logits / 3).softmax(-1)) / 2
    torch.testing.assert_close(student.logits.grad, expected.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_equal_logits_give_no_loss_and_no_gradient(temperature: float) -> None:
    teacher, student = _Fixed([[1.0, -2.0, 0.3]]), _Fixed([[1.0, -2.0, 0.3]])
    value = distill_logits(teacher, temperature=temperature)(student, torch.zeros(1))
    value.backward()
    assert abs(value.item()) < 1e-15 and student.logits.grad is not None
    assert student.logits.grad.abs().max() < 1e-15


@pytest.mark.parametrize("make", [distill_logits, lambda t: distill_features(t, ["", "1"])])
def test_the_teacher_runs_in_evaluation_without_gradients_and_is_left_as_it_was(make: object) -> None:
    teacher, student = _net(0).train(), _net(1).eval()
    teacher[1].eval()
    seen: list[tuple[bool, bool]] = []
    teacher[2].register_forward_hook(lambda m, a, o: seen.append((m.training, torch.is_grad_enabled())))
    make(teacher)(student, torch.randn(5, 4)).backward()  # type: ignore[operator]
    assert seen == [(False, False)]
    assert [m.training for m in teacher] == [True, False, True, True]
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in student[0].parameters())


def test_logits_of_any_shape_count_every_position() -> None:
    teacher, student = _Fixed([[1.0, 2.0], [0.0, 3.0]]), _Fixed([[0.0, 1.0], [2.0, 2.0]])
    flat = distill_logits(teacher)(student, torch.zeros(1)).item()
    for net in (teacher, student):
        net.logits = nn.Parameter(net.logits.detach().reshape(1, 2, 1, 2))
    assert distill_logits(teacher)(student, torch.zeros(1)).item() == pytest.approx(flat, rel=1e-12)


def test_relative_feature_error_by_hand() -> None:
    teacher, student = _Fixed([[3.0, 4.0]]), _Fixed([[3.0, 2.0]])
    assert distill_features(teacher)(student, torch.zeros(1)).item() == pytest.approx(4 / 25)


def test_features_of_named_modules_count_alike_whatever_their_scale() -> None:
    teacher, x = _net(0).eval(), torch.randn(5, 4)
    student = copy.deepcopy(teacher)
    assert distill_features(teacher, ["0", "3"])(student, x).item() == 0
    with torch.no_grad():
        student[3].weight.mul_(2)
        student[3].bias.mul_(2)
    assert distill_features(teacher, ["0", "3"])(student, x).item() == pytest.approx(0.5)
    assert distill_features(teacher, ["3"])(student, x).item() == pytest.approx(1.0)


def test_hooks_are_removed_also_when_the_model_fails() -> None:
    teacher, student = _net(0), _net(1)
    loss = distill_features(teacher, ["1"])
    loss(student, torch.randn(2, 4))
    with pytest.raises(RuntimeError):
        loss(student, torch.randn(2, 5))
    assert not any(m._forward_hooks for net in (teacher, student) for m in net.modules())


def test_outputs_says_how_to_read_a_batch_with_labels() -> None:
    teacher, student, x = _net(0).eval(), _net(1).eval(), torch.randn(5, 4)
    loss = distill_logits(teacher, outputs=lambda model, batch: {"logits": model(batch[0])})
    assert loss(student, (x, "label")).item() == distill_logits(teacher)(student, x).item()


def test_distill_brings_the_student_to_the_teacher() -> None:
    teacher, student = _net(0).eval(), _net(1)
    torch.manual_seed(2)
    data = [torch.randn(64, 4) for _ in range(4)]
    before = distill_logits(teacher)(student.eval(), data[0]).item()
    curve = distill(student.train(), teacher, data, steps=60, lr=0.03, imitate=partial(distill_features, names=["3"]))
    assert len(curve.loss) == 60
    assert distill_logits(teacher)(student.eval(), data[0]).item() < 0.5 * before


def test_wrong_requests() -> None:
    teacher, wide = _net(0), nn.Sequential(nn.Linear(4, 2))
    with pytest.raises(RequestError, match="temperature"):
        distill_logits(teacher, temperature=0)
    with pytest.raises(RequestError, match=r"no module is called 'x\.y'"):
        distill_features(teacher, ["x.y"])
    with pytest.raises(RequestError, match="shape"):
        distill_features(teacher, ["0"])(wide, torch.randn(2, 4))
    with pytest.raises(RequestError, match="shape"):
        distill_logits(teacher)(wide, torch.randn(2, 4))
    unused = nn.ModuleDict({"a": nn.Linear(2, 2)})
    unused.forward = lambda x: x  # type: ignore[method-assign, assignment]
    with pytest.raises(RequestError, match="did not run"):
        distill_features(unused, ["a"])(unused, torch.zeros(2))


class _Features(nn.Module):
    """Returns its features through a named module, whatever the batch."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = nn.Parameter(features.double())
        self.out = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.features)
        return out


def test_attention_maps_by_hand_over_different_channels() -> None:
    """Two channels at two positions give (9 + 16, 0), the map (1, 0); one channel of (3, 4) gives (9, 16) / |.|."""
    teacher = _Features(torch.tensor([[[3.0, 0.0], [4.0, 0.0]]]))
    student = _Features(torch.tensor([[[3.0, 4.0]]]))
    found = distill_attention(teacher, ["out"])(student, torch.zeros(1))
    norm = (9**2 + 16**2) ** 0.5
    assert found.item() == pytest.approx((9 / norm - 1) ** 2 + (16 / norm) ** 2, rel=1e-12)
    teacher = _Features(torch.tensor([[[3.0, 1.0], [-4.0, 1.0]]]))  # signs do not cancel: (7, 2)
    found = distill_attention(teacher, ["out"], p=1)(student, torch.zeros(1))
    norm = 53**0.5
    assert found.item() == pytest.approx((3 / 5 - 7 / norm) ** 2 + (4 / 5 - 2 / norm) ** 2, rel=1e-12)


def test_proportional_maps_give_no_loss_and_no_gradient() -> None:
    features = torch.randn(3, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    student = _Features(2 * features)
    value = distill_attention(_Features(features), ["out"])(student, torch.zeros(1))
    value.backward()
    assert value.item() < 1e-28 and student.features.grad is not None and student.features.grad.abs().max() < 1e-14


def test_tokens_have_their_channels_last() -> None:
    features = torch.randn(2, 6, 3, generator=torch.Generator().manual_seed(0))
    first, last = _Features(features.transpose(1, 2)), _Features(features)
    other = torch.rand(2, 6, 3)
    one = distill_attention(first, ["out"])(_Features(other.transpose(1, 2)), torch.zeros(1))
    two = distill_attention(last, ["out"], axis=-1)(_Features(other), torch.zeros(1))
    assert one.item() == pytest.approx(two.item(), rel=1e-12)


def _as_probabilities(model: nn.Module, batch: Tensor) -> list[Tensor]:
    return [model(batch).softmax(-1)]


def test_attention_probabilities_by_hand() -> None:
    logits = torch.tensor([[[[0.0, 0.0]], [[2.0, 1.0]]]])
    teacher, student = _Features(logits), _Features(logits.flip(-1))
    make = partial(distill_attention_probabilities, probabilities=_as_probabilities)
    p = torch.tensor([2.0, 1.0], dtype=torch.float64).softmax(-1)
    expected = float((p * (p / p.flip(0)).log()).sum()) / 2
    assert make(teacher)(student, torch.zeros(1)).item() == pytest.approx(expected, rel=1e-12)
    one = _Features(logits[:, :1])
    mean = (p + 0.5) / 2
    expected = float((mean * (mean / 0.5).log()).sum())
    assert make(teacher)(one, torch.zeros(1)).item() == pytest.approx(expected, rel=1e-12)
    same = _Features(logits)
    value = make(teacher)(same, torch.zeros(1))
    value.backward()
    assert abs(value.item()) < 1e-15 and same.features.grad is not None and same.features.grad.abs().max() < 1e-15
    with pytest.raises(RequestError, match="one to one"):
        distill_attention_probabilities(teacher, probabilities=lambda m, b: [torch.ones(1)] * (1 + (m is teacher)))(
            student, torch.zeros(1)
        )


@pytest.mark.filterwarnings("ignore")
def test_attention_probabilities_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 20}
    config = transformers.BertConfig(vocab_size=30, **sizes)
    torch.manual_seed(0)
    teacher = transformers.BertModel._from_config(config, attn_implementation="eager").eval()
    student = transformers.BertModel._from_config(config, attn_implementation="eager").train()
    batch = {"input_ids": torch.arange(12).view(2, 6)}
    loss = distill_attention_probabilities(teacher)
    assert loss(teacher, batch).item() == pytest.approx(0, abs=1e-7)
    value = loss(student, batch)
    value.backward()
    assert value > 1e-6 and student.encoder.layer[0].attention.self.query.weight.grad.abs().sum() > 0
    fused = transformers.BertModel._from_config(config, attn_implementation="sdpa")
    with pytest.raises(RequestError, match="no attention probabilities"):
        loss(_Blind(fused), batch)


class _Blind(nn.Module):
    """A model that returns no attentions, whatever is asked."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, output_attentions: bool = False) -> object:
        return self.model(input_ids=input_ids)


def test_maps_of_what_has_no_positions_are_refused() -> None:
    teacher = _net(0)
    with pytest.raises(RequestError, match="no positions"):
        distill_attention(teacher, ["0"])(teacher, torch.randn(2, 4))
    with pytest.raises(RequestError, match="out of range"):
        distill_attention(teacher, ["0"], p=0)
