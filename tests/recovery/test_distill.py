from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from prunella.errors import RequestError
from prunella.recovery.distill import distill, distill_features, distill_logits


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
