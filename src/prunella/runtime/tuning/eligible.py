"""The layers that a kernel can compute, by the table of `prunella.model.reads`, and why the others are kept dense.

A layer is a module that multiplies its input by its weight and does nothing else. A run of the module alone shows it:
the table names the product, and the output is compared with that of the product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from prunella.errors import RequestError
from prunella.graph.verify import relative_error
from prunella.model.forms import Contraction, Convolution, Form
from prunella.model.forward import forward
from prunella.model.hooks import removed_after
from prunella.model.observed_reads import Read, Unread
from prunella.model.product import NotReadable, operation
from prunella.model.reads import products, unreadable
from prunella.model.rng import seeded
from prunella.model.user_code import advice_on, told
from prunella.model.watch import Watch
from prunella.runtime.tuning.choice import Geometry, Problem
from prunella.types import Inputs

BUCKETS = (1, 2, 4, 8, *(8 * 4**k for k in range(1, 10)))
"""Numbers of tokens to measure, up to that of the example."""
InputShapes = Mapping[str, set[tuple[int, ...]]]
"""Layer -> shapes of its inputs."""
NOT_CALLED = "the example does not call it"


@dataclass(frozen=True)
class LayerForm:
    """How a layer reads its weight. transposed: the weight is `(in, out)`. geometry: of a convolution, else None."""

    transposed: bool = False
    geometry: Geometry | None = None

    @property
    def plain(self) -> bool:
        """Whether it reads its weight as nn.Linear does."""
        return self.geometry is None and not self.transposed

    def matrix(self, module: nn.Module) -> Tensor:
        """The weight as `(out, in)`, or `(out, in, h, w)`."""
        weight = weight_of(module)
        return weight.t() if self.transposed else weight

    def product(self, module: nn.Module, x: Tensor) -> Tensor:
        """The output of the layer, if it is this product with the bias added."""
        if self.geometry is None:
            return functional.linear(x, self.matrix(module), bias_of(module))
        g = self.geometry
        return functional.conv2d(x, self.matrix(module), bias_of(module), g.stride, g.padding, g.dilation)


@dataclass(frozen=True)
class Layers:
    """The weights of a model that an example runs.

    forms: the layers that a kernel can compute. shapes: those of their inputs. others: name -> why it is kept dense,
    for every other matrix of the model.
    """

    forms: Mapping[str, LayerForm]
    shapes: InputShapes
    others: Mapping[str, str]


def read_layers(model: nn.Module, example: Inputs) -> Layers:
    """The layers of a model in eval mode. Errors: RequestError if the model does not run on the example."""
    shapes = input_shapes(model, example)
    forms, reasons = dict[str, LayerForm](), dict[str, str]()
    for name, module in candidates(model).items():
        form = form_of(module, min(shapes[name], key=math.prod)) if name in shapes else NOT_CALLED
        if isinstance(form, LayerForm):
            forms[name] = form
        else:
            reasons[name] = form
    return Layers(forms, {name: shapes[name] for name in forms}, _reasons(model, example, forms, reasons))


def candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that may be layers: their only state is a weight of two or four axes and a bias of one."""
    return {name: module for name, module in model.named_modules() if _is_candidate(module)}


def _is_candidate(module: nn.Module) -> bool:
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if weight is None or weight.dim() not in (2, 4) or not module._parameters.keys() <= {"weight", "bias"}:
        return False
    return not module._buffers and not module._modules and (bias is None or bias.dim() == 1)


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a layer, in its own shape."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach()


def bias_of(module: nn.Module) -> Tensor | None:
    """The bias of a layer."""
    bias = module._parameters.get("bias")
    return None if bias is None else bias.detach()


# -- one module -------------------------------------------------------------------------------------------------------


def form_of(module: nn.Module, shape: Sequence[int]) -> LayerForm | str:
    """How a module reads its weight, from a run on an input of this shape; or why no kernel can compute it."""
    weight = weight_of(module)
    x = torch.randn(
        *(min(size, 2) for size in shape[:1]), *shape[1:], generator=torch.Generator().manual_seed(0), device="cpu"
    )
    x, calls = x.to(weight.device, weight.dtype), _Calls()
    with seeded(None), torch.no_grad():
        try:
            with calls:
                y = module.forward(x)
            form = _form(module, calls)
            if isinstance(form, str):
                return form
            same = isinstance(y, Tensor) and relative_error([form.product(module, x)], [y])
        except Exception as error:  # the code of the module may raise anything
            return f"it does not run alone on one tensor ({type(error).__name__})"
    exact = same is not False and same <= torch.finfo(weight.dtype).eps ** 0.5
    return form if exact else "it does more than multiply its input by its weight"


class _Calls(TorchFunctionMode):
    """The calls of a run that compute something, in order: operation, arguments and arguments by name."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[tuple[str, tuple[Any, ...], Mapping[str, Any]]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = operation(func)
        if name not in _VIEWS:
            self.all.append((name, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


_VIEWS = frozenset(
    {"__get__", "size", "dim", "numel", "view", "reshape", "flatten", "unflatten", "contiguous"}
    | {"t", "transpose", "permute", "unsqueeze", "squeeze", "view_as", "detach", "is_floating_point"}
)
_SUMS = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__"})
"""The sum with the bias, where the product does not add it."""


def _form(module: nn.Module, calls: _Calls) -> LayerForm | str:
    """The form of the one product of the calls of a module; or why there is none."""
    address, reads = weight_of(module).data_ptr(), list[tuple[str, Form]]()
    for name, args, kwargs in calls.all:
        if unreadable(name):
            return str(Unread(name, unreadable(name)))
        try:
            products_called = list(products(name, args, kwargs))
        except NotReadable as error:
            return str(Unread(name, str(error)))
        own_products = [product for product in products_called if product.operand.data_ptr() == address]
        if not own_products and name not in _SUMS:
            return f"its module also calls {name}"
        reads += [(name, product.form) for product in own_products]
    if len(reads) != 1:
        return "its module does not multiply by it once"
    ((name, form),) = reads
    why = _why_no_kernel(form)
    if why:
        return str(Unread(name, why))
    if isinstance(form, Contraction):
        return LayerForm(transposed=form.weight.index(form.outer) == 1)
    assert isinstance(form, Convolution)  # the only other form
    padding = form.padding[0][0], form.padding[1][0]
    return LayerForm(
        False, Geometry(_two(weight_of(module).shape[2:]), _two(form.stride), padding, _two(form.dilation))
    )


def _why_no_kernel(form: Form) -> str:
    """Why no kernel computes a product; empty if one does."""
    if isinstance(form, Contraction):
        return "" if len(form.weight) == 2 and not form.batch else "no kernel takes a weight of more than two axes"
    if not isinstance(form, Convolution):
        return "no kernel takes this product"
    if form.transposed:
        return "no kernel takes a transposed convolution"
    if form.groups > 1:
        return f"no kernel takes a convolution of {form.groups} groups"
    if len(form.stride) != 2:
        return f"no kernel takes a convolution of {len(form.stride)} dimensions"
    same = all(before == after for before, after in form.padding)
    return "" if same else "no kernel takes a padding that differs between two sides"


def _two(sizes: Sequence[int]) -> tuple[int, int]:
    return sizes[0], sizes[1]


# -- a model ----------------------------------------------------------------------------------------------------------


def input_shapes(model: nn.Module, example: Inputs) -> dict[str, set[tuple[int, ...]]]:
    """Candidate -> shapes of its inputs when the example runs. Errors: RequestError if the model does not run."""
    shapes: dict[str, set[tuple[int, ...]]] = {}
    with _recording(candidates(model), shapes), torch.no_grad():
        try:
            forward(model, example)
        except Exception as error:  # the model may raise anything
            todo = advice_on(error, "pass an example that the model accepts")
            raise RequestError("the model does not run on the example", told(error), todo) from error
    return shapes


@contextmanager
def _recording(layers: Mapping[str, nn.Module], shapes: dict[str, set[tuple[int, ...]]]) -> Iterator[None]:
    def record(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor) and args[0].is_floating_point():
            shapes.setdefault(name, set()).add(tuple(args[0].shape))

    handles = [layer.register_forward_pre_hook(partial(record, name)) for name, layer in layers.items()]
    with removed_after(handles):
        yield


def _reasons(
    model: nn.Module, example: Inputs, forms: Mapping[str, LayerForm], known: Mapping[str, str]
) -> dict[str, str]:
    """Why each other matrix is kept dense, in the order of the model; a last run of the model shows its readers."""
    taken = {id(model.get_submodule(name).weight) for name in forms}
    matrices = {name: p for name, p in model.named_parameters() if p.dim() > 1 and id(p) not in taken}
    open_ones = [p for name, p in matrices.items() if known.get(_layer_name(name), NOT_CALLED) == NOT_CALLED]
    read = set[int]()
    watch = Watch(open_ones, lambda read_: _note(read, read_), stacks=True)
    with torch.no_grad():
        if open_ones:
            with watch:
                forward(model, example)
            watch.finish()
    reasons = {}
    for name, parameter in matrices.items():
        layer, other = _layer_name(name), watch.others.get(id(parameter))
        why = known.get(layer, NOT_CALLED)
        if why == NOT_CALLED and id(parameter) in read:
            why = "it is read inside a module that does more than multiply by it"
        elif why == NOT_CALLED and other is not None:
            why = str(other)
        reasons[layer] = why
    return reasons


def _note(read: set[int], seen: Read) -> None:
    read.add(id(seen.weight))


def _layer_name(parameter: str) -> str:
    """The layer of a weight; the name of the parameter, if that is another one."""
    owner, _, leaf = parameter.rpartition(".")
    return owner if leaf == "weight" else parameter


def problems(form: LayerForm, shapes: set[tuple[int, ...]], tokens: Sequence[int]) -> tuple[Problem, ...]:
    """The problems to measure for a layer: the shapes of its inputs; of a linear layer, fewer tokens too."""
    if form.geometry is not None:
        geometry = form.geometry
        images = {Problem(s[0] * math.prod(geometry.positions((s[2], s[3]))), s) for s in shapes if len(s) == 4}
        return tuple(sorted((p for p in images if p.size), key=lambda problem: problem.size))
    counts = {math.prod(shape[:-1]) for shape in shapes} - {0}
    fewer = {n for n in BUCKETS if n <= max(counts, default=0)}
    return tuple(Problem(size) for size in sorted(counts | fewer | set(tokens)))
