"""What can be scored can be solved and recovered, by whatever operation a weight is read."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prunella as pr
from prunella.solvers import Solved
from tests.hand import hand_plan

Operation = Callable[[Tensor, Tensor, Tensor], Tensor]


class Net(nn.Module):
    """A layer whose outputs can be pruned, a weight that reads them in some way, and what follows."""

    def __init__(self, first: nn.Module, operation: Operation, weight: tuple[int, ...], bias: tuple[int, ...]) -> None:
        super().__init__()
        self.first, self.operation = first, operation
        self.weight, self.bias = nn.Parameter(torch.randn(weight) / 3), nn.Parameter(torch.randn(bias))

    def forward(self, x: Tensor) -> Tensor:
        return self.operation(torch.relu(self.first(x)), self.weight, self.bias)


class Attention(nn.Module):
    """Attention behind a layer whose outputs can be pruned: queries from elsewhere, keys and values from it."""

    def __init__(self, *, itself: bool) -> None:
        super().__init__()
        self.first, self.itself = nn.Linear(6, 8), itself
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return self.attend(x if self.itself else 2 * x, x, x, need_weights=False)[0]  # type: ignore[no-any-return]


class Tied(nn.Module):
    """One weight that reads two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 5), nn.Linear(8, 5)
        self.two.weight = self.one.weight
        self.two.bias = self.one.bias

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return self.one(x) + self.two(x.square()).tanh()  # type: ignore[no-any-return]


LINEAR = (nn.Linear, (6, 8), (4, 7, 6))
IMAGE = (nn.Conv2d, (2, 8, 3), (3, 2, 7, 6))
LINE = (nn.Conv1d, (2, 8, 3), (3, 2, 9))
VOLUME = (nn.Conv3d, (2, 8, 1), (2, 2, 4, 5, 3))
OPERATIONS = {
    "linear": (LINEAR, F.linear, (5, 8), (5,)),
    "matmul": (LINEAR, lambda x, w, b: x @ w + b, (8, 5), (5,)),
    "from the left": (LINEAR, lambda x, w, b: (w @ x.mT).mT + b, (5, 8), (5,)),
    "addmm": (LINEAR, lambda x, w, b: torch.addmm(b, x.flatten(0, 1), w), (8, 5), (5,)),
    "einsum": (LINEAR, lambda x, w, b: torch.einsum("bti,oi->bot", x, w) + b[:, None], (5, 8), (5,)),
    "bmm": (LINEAR, lambda x, w, b: torch.bmm(x.flatten(0, 1).expand(3, -1, -1), w) + b, (3, 8, 5), (5,)),
    "conv1d": (LINE, partial(F.conv1d, padding=1), (5, 8, 3), (5,)),
    "conv2d": (IMAGE, partial(F.conv2d, stride=2, padding=(1, 0), dilation=(1, 2)), (5, 8, 3, 2), (5,)),
    "same": (IMAGE, partial(F.conv2d, padding="same"), (5, 8, 3, 3), (5,)),
    "groups": (IMAGE, partial(F.conv2d, groups=2), (6, 4, 2, 2), (6,)),
    "conv3d": (VOLUME, partial(F.conv3d, padding=1), (5, 8, 2, 3, 1), (5,)),
    "conv_transpose1d": (LINE, partial(F.conv_transpose1d, stride=2, output_padding=1), (8, 5, 3), (5,)),
    "conv_transpose2d": (IMAGE, partial(F.conv_transpose2d, stride=2, padding=1), (8, 5, 3, 3), (5,)),
    "conv_transpose3d": (VOLUME, F.conv_transpose3d, (8, 5, 2, 1, 2), (5,)),
    "transposed groups": (IMAGE, partial(F.conv_transpose2d, groups=2), (8, 3, 2, 2), (6,)),
}


def made(name: str) -> tuple[nn.Module, list[Tensor], str]:
    """A model, data, and the weight that is looked at."""
    torch.manual_seed(0)
    if name in OPERATIONS:
        (kind, sizes, shape), operation, weight, bias = OPERATIONS[name]
        return Net(kind(*sizes), operation, weight, bias).eval(), [torch.randn(shape) for _ in range(3)], "weight"
    data = [torch.randn(4, 7, 6) for _ in range(3)]
    if name == "tied":
        return Tied().eval(), data, "one.weight"
    return Attention(itself=name == "attention").eval(), data, "attend.in_proj_weight"


NAMES = (*OPERATIONS, "tied", "attention")


@pytest.mark.parametrize("name", NAMES)
def test_it_is_scored(name: str) -> None:
    model, data, weight = made(name)
    recipe = pr.Recipe(pr.wanda, pr.Element())
    plan = pr.plan(model, data[0], recipe, target=pr.Sparsity(0.5), data=data)
    assert not bool(plan.masks[weight].all())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", [pr.solvers.sparsegpt, pr.solvers.admm])
def test_it_is_solved(name: str, method: Callable[..., Solved]) -> None:
    """The solver's answer errs less than the same weights set to zero."""
    model, data, weight = made(name)
    dense, plain = copy.deepcopy(model), copy.deepcopy(model)
    layers = ["first"]
    done = pr.llm.solve_(model, data[0], pr.llm.OneShot(sparsity=0.5, method=method), data=data, skip=layers)
    scored = pr.llm.OneShot(sparsity=0.5, method=partial(pr.solvers.by_score, score=lambda w, norm: w.abs()))
    pr.llm.solve_(plain, data[0], scored, data=data, skip=layers)
    (fit,) = [fit for fit in done.fits if fit.name in (weight, weight.removesuffix(".weight"))]
    assert not fit.skipped and 0 < fit.error < 1
    assert abs(float((model.get_parameter(weight) == 0).float().mean()) - 0.5) < 0.05
    with torch.no_grad():
        errors = [sum(float((m(x) - dense(x)).square().sum()) for x in data) for m in (model, plain)]
    assert 0 < errors[0] < errors[1]


@pytest.mark.parametrize("name", (*NAMES, "cross attention"))
def test_it_is_recovered(name: str) -> None:
    """Least squares never raises the error of the output, and lowers it here."""
    dense, data, weight = made(name)
    if "attention" in name:  # its sizes cannot be followed: masks alone
        kept = torch.tensor([0, 2, 3, 5, 7])
        plan = hand_plan(cuts={"first.weight": {0: kept}, "first.bias": {0: kept}, weight: {1: kept}})
        models = [pr.apply_(copy.deepcopy(dense), plan)]
    else:
        plan = pr.plan(dense, data[0], pr.Recipe(pr.magnitude), target=pr.Sparsity(0.4), only=["first"])
        models = [pr.shrink(dense, plan), pr.apply_(copy.deepcopy(dense), plan)]
    _recovered(models, dense, data, plan, weight)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ("einsum", "conv_transpose2d", "attention", "cross attention"))
def test_it_is_recovered_in_a_program(name: str) -> None:
    """Operations below autograd are in the table too, so that a captured program is read like its source."""
    model, data, weight = made(name)
    dense = pr.as_program(model, data[0])
    plan = pr.plan(dense, data[0], pr.Recipe(pr.magnitude), target=pr.Sparsity(0.3), only=["first"])
    _recovered([pr.shrink(dense, plan)], dense, data, plan, weight)


def _recovered(models: list[nn.Module], dense: nn.Module, data: list[Tensor], plan: pr.Plan, weight: str) -> None:
    for model in models:
        with torch.no_grad():
            before = sum(float((model(x) - dense(x)).square().sum()) for x in data)
        (fit,) = [fit for fit in pr.reconstruct(model, dense, data, plan, ridge=1e-6).fits if fit.name == weight]
        assert not fit.skipped and fit.after < fit.before
        with torch.no_grad():
            after = sum(float((model(x) - dense(x)).square().sum()) for x in data)
        assert after < before
