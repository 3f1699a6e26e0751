"""Convolutions in one call of the kernels, against float64; and where their results lie."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import prunella as pr
from prunella.runtime.fx.chain import Chain
from prunella.runtime.kernels import chain as kernel_chain
from prunella.runtime.kernels import library
from prunella.runtime.kernels.chain import ChainStep, Ready, allocate
from prunella.runtime.kernels.config import Activation, Config, Kind
from prunella.runtime.kernels.convolution import is_channels_last, patches
from tests.runtime.test_sparse import IMAGE, net

needs_kernels = pytest.mark.skipif(
    not library.available(), reason="the kernels were not built: no compiler at installation"
)


@pytest.fixture(params=library.tiers() or ("none",))
def tier(request: pytest.FixtureRequest) -> Iterator[str]:
    library.use_tier(request.param)
    yield request.param
    library.use_tier()


# -- where results lie -------------------------------------------------------------------------------------------------


def test_memory_is_given_out_again_as_worked_by_hand() -> None:
    # 0 the image; 1 = a(0); 2 = b(1), then nothing reads 1; 3 = c(2), where 1 was; 4 = d(3), which comes out
    todo = [ChainStep(0, None), ChainStep(1, None, (1,)), ChainStep(2, None, (2,)), ChainStep(3, None, (3,))]
    assert allocate(todo, [20, 40, 32, 8], 1, [4]) == ({1: 0, 2: 32, 3: 0}, 80)
    # 3 = c(2) + 1 takes the memory of 1, unless 1 is read later, or by c itself
    added = [ChainStep(0, None), ChainStep(1, None), ChainStep(2, 1, (1, 2)), ChainStep(3, None, (3,))]
    assert allocate(added, [32, 16, 32, 8], 1, [4]) == ({1: 0, 2: 32, 3: 0}, 48)
    late = [ChainStep(0, None), ChainStep(1, None), ChainStep(2, 1, (2,)), ChainStep(3, 1, (1, 3))]
    assert allocate(late, [32, 16, 32, 8], 1, [4]) == ({1: 0, 2: 32, 3: 48}, 80)
    itself = [ChainStep(0, None), ChainStep(1, 1, (1,)), ChainStep(2, None, (2,))]
    assert allocate(itself, [32, 32, 8], 1, [3]) == ({1: 0, 2: 32}, 64)


def test_pieces_that_lie_side_by_side_become_one() -> None:
    first = [ChainStep(0, None)] * 3  # their results at 0, 16 and 32; 4 to 6 come out
    for order in ((1, 2, 3), (3, 2, 1), (1, 3, 2)):
        todo = [*first, *(ChainStep(place, None, (place,)) for place in order), ChainStep(0, None), ChainStep(7, None)]
        at, floats = allocate(todo, [16, 16, 16, 8, 8, 8, 48, 8], 1, [4, 5, 6, 8])
        assert at == {1: 0, 2: 16, 3: 32, 7: 0} and floats == 48


def wired(rng: random.Random, count: int, inputs: int) -> tuple[list[ChainStep], list[int], list[int]]:
    """Random steps whose results are all of the size that their number in `sizes` has, and places that come out."""
    sizes = [rng.choice((16, 48, 100)) for _ in range(inputs)]
    reads: list[tuple[int, int | None]] = []
    for _ in range(count):
        x = rng.randrange(len(sizes))
        residual = rng.choice([None, *range(len(sizes))])
        sizes.append(rng.choice((16, 48, 100)) if residual is None else sizes[residual])
        reads.append((x, residual))
    outputs = sorted({inputs + count - 1, *(p for p in range(inputs, inputs + count) if rng.random() < 0.1)})
    last = {place: number for number, read in enumerate(reads) for place in read if place is not None}
    todo = [
        ChainStep(x, residual, tuple(p for p, end in sorted(last.items()) if end == number and p not in outputs))
        for number, (x, residual) in enumerate(reads)
    ]
    return todo, sizes[inputs:], outputs


@pytest.mark.parametrize("seed", range(60))
def test_nothing_that_is_still_read_is_written_over(seed: int) -> None:
    rng = random.Random(seed)
    inputs, count = rng.randint(1, 3), rng.randint(2, 25)
    todo, sizes, outputs = wired(rng, count, inputs)
    at, floats = allocate(todo, sizes, inputs, outputs)
    assert set(at) == set(range(inputs, inputs + count)) - set(outputs)
    memory: dict[int, int] = {}  # float -> place whose number stands there
    for number, step in enumerate(todo):
        for place in (step.x, step.residual):
            if place in at:
                begin = at[place]
                assert all(memory[f] == place for f in range(begin, begin + sizes[place - inputs]))
        y = inputs + number
        if y in at:
            assert at[y] % 16 == 0 and at[y] + sizes[number] <= floats
            taken = {memory.get(f) for f in range(at[y], at[y] + sizes[number])}
            assert step.x not in taken  # of x more than one number is read for one of y
            memory.update(dict.fromkeys(range(at[y], at[y] + sizes[number]), y))


# -- the kernels -------------------------------------------------------------------------------------------------------

ACTIVATIONS = {Activation.NONE: lambda x: x, Activation.RELU: functional.relu, Activation.SILU: functional.silu}


class Layer:
    """A convolution with zeros, and what float64 gives for it."""

    def __init__(self, rng: random.Random, wide: int, rows: int, kernel: int, stride: int) -> None:
        g = torch.Generator().manual_seed(rng.randrange(1 << 30))
        keep = torch.rand(rows, wide, kernel, kernel, generator=g) < 0.4
        self.weight = torch.randn(rows, wide, kernel, kernel, generator=g) * keep / (0.4 * wide * kernel**2) ** 0.5
        self.bias = torch.randn(rows, generator=g) if rng.random() < 0.7 else None
        self.activation = rng.choice(list(ACTIVATIONS))
        self.stride, self.padding = stride, kernel // 2
        kind, depth = rng.choice((Kind.ROWS, Kind.GROUPS, Kind.BLOCK4)), rng.choice((16, 100, 256))
        self.config = Config(kind, rows=rng.choice((1, 2, 4)), tile=rng.choice((2, 3, 4)), depth=depth)

    def ready(self, shape: Sequence[int], last: bool) -> Ready:
        sides = tuple((n, n) for n in (self.weight.shape[2], self.stride, self.padding, 1))
        packed = library.pack(self.weight.flatten(1), self.config)
        return Ready(packed, patches(packed.shape, shape, last, *sides), self.bias, self.activation)

    def exact(self, x: Tensor, residual: Tensor | None) -> Tensor:
        bias = None if self.bias is None else self.bias.double()
        y = functional.conv2d(x, self.weight.double(), bias, self.stride, self.padding)
        return ACTIVATIONS[self.activation](y if residual is None else y + residual)


def chain(rng: random.Random, image: Tensor) -> tuple[list[ChainStep], list[Ready], list[int], list[Tensor]]:
    """Blocks as those of a ResNet: three convolutions and what came before, or that through a convolution, added."""
    last = is_channels_last(image)
    reads: list[tuple[int, int | None]] = []
    ready, exact = list[Ready](), [image.double()]

    def add(x: int, residual: int | None, rows: int, kernel: int, stride: int = 1) -> int:
        layer = Layer(rng, exact[x].shape[1], rows, kernel, stride)
        reads.append((x, residual))
        ready.append(layer.ready(exact[x].shape, last))
        exact.append(layer.exact(exact[x], None if residual is None else exact[residual]))
        return len(exact) - 1

    at = 0
    for _ in range(3):
        wide, stride = rng.choice((4, 9, 33)), rng.choice((1, 2))
        one = add(at, None, wide, 1)
        two = add(one, None, wide, 3, stride)
        same = stride == 1 and rng.random() < 0.5
        side = at if same else add(at, None, rng.choice((5, 40)), 1, stride)
        at = add(two, side, exact[side].shape[1], 1)
    outputs = [at, *rng.sample(range(1, at), 1)]
    end = {place: number for number, read in enumerate(reads) for place in read if place is not None}
    todo = [
        ChainStep(x, residual, tuple(p for p, n in end.items() if n == number and p not in outputs))
        for number, (x, residual) in enumerate(reads)
    ]
    return todo, ready, outputs, exact


@needs_kernels
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("threads", [1, 3])
def test_a_chain_is_that_of_float64(tier: str, seed: int, layout: torch.memory_format, threads: int) -> None:
    rng = random.Random(seed)
    shape = rng.choice([(1, 3, 17, 13), (2, 8, 9, 24), (3, 5, 4, 4), (1, 40, 56, 56), (0, 3, 5, 5)])
    image = torch.randn(shape).contiguous(memory_format=layout)
    todo, ready, outputs, exact = chain(rng, image)
    before, held = torch.get_num_threads(), image.clone()
    prepared = kernel_chain.prepare(todo, ready, 1, outputs)
    torch.set_num_threads(threads)
    try:
        found, again = kernel_chain.run(prepared, [image]), kernel_chain.run(prepared, [image])
    finally:
        torch.set_num_threads(before)
    assert found is not None and again is not None and torch.equal(image, held)
    for y, z, place in zip(found, again, outputs, strict=True):
        torch.testing.assert_close(y.double(), exact[place], rtol=1e-4, atol=1e-4)
        assert torch.equal(y, z) and (y.is_contiguous(memory_format=layout) or not y.numel())
    parts = sorted((y.data_ptr(), y.nbytes) for y in (*found, *again, image))
    assert all(a + n <= b for (a, n), (b, _) in pairwise(parts))


@needs_kernels
@pytest.mark.parametrize("where", ["image", "weight"])
def test_a_number_that_is_not_finite_ends_it(tier: str, where: str) -> None:
    image = torch.randn(1, 8, 6, 6)
    todo, ready, outputs, _ = chain(random.Random(1), image)
    if where == "image":
        image[0, 3, 2, 2] = torch.inf
    else:
        weight = torch.zeros(ready[0].packed.shape)
        weight[:, 0] = torch.inf
        first = library.pack(weight, Config(Kind.ROWS))
        ready[0] = Ready(first, ready[0].patches, ready[0].bias, Activation.NONE)
    assert kernel_chain.run(kernel_chain.prepare(todo, ready, 1, outputs), [image]) is None


@needs_kernels
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_model_runs_its_chain_in_one_call(
    eager_to_skip: None, tier: str, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = net(tangled=True)
    made = pr.sparse(dense, IMAGE)
    assert any(isinstance(module, Chain) for module in made.modules())
    done, run = list[bool](), kernel_chain.run

    def spied(prepared: kernel_chain.Prepared, inputs: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
        found = run(prepared, inputs)
        done.append(found is not None)
        return found

    monkeypatch.setattr(kernel_chain, "run", spied)
    odd = IMAGE.clone()
    odd[0, 0, 0, 0] = torch.inf
    with torch.inference_mode():
        for image in (IMAGE, IMAGE[:1, :, :3], odd, IMAGE):
            x = image.contiguous(memory_format=layout)
            torch.testing.assert_close(made(x), dense(x), equal_nan=True, rtol=1e-4, atol=1e-4)
    assert done == [True, True, False, True]
