"""What hangs on a model without being part of it is neither searched nor copied; what a forward pass reads is both."""

from __future__ import annotations

import functools
import gc
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import prunella as pr
from prunella.errors import PruningError
from prunella.graph.trace.kept import kept_on
from prunella.graph.trace.tracked_int import holders
from prunella.model.copying import copied
from prunella.model.state import untouched
from prunella.model.unread import _codes, _computes_names, unread

MANY = 800


class Net(nn.Module):
    """Two layers, with something that hangs on it."""

    def __init__(self, store: Any = None) -> None:
        super().__init__()
        self.first, self.second, self.store = nn.Linear(4, 8), nn.Linear(8, 3), store

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(torch.relu(self.first(x)))
        return out

    def batches(self) -> Any:
        """Not run by a forward pass."""
        return iter(self.store)


class Direct(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + len(self.store)


class ByMethod(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.amount

    @property
    def amount(self) -> float:
        return float(self._count())

    def _count(self) -> int:
        return len(self.store)


class ByText(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + len(getattr(self, "store", ()))


class ByComputedName(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + sum(len(getattr(self, f"{part}re")) for part in ("sto",))


class Helper:
    def __init__(self, net: Net) -> None:
        self.net = net

    def __call__(self) -> int:
        return _of(self.net)


def _of(net: Net) -> int:
    return len(net.store)


class ByHelper(Net):
    def __init__(self, store: Any = None) -> None:
        super().__init__(store)
        self.helper = Helper(self)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.helper()


class ByGlobal(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + sum(_of(net) for net in (self,))


def by_hook(store: Any) -> Net:
    net = Net(store)

    def hook(module: nn.Module, _: Any, output: Tensor) -> Tensor:
        return output + len(net.store)

    net.second.register_forward_hook(functools.partial(hook))
    return net


def by_own_forward(store: Any) -> Net:
    net = Net(store)
    inner = net.forward
    net.forward = lambda x: inner(x) + len(net.store)  # type: ignore[method-assign]
    return net


class Reader:
    """Knows the network that holds it, and reads from it."""

    __slots__ = ("owner",)

    def __init__(self, owner: Net) -> None:
        self.owner = owner

    def read(self) -> int:
        return self.amount()

    def amount(self) -> int:
        return len(self.owner.store)


class ByReader(Net):
    """Its reader is somewhere in an attribute: the code of the forward pass names neither its class nor `store`."""

    reader: Any

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.taken()

    def taken(self) -> int:
        return int(self.reader())


class Deep:
    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(self) -> int:
        return int(self.inner["at"][0].inner.read())


class Slotted:
    __slots__ = ("inner",)

    def __init__(self, inner: Any) -> None:
        self.inner = inner


def by_deep_object(store: Any) -> Net:
    net = ByReader(store)
    net.reader = Deep({"at": [Deep(Reader(net))]})
    return net


def by_slots(store: Any) -> Net:
    net = ByReader(store)
    net.reader = Deep({"at": [Slotted(Reader(net))]})
    return net


def by_bound_method(store: Any) -> Net:
    net = ByReader(store)
    net.reader = Reader(net).read
    return net


def by_closure(store: Any) -> Net:
    net = ByReader(store)
    reader = Reader(net)
    net.second.register_forward_hook(lambda module, inputs, output: output + reader.read())
    net.reader = int
    return net


READ: list[Callable[[Any], Net]] = [
    by_deep_object,
    by_slots,
    by_bound_method,
    Direct,
    ByMethod,
    ByText,
    ByComputedName,
    ByHelper,
    ByGlobal,
    by_hook,
    by_own_forward,
]


def store() -> list[dict[str, int]]:
    return [{"number": k} for k in range(MANY)]


@pytest.mark.parametrize("make", READ, ids=lambda make: make.__name__)
def test_what_a_forward_pass_reads_is_searched_and_copied(make: Callable[[Any], Net]) -> None:
    net = make(store())
    assert not unread(net)
    copy: Any = copied(net)
    assert copy.store == net.store and copy.store is not net.store and copy.store[0] is not net.store[0]
    with untouched(net):
        net.store[3]["number"] = -1
        net.store.append({})
    assert net.store == store()


def test_an_object_in_a_closure_may_read_what_its_function_does_not_name() -> None:
    assert not unread(by_closure(store()))


def helped(net: Net, x: Tensor) -> Tensor:
    return x


class Changing(Net):
    def forward(self, x: Tensor) -> Tensor:
        return helped(self, super().forward(x))


def test_code_that_is_replaced_later_is_read_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method of the class, or a function of its file, as in a notebook: nothing of an earlier look is believed."""
    net = Changing(store())
    assert unread(net)
    with monkeypatch.context() as patched:
        patched.setattr(Changing, "forward", Direct.forward)
        assert not unread(net)
    assert unread(net)
    monkeypatch.setitem(globals(), "helped", lambda net, x: x + len(net.store))
    assert not unread(net)


def test_a_look_keeps_no_model_alive() -> None:
    net = by_hook(store())
    unread(net)
    gone = weakref.ref(net)
    del net
    gc.collect()
    assert gone() is None


def test_what_no_forward_pass_reads_is_shared() -> None:
    net = Net(store())
    assert list(unread(net).values()) == [net.store]
    assert copied(net).store is net.store  # type: ignore[attr-defined]
    small: Any = pr.shrink(net, pr.plan(net, torch.randn(2, 4), remove={"first": [1]}))
    assert small.first.out_features == 7 and small.store is net.store


def test_a_small_value_is_copied_whoever_reads_it() -> None:
    net = Net(store()[:9])
    copy: Any = copied(net)
    assert not unread(net) and copy.store == net.store and copy.store is not net.store


def test_a_configuration_with_many_names_is_copied() -> None:
    """It is the smaller model's own: a change of it must not reach the dense model."""
    net = Net(SimpleNamespace(width=8, labels={k: f"class {k}" for k in range(2 * MANY)}))
    small: Any = pr.shrink(net, pr.plan(net, torch.randn(2, 4), remove={"first": [1]}))
    assert (small.store.width, net.store.width) == (7, 8) and small.store.labels is not net.store.labels


def by_recursion(store: Any) -> Net:
    net = Net(store)

    def hook(module: nn.Module, inputs: Any, output: Tensor, again: bool = True) -> Tensor:
        return hook(module, inputs, output, False) if again else output + len(net.store)

    net.second.register_forward_hook(hook)
    return net


def test_a_closure_that_refers_to_itself_is_followed_once() -> None:
    assert not unread(by_recursion(store()))


def test_the_graph_of_a_program_is_its_own() -> None:
    program = torch.fx.symbolic_trace(nn.Sequential(*(nn.Linear(4, 4) for _ in range(40))))
    assert not unread(program) and copied(program).graph is not program.graph


class Untouchable:
    """An item that nobody may copy or look into."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise AssertionError("copied")

    def __getattr__(self, name: str) -> Any:
        raise AssertionError("searched") if not name.startswith("__") else AttributeError(name)


class Files(Sequence[Any]):
    """Samples that are loaded when they are asked for."""

    def __init__(self) -> None:
        self.paths = [f"{k}.png" for k in range(9)]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Any) -> Any:
        raise AssertionError("a file is loaded")

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("all files are loaded")


class Samples(Dataset[Any]):
    def __init__(self) -> None:
        self.items, self.size = [Untouchable() for _ in range(3)], 8

    def __len__(self) -> int:
        return self.size

    def __deepcopy__(self, memo: Any) -> Samples:
        return self


class Trainer:
    """Holds the model, its data, threads and a size that is that of a layer."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.history, self.width = model, [Untouchable() for _ in range(MANY)], 8
        self.lock, self.data = threading.Lock(), Samples()


def test_a_trainer_is_neither_searched_nor_copied() -> None:
    net = Net()
    net.store = trainer = Trainer(net)
    small: Any = pr.shrink(net, pr.plan(net, torch.randn(2, 4), pr.Recipe(), target=pr.MACs(0.5)))
    assert small.store is trainer and trainer.width == 8 and small.first.out_features < 8
    assert "store" not in {owner.rpartition(":")[2] for owner, _ in holders(net)}


@pytest.mark.parametrize("make", [Files, Samples])
def test_data_that_forward_names_are_not_iterated(make: Callable[[], Any]) -> None:
    net = Direct(make())
    small: Any = pr.shrink(net, pr.plan(net, torch.randn(2, 4), remove={"first": [1, 2]}))
    assert small.first.out_features == 6 and getattr(net.store, "size", 8) == 8


def test_a_proxy_of_what_is_gone_is_left_alone() -> None:
    trainer = Trainer(nn.Linear(1, 1))
    net = Net(weakref.proxy(trainer))
    del trainer
    small: Any = pr.shrink(net, pr.plan(net, torch.randn(2, 4), remove={"first": [1, 2]}))
    assert small.first.out_features == 6


class Bank(Net):
    """Keeps what it computed in a long list, or in an object in one."""

    def __init__(self, inside: bool) -> None:
        super().__init__([Entry() for _ in range(MANY)])
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.first(x))
        if self.inside:
            self.store[17].value = hidden
        else:
            self.store.append(hidden)
        out: Tensor = self.second(hidden)
        return out


class Entry:
    value: Any = None


@pytest.mark.parametrize("inside", [True, False])
def test_activations_kept_in_a_large_value_are_outputs(inside: bool) -> None:
    net = Bank(inside).eval()
    with pytest.raises(PruningError, match="the model keeps it after a run, as store"):
        pr.plan(net, torch.randn(2, 4), target=pr.Sparsity(0.3))
    assert len(net.store) == MANY and net.store[17].value is None
    net(torch.randn(2, 4))
    assert [tensor.shape for tensor in kept_on(net).values()] == [(2, 8)]


NAMED: list[tuple[bool, Callable[..., Any]]] = [
    (False, lambda s: getattr(s, "x")),  # noqa: B009
    (False, lambda s: getattr(s.k, "x", None)),
    (False, lambda s: getattr(s["k"], "x", None)),
    (False, lambda s: setattr(s, "x", s.f(3)["a"] + 1)),
    (False, lambda s: getattr(getattr(s, "a"), "b")),  # noqa: B009
    (False, lambda s, q: getattr(q(s), "y")),  # noqa: B009
    (False, lambda s: [getattr(m, "w", 1) for m in s]),
    (True, lambda s, n: getattr(s, n)),
    (True, lambda s, n: getattr(s["k"], n)),
    (True, lambda s: getattr(s, f"x{s}")),
    (True, lambda s: getattr(s, "a" + s.b)),
    (True, lambda s: getattr(s, ("a", "b")[s.k])),
    (True, lambda s: getattr(s, "w" if s else "v")),
    (True, lambda s, n: getattr(getattr(s, n), "b")),  # noqa: B009
    (True, lambda s: map(getattr, s, ["a"])),
    (True, lambda s: [(lambda g, n: getattr(g, n)) for _ in s]),
    (True, lambda s: vars(s)),
    (True, lambda s: s.__dict__["x"]),
]


@pytest.mark.parametrize(("computed", "function"), NAMED)
def test_names_that_are_computed(computed: bool, function: Any) -> None:
    assert any(map(_computes_names, _codes(function.__code__))) is computed
