"""`sparse` keeps what is faster, says so, and gives a model that computes the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional

import prunella as pr
from prunella.errors import CheckFailed, RequestError
from prunella.measure.timing import Ratio
from prunella.runtime import convert, operators
from prunella.runtime.fx.fuse import Fused, fuse_, traced
from prunella.runtime.kernels import library
from prunella.runtime.kernels.config import DOT_ROWS, Activation, Config, Kind, Precision
from prunella.runtime.layers import FastLinear, FoldedConv2d, SparseConv2d, SparseLinear
from prunella.runtime.record import LayerRecord
from prunella.runtime.restore import restored
from prunella.runtime.tuning import acceptance, eligible, tune
from prunella.runtime.tuning.choice import Geometry, Problem, Route, is_dense
from prunella.runtime.tuning.tune import Tuner, Verdict, configs_for
from tests.runtime.standin import Calls


def with_zeros(model: nn.Module, part: float = 0.8, seed: int = 0) -> nn.Module:
    """The model in eval mode with so many of its weights zero, and batch norms that do something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name and "wte" not in name:
                parameter.mul_(torch.rand(parameter.shape, generator=generator) > part)
        for _, tensor in [*model.named_buffers(), *model.named_parameters()]:
            if tensor.is_floating_point() and tensor.dim() == 1:
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model.eval()


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return with_zeros(nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5)))


class Block(nn.Module):
    """A residual block as ResNet has it: convolution, norm, in-place ReLU, a shortcut that is added in place."""

    def __init__(self, wide: int = 8, *, tangled: bool = False) -> None:
        super().__init__()
        self.one, self.first = nn.Conv2d(wide, wide, 3, padding=1, bias=False), nn.BatchNorm2d(wide)
        self.two, self.second = nn.Conv2d(wide, wide, 1), nn.BatchNorm2d(wide)
        self.side, self.act, self.tangled = nn.Conv2d(wide, wide, 1), nn.ReLU(inplace=True), tangled

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.first(self.one(x)))
        z = self.second(self.two(y))
        z += self.side(x)
        return self.act(z) + y if self.tangled else self.act(z)


def net(*, tangled: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return with_zeros(nn.Sequential(Block(tangled=tangled), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)))


class Stem(nn.Module):
    """Dense convolutions with batch norms, one in groups and one with a shortcut, ahead of a layer with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(8, 8, 3, padding="same", groups=4, bias=False), nn.BatchNorm2d(8)
        self.second, self.other = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.silu(self.norm(self.first(x)))
        made: Tensor = self.last(torch.relu(self.other(self.second(y)) + y))
        return made


def stem() -> nn.Module:
    torch.manual_seed(0)
    model = Stem()
    dense = copy.deepcopy([model.first.weight, model.second.weight])
    with_zeros(model)
    with torch.no_grad():
        for layer, weight in zip((model.first, model.second), dense, strict=True):
            layer.weight.copy_(weight)
    return model


X, IMAGE = torch.linspace(-1, 1, 6 * 12).view(6, 12), torch.linspace(-2, 2, 2 * 8 * 25).view(2, 8, 5, 5)


@pytest.mark.usefixtures("eager_to_skip", "kernels")
@pytest.mark.parametrize(("make", "x"), [(mlp, X), (net, IMAGE), (lambda: net(tangled=True), IMAGE)])
@pytest.mark.parametrize("fuse", [True, False])
def test_the_output_is_that_of_the_dense_model(make: Callable[[], nn.Module], x: Tensor, fuse: bool) -> None:
    model = make()
    before = copy.deepcopy(model.state_dict())
    made = pr.sparse(model, x, fuse=fuse)
    other = x.flip(0).repeat(2, *[1] * (x.dim() - 1))
    for given in (x, other):
        with torch.no_grad():
            want = copy.deepcopy(model).double()(given.double())
            torch.testing.assert_close(made(given).double(), want, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(copy.deepcopy(made)(given), made(given))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())
    record = pr.runtime.sparsified(made)
    assert record.outcome.kept and record.outcome.difference < 1e-5 and len(record.replaced) == len(record.layers) >= 3
    assert isinstance(made, GraphModule) == fuse and pr.runtime.sparsified(copy.deepcopy(made)) == record
    assert not any(isinstance(module, nn.Linear | nn.Conv2d) for module in made.modules())


@pytest.mark.usefixtures("eager_to_skip", "kernels")
def test_the_only_reader_of_a_layer_is_fused() -> None:
    made = pr.sparse(net(), IMAGE)
    block = made.get_submodule("0")
    one, two, side = (getattr(block, name) for name in ("one", "two", "side"))
    assert one.norm_path == "0.first" and one.activation is Activation.RELU
    assert two.norm_path == "0.second" and two.activation is Activation.RELU
    assert side.norm is None and side.activation is Activation.NONE
    steps = [str(node.target) for node in made.graph.nodes if node.op == "call_module"]  # type: ignore[union-attr]
    inside = [str(node.target) for node in made.graph.nodes if node.op == "get_attr"]  # type: ignore[union-attr]
    assert steps == ["chain_0", "1", "2", "3"] and inside == ["0.one", "0.side", "0.two"]


@pytest.mark.usefixtures("eager_to_skip", "kernels")
def test_batch_norms_are_folded_into_the_dense_convolutions_of_a_trace_too() -> None:
    model = stem()
    made = pr.sparse(model, IMAGE)
    first, second = made.get_submodule("first"), made.get_submodule("second")
    assert isinstance(first, FoldedConv2d) and isinstance(second, FoldedConv2d)
    assert first.activation is Activation.SILU and second.activation is Activation.RELU and first.groups == 4
    steps = [str(node.target) for node in made.graph.nodes if node.op == "call_module"]  # type: ignore[union-attr]
    assert steps == ["first", "second", "last"] and pr.runtime.sparsified(made).replaced == ("last",)
    torch.testing.assert_close(made(IMAGE), model(IMAGE), rtol=1e-4, atol=1e-5)
    assert torch.equal(first.weight, model.get_parameter("first.weight"))
    again = restored(made)
    assert {n: t.tolist() for n, t in again.state_dict().items()} == {
        n: t.tolist() for n, t in model.state_dict().items()
    }
    assert pr.sparse(model, IMAGE, fuse=False).get_submodule("first").weight.shape == (8, 2, 3, 3)


@pytest.mark.usefixtures("eager_to_skip", "kernels")
@pytest.mark.parametrize("affine", [True, False])
def test_a_norm_is_folded_once_and_one_without_a_scale_stays(monkeypatch: pytest.MonkeyPatch, affine: bool) -> None:
    torch.manual_seed(0)
    dense, part = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3)
    model = nn.Sequential(
        dense, nn.BatchNorm2d(8, affine=affine), with_zeros(part), nn.BatchNorm2d(8, affine=affine)
    ).eval()
    made, folds = pr.sparse(model, IMAGE), list[int]()
    folded = operators.fold_batchnorm
    monkeypatch.setattr(operators, "fold_batchnorm", lambda *args: folds.append(1) or folded(*args))
    fresh = copy.deepcopy(made)
    held = [fresh(IMAGE) for _ in range(3)]  # held, so that no memory is used again
    torch.testing.assert_close(held[-1], model(IMAGE), rtol=1e-4, atol=1e-5)
    joined = [isinstance(made.get_submodule("0"), FoldedConv2d), made.get_submodule("2").norm is not None]
    assert joined == [affine, affine] and len(folds) == (2 if affine else 1)  # without a norm the weight as it is


@pytest.mark.usefixtures("eager_to_skip", "kernels")
def test_a_folded_norm_follows_its_tensors_and_its_mode() -> None:
    model = stem()
    made = pr.sparse(model, IMAGE)
    made(IMAGE)
    for change in (
        lambda part, norm: part.get_parameter("first.weight").mul_(-2),
        lambda part, norm: norm.running_mean.add_(1.5),
        lambda part, norm: norm.bias.sub_(0.5),
    ):
        with torch.no_grad():
            change(model, model.norm)
            change(made, made.get_submodule("first").norm)
        torch.testing.assert_close(made(IMAGE), model(IMAGE), rtol=1e-4, atol=1e-5)
    made.requires_grad_(True)
    y = made.get_submodule("first")(IMAGE)  # with gradients it is the convolution and the norm that it was made from
    want = functional.silu(model.norm(model.first(IMAGE)))  # type: ignore[operator]
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-6)
    grads = [torch.autograd.grad(out.square().sum(), part.get_parameter("first.weight"))[0] for out, part in
             ((y, made), (want, model))]  # fmt: skip
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        mean = functional.batch_norm(
            functional.conv2d(IMAGE, model.first.weight, None, padding="same", groups=4),  # type: ignore[arg-type,union-attr]
            None, None, model.norm.weight, model.norm.bias, training=True,  # type: ignore[arg-type,union-attr]
        )  # fmt: skip
        torch.testing.assert_close(made.train().get_submodule("first")(IMAGE), functional.silu(mean))


@pytest.mark.usefixtures("eager_to_skip", "kernels")
def test_what_is_read_twice_is_not_fused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(12, 12), nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            y = self.up(x)
            return torch.relu(y) + self.down(torch.relu(self.down(y)))

    torch.manual_seed(0)
    model = with_zeros(Twice())
    made = pr.sparse(model, X)
    assert made.get_submodule("up").activation is Activation.NONE  # `y` has two readers
    assert made.get_submodule("down").activation is Activation.NONE  # called twice
    torch.testing.assert_close(made(X), model(X))


@pytest.mark.usefixtures("eager_to_skip", "kernels")
def test_a_residual_of_another_shape_or_a_changed_input_is_not_fused() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.other = nn.Linear(12, 12), nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            y = self.up(x) + x[:1]
            x = x * 1
            z = self.other(x)
            x.add_(1)
            return torch.relu(y + (z + x))

    torch.manual_seed(0)
    model = with_zeros(Wide())
    made = pr.sparse(model, X)
    torch.testing.assert_close(made(X), model(X))
    inputs = {str(node.target): len(node.args) for node in made.graph.nodes if node.op == "call_module"}  # type: ignore[union-attr]
    assert inputs["up"] == 1
    torch.testing.assert_close(pr.sparse(model, X[:1])(X), model(X))


def test_gelu_by_tanh_is_another_function() -> None:
    layers = nn.Sequential(nn.Linear(12, 12), nn.GELU(approximate="tanh")).eval()
    program = traced(layers, {"0": layers[0]}, X)
    assert program is not None
    seen: list[Fused] = []
    fuse_(program, lambda name, fused: seen.append(fused), {"0": layers[0]})  # type: ignore[func-returns-value]
    assert seen == [Fused()]


class Branch(nn.Module):
    """A feed-forward block behind a branch that only eager code takes; `leak` lets the middle out."""

    def __init__(self, leak: str = "") -> None:
        super().__init__()
        self.up, self.act, self.down, self.leak = nn.Linear(12, 16), nn.SiLU(), nn.Linear(16, 12), leak

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.up(x if x.sum() < 1e9 else -x)
        z = self.act(y)
        z = self.act(self.down(z)) if self.leak == "twice" else self.down(z)
        z = z + y[:, :12] if self.leak == "read" else z
        return z, y if self.leak == "returned" else z


@pytest.mark.parametrize(("leak", "fused"), [("", ["act"]), ("twice", []), ("read", []), ("returned", [])])
@pytest.mark.usefixtures("eager_to_skip", "kernels")
def test_an_activation_that_is_the_only_reader_of_a_layer_is_fused(leak: str, fused: list[str]) -> None:
    torch.manual_seed(0)
    model = with_zeros(Branch(leak))
    made = pr.sparse(model, X)
    assert [m.activation_path for m in made.modules() if isinstance(m, SparseLinear) and m.activation_path] == fused
    for one, other in zip(made(X), model(X), strict=True):
        torch.testing.assert_close(one, other)


def test_nothing_is_kept_that_is_not_faster(kernels: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(packed: Any, x: Tensor, *rest: Any) -> Tensor:
        return x.new_zeros(*x.shape[:-1], len(packed.matrix)).add(sum(float(x.sum()) for _ in range(300)))

    monkeypatch.setattr(library, "linear", slow)
    monkeypatch.setattr(tune, "_onednn", lambda: iter(()))
    made = pr.sparse(mlp(), X, seconds=0.05)
    record = pr.runtime.sparsified(made)
    skips = {v.choice for layer in record.layers for v in layer.verdicts} - {Route.TORCH, Route.CSR}
    assert not skips and all(layer.verdicts for layer in record.layers)


FASTER, SAME, SLOWER = Ratio(1.2, 1.1, 1.3), Ratio(1.0, 0.9, 1.1), Ratio(0.8, 0.7, 0.9)


@pytest.mark.usefixtures("eager_to_skip", "kernels")
@pytest.mark.parametrize(("make", "x", "ratio", "kept"), [
    (lambda: with_zeros(Block()), IMAGE, FASTER, True), (lambda: with_zeros(Block()), IMAGE, SAME, False),
    (lambda: with_zeros(Block()), IMAGE, SLOWER, False),
    (mlp, X, SAME, True),  # other numbers of tokens gain, this one loses nothing
    (mlp, X, SLOWER, False), (mlp, X[:1], SAME, False),
])  # fmt: skip
def test_a_full_model_that_is_not_faster_stays_dense(
    monkeypatch: pytest.MonkeyPatch, make: Callable[[], nn.Module], x: Tensor, ratio: Ratio, kept: bool
) -> None:
    class Measured:
        def __init__(self) -> None:
            self.ratio = ratio

    monkeypatch.setattr(acceptance, "interleaved", lambda runs, **_: Measured())
    made = pr.sparse(make(), x, fuse=False)
    record = pr.runtime.sparsified(made)
    assert (
        record.outcome.kept == kept == any(isinstance(module, SparseConv2d | SparseLinear) for module in made.modules())
    )
    assert kept or ("the full model stays dense" in record.outcome.why and record.replaced == ())


@pytest.mark.usefixtures("eager_to_skip")
def test_a_kernel_that_computes_something_else_is_an_error(kernels: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    right = library.linear
    monkeypatch.setattr(library, "linear", lambda *args: right(*args) * 1.1)
    monkeypatch.setattr(library, "finite_linear", lambda *args: right(*args) * 1.1)
    with pytest.raises(CheckFailed, match="the output of the sparse model differs"):
        pr.sparse(mlp(), X)


def test_without_kernels_torch_does_it(no_kernels: str) -> None:
    torch.manual_seed(0)
    model = with_zeros(nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 64)), 0.98)
    x = torch.randn(32, 256)
    made = pr.sparse(model, x, seconds=0.1)
    torch.testing.assert_close(made(x), model(x), rtol=1e-4, atol=1e-5)
    record = pr.runtime.sparsified(made)
    assert f"kernels: none, only those of torch ({no_kernels})" in str(record)
    choices = {v.choice for layer in record.layers for v in layer.verdicts}
    assert choices <= {Route.TORCH, Route.ONEDNN, Route.CSR}


@pytest.mark.usefixtures("eager_to_skip", "kernels")
def test_layers_that_cannot_be_replaced_say_why() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.full, self.idle, self.hooked = (nn.Linear(12, 12) for _ in range(3))
            self.tied, self.replica = nn.Linear(12, 12), nn.Linear(12, 12)
            self.wide = nn.Linear(12, 12)

        def forward(self, x: Tensor) -> Tensor:
            return self.wide(self.replica(self.tied(self.hooked(self.full(x)))))

    model = with_zeros(Odd())
    nn.init.ones_(model.full.weight)
    model.replica.weight = model.tied.weight
    model.hooked.register_forward_hook(lambda module, args, output: None)
    record = pr.runtime.sparsified(pr.sparse(model, X))
    why = {layer.name: layer.why for layer in record.layers}
    assert why == {
        "full": "it has hardly any zeros", "idle": "the example does not call it",
        "hooked": "it has hooks or a parametrization", "tied": "its weight is tied to another layer's",
        "replica": "its weight is tied to another layer's", "wide": "",
    }  # fmt: skip


def test_a_model_that_cannot_be_followed_keeps_its_modules() -> None:
    model = Branch()
    assert traced(model, {"up": model.up}, X) is None


def test_requests_that_make_no_sense() -> None:
    with pytest.raises(RequestError, match="tokens"):
        pr.sparse(mlp(), X, tokens=[0])
    with pytest.raises(RequestError, match="seconds"):
        pr.sparse(mlp(), X, seconds=-1.0)
    with pytest.raises(RequestError, match="does not run on the example"):
        pr.sparse(mlp(), X[:, :5])
    with pytest.raises(RequestError, match="has no record"):
        pr.runtime.sparsified(mlp())


@pytest.mark.usefixtures("eager_to_skip")
def test_coarser_kernels_only_if_asked(kernels: Calls) -> None:
    pr.sparse(mlp(), X)
    assert not any("bf16" in call or "int8" in call for call in kernels)
    pr.sparse(mlp(), X, precision=Precision.INT8)
    assert any("int8" in call for call in kernels)
    matrix = torch.eye(32)
    wanted = {(c.kind, c.precision) for c in configs_for(matrix, 64, Precision.BF16)}
    assert (Kind.ROWS, Precision.BF16) in wanted and (Kind.ROWS, Precision.FP32) in wanted
    assert {c.kind for c in configs_for(matrix, 64, Precision.INT8) if c.precision is Precision.INT8} <= set(DOT_ROWS)


def test_fewer_tokens_than_the_example_brings_are_measured_too() -> None:
    layer = eligible.LayerForm()
    assert [p.size for p in eligible.problems(layer, {(2, 3, 12)}, [100])] == [1, 2, 4, 6, 100]
    assert [p.size for p in eligible.problems(layer, {(200, 12)}, [])] == [1, 2, 4, 8, 32, 128, 200]
    conv = eligible.LayerForm(geometry=Geometry((3, 3), (2, 2)))
    assert eligible.problems(conv, {(2, 8, 5, 5)}, [7]) == (Problem(2 * 2 * 2, (2, 8, 5, 5)),)


@pytest.mark.usefixtures("eager_to_skip", "kernels")
def test_images_are_measured_in_the_layout_that_they_will_have(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, candidates = list[tuple[bool, ...]](), tune.candidates

    def spied(*args: Any, **how: Any) -> Any:
        runs = candidates(*args, **how)
        inputs = [run.args[0] for run in runs.values() if run.args[0].dim() == 4]
        seen.append(tuple(x.is_contiguous(memory_format=torch.channels_last) for x in inputs))
        return runs

    monkeypatch.setattr(tune, "candidates", spied)
    turned = IMAGE.contiguous(memory_format=torch.channels_last)
    for image, fuse, last in ((IMAGE, True, True), (IMAGE, False, False), (turned, False, True)):
        seen.clear()
        pr.sparse(net(), image, fuse=fuse)
        flat = [one for layer in seen for one in layer]
        assert flat and all(one is last for one in flat)


@pytest.mark.parametrize(("ratio", "last"), [((1.2, 0.9, 1.5), True), ((0.9, 0.8, 1.2), False)])
def test_channels_come_last_where_that_is_more_likely_faster(
    eager_to_skip: None, kernels: Calls, monkeypatch: pytest.MonkeyPatch, ratio: tuple[float, float, float], last: bool
) -> None:
    made = pr.sparse(net(), IMAGE)
    monkeypatch.setattr(acceptance, "interleaved", lambda runs, **_: SimpleNamespace(ratio=Ratio(*ratio)))
    assert acceptance.with_channels_last(made, IMAGE)[1] is last


def test_a_layer_says_what_runs_and_what_could_have() -> None:
    rows = Config(Kind.ROWS)
    slower, faster = Ratio(0.8, 0.7, 0.9), Ratio(2.0, 1.9, 2.1)
    verdicts = Verdict(Problem(1), Route.TORCH, rows, slower), Verdict(Problem(8), rows, rows, faster)
    assert str(LayerRecord("a", 0.7, verdicts)) == "a  70% zeros  1: dense (rows fp32 0.80x)  8: rows fp32 2.00x"


def test_weights_come_from_memory_where_the_model_exceeds_the_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp()
    weights = sum(p.nbytes for p in model.parameters())
    for cache, cold in ((weights, False), (weights - 1, True)):
        monkeypatch.setattr(convert, "last_cache", lambda cache=cache: cache)
        assert (convert.tuner_for(model, Precision.FP32, 1.0, 0).evict is not None) == cold
    order: list[str] = []
    runs = {Route.TORCH: lambda: order.append("dense"), Config(Kind.ROWS): lambda: order.append("sparse")}
    monkeypatch.setattr(tune, "candidates", lambda *args, **how: dict(runs) if args[6] is not made else dict(replicas))
    replicas = {
        choice: (lambda k=k: order.append(f"replica {k}"))
        for k, choice in (("dense", Route.TORCH), ("sparse", Config(Kind.ROWS)))
    }
    made: dict[Any, Any] = {}
    monkeypatch.setattr(tune, "KernelCandidates", lambda: SimpleNamespace(layers={}, replicas=made))
    monkeypatch.setattr(tune, "_PROMISING", float("inf"))  # nothing is measured again
    monkeypatch.setattr(tune, "_CLOSE", 1e9)  # and the two always meet
    Tuner(seconds=0.02, evict=lambda: order.append("evict")).linear(torch.eye(8), None, (Problem(4),))
    timed = order[order.index("evict") :]
    calls = [k for k, name in enumerate(timed) if name in ("dense", "sparse")]
    ahead = sum(timed[k - 2 : k] == ["evict", f"replica {timed[k]}"] for k in calls)
    assert ahead == len(calls) - 2 > 60  # the last comparison warms up each of the two


@pytest.mark.usefixtures("eager_to_skip", "kernels")
@pytest.mark.parametrize("head", [True, False])
def test_images_run_with_their_channels_last_where_that_is_faster(monkeypatch: pytest.MonkeyPatch, head: bool) -> None:
    model = net() if head else nn.Sequential(*list(net().children())[:1])
    seen: list[bool] = []
    for faster in (True, False):
        ratio = Ratio(1.2, 1.1, 1.3) if faster else Ratio(1.0, 0.9, 1.1)
        monkeypatch.setattr(acceptance, "speedup", lambda a, b, x, r=ratio: r if is_traced(a) else Ratio(2.0, 1.9, 2.1))
        made = pr.sparse(model, IMAGE)
        record = pr.runtime.sparsified(made)
        assert record.channels_last == faster == ("channels last" in str(record))
        layer = next(m for m in made.modules() if isinstance(m, SparseConv2d))
        layer.register_forward_pre_hook(
            lambda m, args: seen.append(args[0].is_contiguous(memory_format=torch.channels_last))
        )
        y = made(IMAGE)
        torch.testing.assert_close(y, model(IMAGE), rtol=1e-4, atol=1e-4)
        assert y.is_contiguous()
    assert seen == [True, False]


def is_traced(model: nn.Module) -> bool:
    """Whether it is the sparse model already."""
    return isinstance(model, GraphModule)


def test_a_single_token_is_cut_from_an_example_where_that_can_be() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.up = nn.Embedding(9, 4), nn.Linear(4, 4)

        def forward(self, ids: Tensor, weight: Tensor | None = None) -> Tensor:
            out: Tensor = self.up(self.words(ids))
            return out

    ids, model = torch.arange(6).reshape(2, 3), Tokens()
    met = eligible.input_shapes(model, ids)
    assert torch.equal(convert.one_token(model, ids, met), ids[:1, :1])
    named = {"ids": ids, "weight": None}
    assert torch.equal(convert.one_token(model, named, met)["ids"], ids[:1, :1])
    assert convert.one_token(model, ids[:1, :1], eligible.input_shapes(model, ids[:1, :1])) is None  # one token already
    assert convert.one_token(mlp(), X, eligible.input_shapes(mlp(), X)) is None  # the second axis holds features


@pytest.mark.usefixtures("eager_to_skip", "kernels")
def test_a_model_that_is_slower_for_one_token_runs_dense_code_there(monkeypatch: pytest.MonkeyPatch) -> None:
    slower = Ratio(0.8, 0.7, 0.9)
    monkeypatch.setattr(acceptance, "speedup", lambda a, b, x: slower if x.shape[1] == 1 else Ratio(2.0, 1.9, 2.1))
    torch.manual_seed(0)
    model = with_zeros(nn.Sequential(nn.Embedding(9, 16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)))
    made = pr.sparse(model, torch.arange(9)[None].repeat(4, 1))
    record = pr.runtime.sparsified(made)
    assert (
        record.outcome.kept
        and record.outcome.first_token is slower
        and "1.25x slower [1.11, 1.43], so dense code runs there" in str(record)
    )
    for layer in record.layers:
        few = {v.problem.size: is_dense(v.choice) for v in layer.verdicts}
        assert few == {1: True, 2: True, 4: True, 8: True, 32: False, 36: False}
    tiny = pr.runtime.sparsified(pr.sparse(model, torch.arange(8)[None]))
    assert not tiny.outcome.kept and "slower for one token" in tiny.outcome.why


@pytest.mark.usefixtures("eager_to_skip", "kernels")
def test_a_tied_head_of_a_large_model_runs_a_kernel_for_a_few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.up, self.head = nn.Embedding(9, 16), nn.Linear(16, 16), nn.Linear(16, 9, bias=False)
            self.head.weight = self.words.weight

        def forward(self, ids: Tensor) -> Tensor:
            out: Tensor = self.head(self.up(self.words(ids)))
            return out

    torch.manual_seed(0)
    model, ids = Tied(), torch.arange(9).repeat(2)[None]
    with_zeros(model.up)
    assert pr.runtime.sparsified(pr.sparse(model, ids)).replaced == ("up",)
    monkeypatch.setattr(convert, "last_cache", lambda: 0)
    for fuse in (True, False):
        made = pr.sparse(model, ids, fuse=fuse)
        record, head = pr.runtime.sparsified(made), made.get_submodule("head")
        assert record.replaced == ("up", "head") and isinstance(head, FastLinear)
        assert head.weight is made.get_submodule("words").weight and "head  0% zeros  1: decode fp32" in str(record)
        for some in (ids, ids[:, :1]):
            torch.testing.assert_close(made(some), model(some))
        assert head.cache.choice(1) == Config(Kind.DECODE) and head.cache.choice(9) is Route.TORCH
        back = restored(made)
        assert type(back.get_submodule("head")) is nn.Linear and set(back.state_dict()) == set(model.state_dict())


@pytest.mark.usefixtures("eager_to_skip")
def test_gpt2_layers_and_generation_give_the_dense_tokens(kernels: Calls) -> None:
    transformers = pytest.importorskip("transformers")
    llama = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, bos_token_id=0, eos_token_id=39, pad_token_id=39,
    )  # fmt: skip
    gpt2 = transformers.GPT2Config(
        vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=39
    )
    for kind, config in ((transformers.LlamaForCausalLM, llama), (transformers.GPT2LMHeadModel, gpt2)):
        torch.manual_seed(0)
        model = with_zeros(kind(config), 0.5)
        ids = torch.arange(1, 8)[None]
        kernels.clear()
        made = pr.sparse(model, {"input_ids": ids, "use_cache": False})
        assert type(made) is kind and sum(isinstance(m, SparseLinear) for m in made.modules()) >= 8
        kernels.clear()
        want, got = (m.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=39) for m in (model, made))
        assert torch.equal(want, got) and any("linear decode" in call for call in kernels)


@pytest.mark.usefixtures("eager_to_skip")
def test_dense_fast_changes_linear_layers_only() -> None:
    model = net()
    x = IMAGE
    made = pr.runtime.dense_fast(model, x)
    assert isinstance(made.get_submodule("3"), FastLinear) and not any(
        isinstance(m, SparseConv2d) for m in made.modules()
    )
    torch.testing.assert_close(made(x), model(x))
    record = pr.runtime.sparsified(made)
    assert record.replaced == ("3",) and "dense kernel" in str(record)
    assert made.state_dict().keys() == model.state_dict().keys()


def test_dense_fast_leaves_a_model_that_gains_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "_onednn", lambda: iter(()))
    record = pr.runtime.sparsified(pr.runtime.dense_fast(mlp(), X, seconds=0.02))
    assert not record.replaced and "by itself" in record.outcome.why


def test_a_compiler_takes_the_whole_model(kernels: Calls, eager_to_skip: None) -> None:
    for make, x in ((mlp, X), (net, IMAGE), (stem, IMAGE)):
        made = pr.sparse(make(), x)
        with torch.inference_mode():
            compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(x), made(x))
    torch._dynamo.reset()
