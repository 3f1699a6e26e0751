"""The table of who reads a weight: matrix times columns is the output, for every operation in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from prunella.model.observed_reads import Read
from prunella.model.product import NotReadable, Product, operation
from prunella.model.reads import READS, UNREADABLE, products, unreadable
from prunella.model.watch import Watch

LAW = settings(max_examples=40, deadline=None, derandomize=True)
Draw = Callable[..., Any]


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def one(name: str, weight: Tensor, *args: Any, **kwargs: Any) -> Product:
    """The product of a call in which `weight` is the weight."""
    (found,) = (p for p in products(name, args, kwargs) if p.operand.data_ptr() == weight.data_ptr())
    return found


def check(product: Product, result: Tensor) -> None:
    """Columns times each matrix are its rows of the output; totals and Gram matrices are those of the columns."""
    shape, form = product.operand.shape, product.form
    matrices = form.matrices(product.operand.detach())
    assert matrices.shape == form.sizes(shape)
    assert torch.equal(form.restored(matrices, shape), product.operand.detach())
    squares = form.total(product.x.square(), shape).expand(shape)
    y = product.output(result)
    for group, matrix in enumerate(matrices):
        columns = torch.cat([part for part, _ in form.columns(product.x, shape, group)])
        bias = 0 if product.bias is None else product.bias.reshape(len(matrices), -1)[group]
        torch.testing.assert_close(columns @ matrix.T + bias, form.rows(y, shape, group), rtol=1e-10, atol=1e-10)
        if not getattr(form, "transposed", False):  # these count every input, also where the output is cropped
            norms = columns.square().sum(0).expand(matrix.shape)
            torch.testing.assert_close(form.matrices(squares)[group], norms, rtol=1e-10, atol=1e-10)
        keep = torch.arange(0, matrix.shape[1], 2)
        some = torch.cat([part for part, _ in form.columns(product.x, shape, group, keep)])
        assert torch.equal(some, columns[:, keep])
        tokens = torch.arange(len(columns)).flip(0)[::2]
        assert torch.equal(form.columns_at(product.x, shape, group, tokens), columns[tokens])
        assert torch.equal(form.columns_at(product.x, shape, group, tokens, keep), columns[tokens][:, keep])
        assert torch.equal(form.rows(y, shape, group, tokens), form.rows(y, shape, group)[tokens])
        assert y.numel() == matrices.shape[0] * matrices.shape[1] * len(columns)


SIZE = st.integers(1, 4)


@LAW
@given(lead=st.lists(SIZE, max_size=3), i=SIZE, o=SIZE, bias=st.booleans())
def test_linear(lead: list[int], i: int, o: int, bias: bool) -> None:
    x, w, b = rand(*lead, i), rand(o, i), rand(o) if bias else None
    check(one("linear", w, x, w, b), F.linear(x, w, b))


@LAW
@given(a=st.lists(SIZE, max_size=2), b=st.lists(SIZE, max_size=2), sizes=st.tuples(SIZE, SIZE, SIZE), data=st.data())
def test_matmul_of_any_ranks(a: list[int], b: list[int], sizes: tuple[int, int, int], data: st.DataObject) -> None:
    t, i, o = sizes
    common = list(torch.broadcast_shapes(tuple(a), (1,) * len(a)))
    b = [data.draw(st.sampled_from([1, n])) for n in common[len(common) - len(b) :]] if len(b) <= len(a) else b
    if len(b) > len(a):
        a = [data.draw(st.sampled_from([1, n])) for n in b[len(b) - len(a) :]]
    left = rand(i) if data.draw(st.booleans()) and not a else rand(*a, t, i)
    right = rand(i) if data.draw(st.booleans()) and not b else rand(*b, i, o)
    result = left @ right
    for weight in (left, right):
        check(one("matmul", weight, left, right), result)
    check(one("rmatmul", left, right, left), result)


@LAW
@given(sizes=st.tuples(SIZE, SIZE, SIZE, SIZE), scale=st.sampled_from([1, 0.5]), bias=st.sampled_from(["", "row", "b"]))
def test_batched_products(sizes: tuple[int, int, int, int], scale: float, bias: str) -> None:
    b, t, i, o = sizes
    x, w = rand(b, t, i), rand(b, i, o)
    added = rand(b, 1, o) if bias else torch.zeros(1, dtype=torch.float64)
    check(one("bmm", w, x, w), torch.bmm(x, w))
    check(one("bmm", x, x, w), torch.bmm(x, w))
    result = torch.baddbmm(added, x, w, alpha=scale)
    product = one("baddbmm", w, added, x, w, alpha=scale)
    assert (product.bias is not None) == (bool(bias) or b * o == 1)
    check(product, result)
    check(one("addbmm", w, torch.zeros(t, o), x, w, alpha=scale), scale * torch.bmm(x, w).sum(0))


@LAW
@given(sizes=st.tuples(SIZE, SIZE, SIZE), scale=st.sampled_from([1, 0.5]))
def test_matrices_and_vectors(sizes: tuple[int, int, int], scale: float) -> None:
    t, i, o = sizes
    x, w, b, v = rand(t, i), rand(i, o), rand(o), rand(i)
    for weight in (x, w):
        check(one("mm", weight, x, w), x @ w)
    check(one("addmm", w, b, x, w, alpha=scale), torch.addmm(b, x, w, alpha=scale))
    check(one("addmm", w, b, x, w, beta=0), x @ w)
    for weight in (x, v):
        check(one("mv", weight, x, v), x @ v)
        check(one("addmv", weight, rand(t), x, v, alpha=scale), scale * (x @ v))


EQUATIONS = [
    ("bti,oi->bto", (2, 3, 4), (5, 4)),
    ("...i,oi->...o", (2, 3, 4), (5, 4)),
    ("bti,hdi->bhtd", (2, 3, 4), (2, 5, 4)),
    ("bhtd,hdo->bto", (2, 3, 4, 5), (3, 5, 6)),
    ("bhtd,ohd->bto", (2, 3, 4, 5), (6, 3, 5)),
    ("egi,eio->ego", (3, 2, 4), (3, 4, 5)),
    ("ti,io", (3, 4), (4, 5)),
    ("ti,oi,t->o", (3, 4), (5, 4), (3,)),
    ("tki,i->t", (3, 2, 4), (4,)),
    ("...i,...io->...o", (2, 3, 4), (3, 4, 5)),
]


@pytest.mark.parametrize(("equation", "x", "w", "more"), [(e, x, w, more) for e, x, w, *more in EQUATIONS])
def test_einsum(equation: str, x: tuple[int, ...], w: tuple[int, ...], more: list[tuple[int, ...]]) -> None:
    tensors = [rand(*x), rand(*w), *(rand(*size) for size in more)]
    product = one("einsum", tensors[1], equation, *tensors)
    check(product, torch.einsum(equation, *tensors))
    product = one("einsum", tensors[1], equation, tensors)  # as below autograd
    check(product, torch.einsum(equation, *tensors))


def test_products_that_are_einsums_by_another_name() -> None:
    x, w = rand(2, 3, 4), rand(5, 4)
    check(one("inner", w, x, w), torch.inner(x, w))
    a, b = rand(2, 3, 4), rand(4, 3, 5)
    check(one("tensordot", b, a, b, ([2, 1], [0, 1])), torch.tensordot(a, b, ([2, 1], [0, 1])))
    c = rand(3, 4, 5)
    check(one("tensordot", c, a, c), torch.tensordot(a, c))


def test_grouped_rows() -> None:
    x, w, ends = rand(9, 4), rand(3, 4, 5), torch.tensor([2, 2, 9])
    result = torch.cat([x[:2] @ w[0], x[2:] @ w[2]])
    found = list(products("grouped_mm", (x, w, ends)))
    assert [len(p.x) for p in found] == [2, 0, 7] and all(
        p.operand.data_ptr() == w[k].data_ptr() for k, p in enumerate(found)
    )
    for product in found:
        check(product, result)


@st.composite
def convolutions(draw: Draw, *, transposed: bool) -> tuple[int, dict[str, Any], tuple[int, ...], tuple[int, ...]]:
    n, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    many = [draw(st.tuples(*[st.integers(1, 3)] * n)) for _ in range(3)]
    kernel, stride, dilation = many
    padding: Any = draw(st.tuples(*[st.integers(0, 2)] * n))
    how = {"stride": stride, "dilation": dilation, "groups": groups}
    if transposed:
        padding = tuple(min(p, d * (k - 1)) for p, d, k in zip(padding, dilation, kernel, strict=True))
        how["output_padding"] = tuple(
            draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
        )
    elif draw(st.booleans()):
        padding, how["stride"] = draw(st.sampled_from(["same", "valid"])), (1,) * n
    spatial = tuple(d * (k - 1) + draw(st.integers(1, 3)) for d, k in zip(dilation, kernel, strict=True))
    i, o, batch = (draw(st.integers(1, 2)) for _ in range(3))
    weight = (groups * i, o, *kernel) if transposed else (groups * o, i, *kernel)
    return n, {**how, "padding": padding}, (batch, groups * i, *spatial), weight


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@LAW
@given(case=convolutions(transposed=False), single=st.booleans())
def test_convolutions(case: tuple[int, dict[str, Any], tuple[int, ...], tuple[int, ...]], single: bool) -> None:
    n, how, shape, kernel = case
    x, w, b = rand(*shape[single:]), rand(*kernel), rand(kernel[0])
    check(one(f"conv{n}d", w, x, w, b, **how), getattr(F, f"conv{n}d")(x, w, b, **how))


@LAW
@given(case=convolutions(transposed=True), single=st.booleans())
def test_transposed_convolutions(
    case: tuple[int, dict[str, Any], tuple[int, ...], tuple[int, ...]], single: bool
) -> None:
    n, how, shape, kernel = case
    x, w, b = rand(*shape[single:]), rand(*kernel), rand(kernel[1] * how["groups"])
    result = getattr(F, f"conv_transpose{n}d")(x, w, b, **how)
    check(one(f"conv_transpose{n}d", w, x, w, b, **how), result)
    if not single:
        order = ("stride", "padding", "dilation", "output_padding")
        stride, padding, dilation, more = (how[key] for key in order)
        args = (x, w, b, stride, padding, dilation, True, more, how["groups"])
        check(one("convolution", w, *args), torch.convolution(*args))


ATTENTION = {
    "self": {},
    "cross": {"keys": True},
    "three inputs": {"keys": True, "values": True},
    "other sizes": {"keys": True, "values": True, "kdim": 6, "vdim": 5},
    "no bias": {"bias": False},
}


@pytest.mark.parametrize("case", ATTENTION, ids=str)
@pytest.mark.parametrize("batched", [True, False])
def test_multi_head_attention(case: str, batched: bool) -> None:
    torch.manual_seed(0)
    how: dict[str, Any] = dict(ATTENTION[case])
    keys, values = how.pop("keys", False), how.pop("values", False)
    module = nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64, **how)
    if module.in_proj_bias is not None:
        nn.init.normal_(module.in_proj_bias)
        nn.init.normal_(module.out_proj.bias)
    lead = (2,) if batched else ()
    q = rand(*lead, 3, 8)
    k = rand(*lead, 4, how.get("kdim", 8)) if keys else q
    v = rand(*lead, 4, how.get("vdim", 8)) if values else k
    seen: list[Read] = []
    with torch.no_grad():
        with Watch([p for p in module.parameters() if p.dim() > 1], seen.append) as watch:
            result = module(q, k, v)[0]
        watch.finish()
    assert not watch.others and sum(read.matrices().numel() for read in seen) == 4 * 8 * 8 - 8 * (
        8 - how.get("kdim", 8) + 8 - how.get("vdim", 8)
    )
    for read in seen:
        ((columns, _),) = read.columns()
        bias = 0 if read.bias is None else read.bias[0]
        assert (read.bias is None) == (case == "no bias")
        torch.testing.assert_close(columns @ read.matrices()[0].T + bias, read.rows())
    given = [t.transpose(0, 1) if batched else t for t in ([q, k, v] if keys else [q])]
    assert len(seen) == len(given) + 1
    assert all(torch.equal(read.x, t) for read, t in zip(seen, given, strict=False))
    last = seen[-1].y.transpose(0, 1) if batched else seen[-1].y
    torch.testing.assert_close(last, result)


def test_every_operation_in_the_table_is_tried_here() -> None:
    tried = set("linear matmul rmatmul bmm baddbmm addbmm mm addmm mv addmv einsum inner tensordot grouped_mm".split())
    tried |= {f"conv{t}{n}d" for t in ("", "_transpose") for n in (1, 2, 3)}
    assert set(READS) == tried | {"convolution", "multi_head_attention_forward", "mkldnn_rnn_layer"}


@pytest.mark.parametrize("reverse", [False, True])
def test_a_fused_recurrent_layer_reads_its_input_and_the_outputs_of_the_steps_before(reverse: bool) -> None:
    """With both products the gates, and with them the outputs, can be computed step by step."""
    x, entering, repeated, bias = (rand(*shape).float() for shape in ((5, 2, 3), (16, 3), (16, 4), (16,)))
    none, first, cell = torch.zeros(16), rand(2, 4).float(), rand(2, 4).float()
    args = (x, entering, repeated, bias, none, first, cell, reverse, [], 2, 4, 1, True, False, False, False)
    outputs = torch.ops.aten.mkldnn_rnn_layer(*args)[0]
    into, back = products("mkldnn_rnn_layer", args)
    assert into.operand is entering and back.operand is repeated and torch.equal(into.x, x)
    gates = into.x @ entering.T + back.x @ repeated.T + bias
    for step in reversed(range(5)) if reverse else range(5):
        enter, forget, new, leave = gates[step].chunk(4, -1)
        cell = forget.sigmoid() * cell + enter.sigmoid() * new.tanh()
        torch.testing.assert_close(leave.sigmoid() * cell.tanh(), outputs[step])
    with pytest.raises(NotReadable, match="packed"):
        list(products("mkldnn_rnn_layer", (*args[:8], [2, 2, 1], *args[9:])))


def test_no_operation_is_both_in_the_table_and_unreadable() -> None:
    assert not set(READS) & set(UNREADABLE)
    assert unreadable("lstm") and not unreadable("linear") and not unreadable("relu")
    with pytest.raises(NotReadable, match="lists of numbers"):
        list(products("einsum", (rand(2, 3), [0, 1], rand(3, 4), [1, 2])))
    assert operation(torch.ops.aten.addmm.default) == "addmm" and operation(Tensor.__matmul__) == "matmul"
    assert not list(products("relu", (rand(2),)))


class Spelled(nn.Module):
    """One weight, read in some way."""

    def __init__(self, how: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.how, self.weight = how, nn.Parameter(rand(*shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.how(x, self.weight)


SPELLINGS = {
    "turned": (lambda x, w: x @ w.t(), (5, 4)),
    "from the left": (lambda x, w: (w @ x.mT).mT, (5, 4)),
    "column blocks": (lambda x, w: F.linear(x[..., :2], w[:, :2]) + F.linear(x[..., 2:], w[:, 2:]), (5, 4)),
    "row blocks": (lambda x, w: torch.cat([F.linear(x, part) for part in w.chunk(2)], -1), (6, 4)),
    "a kernel of one": (lambda x, w: F.conv1d(x.mT, w[..., None]).mT, (5, 4)),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_weight_is_known_by_its_memory(name: str) -> None:
    how, shape = SPELLINGS[name]
    model, x, seen = Spelled(how, *shape), rand(2, 3, 4), list[Read]()
    with torch.no_grad():
        with Watch([model.weight], seen.append) as watch:
            model(x)
        watch.finish()
        assert sum(read.matrices().numel() for read in seen) == model.weight.numel()
        for read in seen:
            ((columns, _),) = read.columns()
            torch.testing.assert_close(columns @ read.matrices()[0].T, read.rows())
            ones = torch.zeros_like(model.weight).copy_(model.weight)
            assert torch.equal(read.matrices(ones), read.matrices())
            read.write_(read.matrices() + 1)
    assert seen[0].weight is model.weight


def test_what_is_not_read_is_named() -> None:
    lstm, table, pair = nn.LSTM(4, 3), nn.Embedding(5, 4), nn.Parameter(rand(4, 4))
    with torch.no_grad():
        with Watch([lstm.weight_ih_l0, table.weight, pair], lambda read: pytest.fail(str(read))) as watch:
            lstm(table(torch.tensor([[1, 2]])))
            pair @ pair
        watch.finish()
    assert str(watch.others[id(lstm.weight_ih_l0)]) == "lstm reads it: its steps run inside one call, which hides them"
    assert str(watch.others[id(table.weight)]) == "embedding reads it: it looks up rows by index"
    assert watch.others[id(table.weight)].tied == "embedding reads the same (tied) weight"
    assert str(watch.others[id(pair)]) == "matmul reads it: it multiplies two weights"


NAMED: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "mm": (lambda w: torch.mm(rand(3, 4), mat2=w), (4, 5)),
    "bmm": (lambda w: torch.bmm(input=rand(2, 3, 4), mat2=w), (2, 4, 5)),
    "mv": (lambda w: torch.mv(w, vec=rand(4)), (5, 4)),
    "addmm": (lambda w: torch.addmm(torch.zeros(5).double(), mat1=rand(3, 4), mat2=w), (4, 5)),
    "addmv": (lambda w: torch.addmv(torch.zeros(5).double(), mat=w, vec=rand(4)), (5, 4)),
    "baddbmm": (lambda w: torch.baddbmm(torch.zeros(2, 3, 5).double(), batch1=rand(2, 3, 4), batch2=w), (2, 4, 5)),
    "addbmm": (lambda w: torch.addbmm(torch.zeros(3, 5).double(), batch1=rand(2, 3, 4), batch2=w), (2, 4, 5)),
    "tensordot": (lambda w: torch.tensordot(rand(3, 4), w, 1), (4, 5)),
    "tensordot with axes": (lambda w: torch.tensordot(rand(3, 4), w, dims=([1], [0])), (4, 5)),
}


@pytest.mark.parametrize("name", NAMED)
def test_operands_may_be_passed_by_name(name: str) -> None:
    """As people call torch, and as torch itself does: it passes `out=None` to the mode of a tensordot."""
    call, shape = NAMED[name]
    weight, seen = nn.Parameter(rand(*shape)), list[Read]()
    with torch.no_grad():
        with Watch([weight], seen.append) as watch:
            call(weight)
        watch.finish()
        (read,) = seen
        for group, matrix in enumerate(read.matrices()):
            columns = torch.cat([part for part, _ in read.columns(group)])
            torch.testing.assert_close(columns @ matrix.T, read.rows(group))


def test_a_sum_that_scales_a_side_has_no_residual() -> None:
    weight = nn.Parameter(rand(5, 4))
    for alpha, kept in ((1, True), (-1, False)):
        seen = list[Read]()
        with torch.no_grad():
            with Watch([weight], seen.append) as watch:
                torch.add(F.linear(rand(3, 4), weight), rand(3, 5), alpha=alpha)
            watch.finish()
        assert (seen[0].residual is not None) is kept
