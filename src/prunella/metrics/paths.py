"""Trace which units are reached from the inputs and which reach an output, through a model's own forward.

A value is positive if the input reaches it, and zero otherwise; gradients show the same for the outputs. Every call is
replaced by one that preserves this: activations become the identity, a maximum a mean, a product of activations a sum.
A call without a rule connects all of its inputs with all of its outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from prunella.model.calls import called
from prunella.model.forms import Contraction
from prunella.model.observed_reads import Homes, View
from prunella.model.product import NotReadable, Product, operation
from prunella.model.reads import products, unreadable
from prunella.model.trees import tensors
from prunella.types import Mask

Args = tuple[Any, ...]
Kwargs = Mapping[str, Any]


@dataclass
class Met:
    """One weight after the run: its elements on a path, and its live outputs.

    outputs: by part of the weight and kind of read, for all its matrices together.
    """

    pairs: Mask
    outputs: dict[object, Mask] = field(default_factory=dict)

    @property
    def live(self) -> Mask:
        """The mask of the outputs on a path."""
        return torch.cat(list(self.outputs.values()))


@dataclass
class _Weights:
    """The weights that were read, by name, and the calls without a rule."""

    parameters: Mapping[str, Tensor]
    met: dict[str, Met] = field(default_factory=dict)
    unfollowed: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._ids, self._homes = {id(p) for p in self.parameters.values()}, Homes()
        for name, parameter in self.parameters.items():
            self._homes.settle(name, parameter)

    def parameter(self, value: object) -> bool:
        """Whether it is a parameter of the model, which carries no input."""
        return id(value) in self._ids

    def home(self, value: Tensor) -> tuple[str, View] | None:
        """The parameter of which the tensor is a view."""
        return self._homes.of(value)

    def reads(self, func: Any, args: Args, kwargs: Kwargs) -> list[Product]:
        """The products of a call with a weight; none for calls that are not in the table."""
        try:
            every = list(products(operation(func), args, kwargs))
        except NotReadable:
            return []
        mine = [p for p in every if self.home(p.operand) is not None]
        return [p for p in mine if len(every) == 1 or self.home(p.x) is None]


class Paths(TorchFunctionMode):
    """The mode under which the model runs."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._weights = _Weights(parameters)

    @property
    def met(self) -> dict[str, Met]:
        """Weights that multiplied an activation."""
        return self._weights.met

    @property
    def unfollowed(self) -> set[str]:
        """Calls without a rule."""
        return self._weights.unfollowed

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = called(func), kwargs or {}
        if name in _MOVES or name.startswith("__get") or name == "__set__":
            return func(*args, **kwargs)
        carried = [t for t in tensors([*args, *kwargs.values()]) if t.requires_grad]
        reads = self._weights.reads(func, args, kwargs)
        if not carried and not reads and not (name == "embedding" and any(map(self._weights.parameter, args))):
            return func(*args, **kwargs)
        if reads:
            return _read(self._weights, func, args, kwargs, reads)
        base = name.removesuffix("_") if not name.startswith("__") else name
        if base in _PASS:
            return args[0] if args else kwargs["input"]
        rule = _RULES.get(base)
        output = rule(self._weights, func, args, kwargs) if rule else None
        if output is None:
            return _connect(self._weights, name, func(*args, **kwargs), carried)
        if name == "__iadd__" or (base != name and output.shape == args[0].shape):
            return args[0].copy_(output)
        return output


class _Saturate(torch.autograd.Function):
    """Replaces numbers by ones and zeros in both directions, so that they neither grow nor vanish with the depth."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return (value > 0).to(value.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return (grad > 0).to(grad.dtype)


def _saturate(value: Tensor) -> Tensor:
    output: Tensor = _Saturate.apply(value)  # type: ignore[no-untyped-call]
    return output


def _connect(weights: _Weights, name: str, result: Any, carried: list[Tensor]) -> Any:
    """Every output depends on every input."""
    outputs = [t for t in tensors(result) if t.is_floating_point()]
    if not outputs or not carried:
        return result
    weights.unfollowed.add(f"{name} ({unreadable(name)})" if unreadable(name) else name)
    total = _saturate(torch.stack([t.sum() for t in carried]).sum())
    joined = [total.expand(t.shape) for t in outputs]
    if isinstance(result, Tensor):
        return joined[0]
    swap = dict(zip(map(id, outputs), joined, strict=True))
    rebuilt = [swap.get(id(t), t) for t in result] if isinstance(result, tuple | list) else result
    return tuple(rebuilt) if isinstance(result, tuple) else rebuilt


# -- weights ------------------------------------------------------------------------------------------------------


def _read(weights: _Weights, func: Any, args: Args, kwargs: Kwargs, reads: list[Product]) -> Any:
    """A call that multiplies with weights, run without its bias, which carries no input."""
    if operation(func) == "multi_head_attention_forward":
        return _multi_head(weights, func, args, kwargs, reads)
    biases = {id(product.bias) for product in reads}
    without = [torch.zeros_like(a) if id(a) in biases and isinstance(a, Tensor) else a for a in args]
    rest = {key: torch.zeros_like(a) if id(a) in biases and isinstance(a, Tensor) else a for key, a in kwargs.items()}
    output = func(*without, **rest)
    for product in reads:
        output = _through(weights, product, output, product.x)
    return output


def _multi_head(weights: _Weights, func: Any, args: Args, kwargs: Kwargs, reads: list[Product]) -> Any:
    """Attention with its projections: every feature of a head depends on all features of the head."""
    *inputs, last = (replace(product, output=lambda output: output) for product in reads)
    parts = [_through(weights, p, functional.linear(p.x, p.operand), p.x) for p in inputs]
    heads = kwargs.get("num_heads", args[4] if len(args) > 4 else None)
    projected = parts if len(parts) == 3 else parts[0].chunk(3, -1)
    query, key, value = (t.reshape(*t.shape[:-1], heads, -1) for t in projected)
    scores = query.sum(-1, keepdim=True) + key.sum((0, -1), keepdim=True)
    mixed = _saturate(scores + value.sum(0, keepdim=True)).flatten(-2)
    output = _through(weights, last, functional.linear(mixed, last.operand), mixed)
    attention = _saturate(scores.sum((-1, -2))).movedim(0, -1).unsqueeze(-1)
    return output, attention.expand(*attention.shape[:-1], len(key))


def _through(weights: _Weights, product: Product, output: Tensor, x: Tensor) -> Tensor:
    """Record, in the backward pass, the elements of the weight that connect an input and an output on a path."""
    form, shape = product.form, product.operand.shape
    groups = form.sizes(shape)[0]
    alive = form.total((x.detach() > 0).double(), shape, once=True) > 0

    def outputs(values: Tensor) -> Mask:
        positive = product.output(values.detach()) > 0
        return torch.stack([form.rows(positive, shape, group).any(0) for group in range(groups)])

    def pairs(need: Mask) -> Mask:
        return form.restored(need[:, :, None].expand(form.sizes(shape)), shape) & alive

    layout: object = form.orientation
    if isinstance(form, Contraction):  # the same rows of a weight are the same outputs, turned or not
        axes = [form.weight.index(letter) for letter in form.batch + form.outer]
        layout = tuple((shape[axis], product.operand.stride(axis)) for axis in axes)
    return _watch(weights, product.operand, output, layout, outputs, pairs)


def _watch(
    weights: _Weights,
    weight: Tensor,
    output: Tensor,
    layout: object,
    outputs: Callable[[Tensor], Mask],
    pairs: Callable[[Mask], Mask],
) -> Tensor:
    """Record, in the backward pass of its output, the connections of a weight or of a view of one."""
    home = weights.home(weight)
    assert home is not None  # it was found to be one
    name, view = home
    if not output.requires_grad:
        output = output.detach().requires_grad_()
    output = _saturate(output)
    reached = outputs(output)
    met = weights.met.setdefault(name, Met(torch.zeros_like(weights.parameters[name], dtype=torch.bool)))
    live = met.outputs.setdefault((view.offset, layout), torch.zeros_like(reached.flatten()))

    def needed(grad: Tensor) -> None:
        need = outputs(grad)
        view.of(met.pairs).logical_or_(pairs(need))
        live.logical_or_((need & reached).flatten())

    output.register_hook(needed)  # type: ignore[no-untyped-call]
    return output


def _product(weights: _Weights, func: Any, args: Args, kwargs: Kwargs) -> Tensor | None:
    """A product of two activations: reached if either is reached."""
    value, weight = args[-2], args[-1]
    if len(args) > 2 or value.dim() < 2 or weight.dim() < 2:
        return None
    return _saturate(value.sum(-1, keepdim=True) + weight.sum(-2, keepdim=True))


def _embedding(weights: _Weights, func: Any, args: Args, kwargs: Kwargs) -> Tensor | None:
    given = dict(zip(("input", "weight"), args, strict=False)) | dict(kwargs)
    weight = given["weight"]
    if not weights.parameter(weight):
        return None

    def outputs(values: Tensor) -> Mask:
        return (values.detach() > 0).reshape(-1, weight.shape[1]).any(0)

    output = functional.embedding(given["input"], weight.detach())
    return _watch(weights, weight, output, "embedding", outputs, lambda need: need.expand(weight.shape))


# -- the rest -----------------------------------------------------------------------------------------------------


def _sum(weights: _Weights, func: Any, args: Args, kwargs: Kwargs) -> Tensor | None:
    """Sums and products of activations: reached if either is reached; a constant adds nothing."""
    name = called(func)
    operands = [*args, *(kwargs[key] for key in ("input", "other") if key in kwargs)]
    parts = [a for a in operands if isinstance(a, Tensor) and a.dim() + 1]
    live = [a for a in parts if a.requires_grad and not weights.parameter(a)]
    if not live:
        return None
    total = live[0]
    for other in live[1:]:
        total = total + other
    for constant in (p for p in parts if not any(p is one for one in live)):
        factor = (constant.detach() != 0) if "mul" in name else torch.ones_like(constant, dtype=torch.bool)
        total = total * factor
    return total


def _where(weights: _Weights, func: Any, args: Args, kwargs: Kwargs) -> Tensor | None:
    return _sum(weights, torch.add, args[1:], kwargs) if len(args) == 3 else None


def _scaled(position: int) -> Callable[..., Tensor]:
    """A normalization per channel: the channel passes if its scale is not zero."""

    def rule(weights: _Weights, func: Any, args: Args, kwargs: Kwargs) -> Tensor:
        value = args[0] if args else kwargs["input"]
        scale = kwargs.get("weight", args[position] if len(args) > position else None)
        if scale is None:
            return value  # type: ignore[no-any-return]
        return value * (scale.detach() != 0).reshape(-1, *[1] * (value.dim() - 2))  # type: ignore[no-any-return]

    return rule


def _layer_norm(weights: _Weights, func: Any, args: Args, kwargs: Kwargs) -> Tensor:
    given = dict(zip(("input", "normalized_shape", "weight"), args, strict=False)) | dict(kwargs)
    axes = tuple(range(-len(given["normalized_shape"]), 0))
    return _mixed(given["input"], axes, given.get("weight"))


def _group_norm(weights: _Weights, func: Any, args: Args, kwargs: Kwargs) -> Tensor:
    given = dict(zip(("input", "num_groups", "weight"), args, strict=False)) | dict(kwargs)
    value, scale = given["input"], given.get("weight")
    parted = value.unflatten(1, (given["num_groups"], -1))
    mixed = _mixed(parted, tuple(range(2, parted.dim()))).flatten(1, 2)
    return mixed if scale is None else mixed * (scale.detach() != 0).reshape(-1, *[1] * (value.dim() - 2))


def _mixed(value: Tensor, axes: tuple[int, ...], scale: Tensor | None = None) -> Tensor:
    output = _saturate(value.sum(axes, keepdim=True)).expand(value.shape)
    return output if scale is None else output * (scale.detach() != 0)


def _softmax(weights: _Weights, func: Any, args: Args, kwargs: Kwargs) -> Tensor | None:
    axis = kwargs.get("dim", args[1] if len(args) > 1 else None)
    return None if axis is None else _mixed(args[0] if args else kwargs["input"], (axis,))


def _attention(weights: _Weights, func: Any, args: Args, kwargs: Kwargs) -> Tensor | None:
    if len(args) < 3 or kwargs.get("enable_gqa"):
        return None
    query, key, value = args[:3]
    scores = query.sum(-1, keepdim=True) + key.sum((-1, -2), keepdim=True)
    return _saturate(scores + value.sum(-2, keepdim=True))


def _max_pool(weights: _Weights, func: Any, args: Args, kwargs: Kwargs) -> Tensor | None:
    """A mean over the same positions: the maximum is reached if any position is."""
    order = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    given = dict(zip(order, args, strict=False)) | dict(kwargs)
    dilation = given.pop("dilation", 1)
    if given.pop("return_indices", False) or any(
        d != 1 for d in ([dilation] if isinstance(dilation, int) else dilation)
    ):
        return None
    output: Tensor = getattr(functional, called(func).replace("max", "avg"))(**given)
    return output


_PASS = frozenset(
    (
        "relu relu6 gelu silu tanh leaky_relu elu selu celu mish hardswish hardtanh prelu softsign hardshrink "
        "softshrink threshold sigmoid hardsigmoid logsigmoid softplus dropout dropout1d dropout2d dropout3d "
        "alpha_dropout feature_alpha_dropout abs square sqrt rsqrt exp log log1p neg __neg__ pow __pow__ clamp "
        "clip clamp_min clamp_max erf sin cos to float double half bfloat16 type type_as detach masked_fill "
        "nan_to_num reciprocal round floor ceil sign"
    ).split()
)
"""Elementwise calls: the result is reached if the number is."""
_MOVES = frozenset(
    (
        "view reshape flatten unflatten transpose permute movedim swapaxes t mT expand repeat repeat_interleave cat "
        "concat stack hstack vstack split split_with_sizes chunk tensor_split unbind narrow select __getitem__ "
        "__setitem__ "
        "squeeze unsqueeze contiguous clone pad roll flip view_as expand_as broadcast_to gather index_select "
        "take_along_dim sum mean avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
        "adaptive_avg_pool3d "
        "pixel_shuffle pixel_unshuffle channel_shuffle unfold fold interpolate tril triu diagonal size dim numel shape "
        "copy_ zero_ requires_grad_ ones_like zeros_like full_like empty_like new_zeros new_ones is_floating_point "
        "is_complex __len__ register_hook stride data_ptr __bool__ requires_grad"
    ).split()
)
"""Calls that move or sum values, and calls that only read: run unchanged."""
_RULES: dict[str, Callable[[_Weights, Any, Args, Kwargs], Tensor | None]] = {
    **dict.fromkeys(("matmul", "__matmul__", "mm", "bmm", "addmm"), _product),
    "embedding": _embedding,
    **dict.fromkeys("add sub mul div true_divide maximum minimum rsub".split(), _sum),
    **dict.fromkeys([f"__{i}{op}__" for op in ("add", "sub", "mul", "truediv") for i in ("", "r", "i")], _sum),
    "where": _where,
    "batch_norm": _scaled(3),
    "instance_norm": _scaled(3),
    "layer_norm": _layer_norm,
    "rms_norm": _layer_norm,
    "group_norm": _group_norm,
    "softmax": _softmax,
    "log_softmax": _softmax,
    "scaled_dot_product_attention": _attention,
    **{f"max_pool{n}d": _max_pool for n in (1, 2, 3)},
}
