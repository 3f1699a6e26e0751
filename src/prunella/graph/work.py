"""Multiply-adds of ATen operations: the one table of formulas, for plans (over labels) and for reports (in numbers).

A multiply-add is 1. Products count, with a weight or without: matrix products, convolutions, attention, recurrent
steps. Elementwise work, lookups, norms and pooling are free. An operation in neither table, and every custom operation
without a formula, is *uncounted*: its work is unknown, and every report of a count names it. A formula can be added by
`torch.utils.flop_counter.register_flop_formula`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator

Place = tuple[Tensor, int]
"""One axis of one tensor of an operation."""


@dataclass(frozen=True, eq=False)
class Term:
    """Multiply-adds: `constant` times the sizes of these axes."""

    constant: int
    sizes: tuple[Place, ...] = ()

    @property
    def macs(self) -> int:
        """The number."""
        return self.constant * math.prod(int(tensor.shape[axis]) for tensor, axis in self.sizes)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that are multiplied, each once."""
        return tuple({id(tensor): tensor for tensor, _ in self.sizes}.values())


Formula = Callable[[tuple[Any, ...], tuple[Tensor, ...]], Iterable[Term]]
"""A function of the arguments by position and of the outputs."""
FORMULAS: dict[str, Formula] = {}
FREE: set[str] = set()
"""Operations without multiply-adds, `UNKNOWN` ones apart; the registry of rules adds those of ATen that have a rule."""

UNKNOWN = frozenset({"_fft_r2c", "_fft_c2c", "_fft_c2r"})
"""Operations with a rule whose multiply-adds depend on the kernel."""


def name_of(func: Any) -> str:
    """`relu` for `aten.relu_.default`, `mylib.op` in another namespace, `cond` for what takes functions."""
    if isinstance(func, HigherOrderOperator):
        return str(func.name())  # type: ignore[no-untyped-call]
    namespace, _, name = func._schema.name.partition("::")
    return name.removesuffix("_") if namespace == "aten" else f"{namespace}.{name}"


def positional(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """All arguments in the order of the schema, with defaults filled in."""
    arguments = []
    for k, argument in enumerate(func._schema.arguments):
        default = argument.default_value if argument.has_default_value() else None
        arguments.append(args[k] if k < len(args) else kwargs.get(argument.name, default))
    return tuple(arguments)


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors in nested tuples and lists."""
    if isinstance(tree, Tensor):
        return [tree]
    return [t for item in tree for t in tensors_in(item)] if isinstance(tree, tuple | list) else []


def pointwise(func: Any) -> bool:
    """Whether an ATen operation works element by element."""
    return torch.Tag.pointwise in func.tags


def known(func: Any) -> bool:
    """Whether the work of an operation is known without a look into torch's own table."""
    if isinstance(func, HigherOrderOperator):
        return False
    name = name_of(func)
    return name in FORMULAS or name in FREE or pointwise(func) or func.is_view


def terms(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: tuple[Tensor, ...]) -> list[Term] | None:
    """The multiply-adds of one executed operation; None if they are unknown."""
    formula = FORMULAS.get(name_of(func))
    if formula is not None and not isinstance(func, HigherOrderOperator):
        try:
            done = list(formula(positional(func, args, kwargs), outputs))
            return done if all(term.macs >= 0 for term in done) else None
        except (TypeError, ValueError, IndexError, AttributeError, RuntimeError):  # layouts that have no such sizes
            return None
    return [] if known(func) else _registered(func, args, kwargs, outputs)


def _registered(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: tuple[Tensor, ...]
) -> list[Term] | None:
    """The multiply-adds by the formula that torch, or the model's author, registered for torch's own counter."""
    from torch.utils.flop_counter import flop_registry  # takes a third of a second

    count = flop_registry.get(getattr(func, "_overloadpacket", func))
    if count is None:
        return None
    result = outputs[0] if len(outputs) == 1 else outputs
    return [Term(int(count(*args, **kwargs, out_val=result)) // 2)]


@contextmanager
def counting() -> Iterator[None]:
    """Inside, multiply-adds are counted: layers with kernels outside torch run torch's operations instead."""
    global _counters
    _counters += 1
    try:
        yield
    finally:
        _counters -= 1


def is_counting() -> bool:
    """Whether multiply-adds are being counted."""
    return _counters > 0


_counters = 0  # a plain number, since torch.compile reads no context variables


def formula(*names: str) -> Callable[[Formula], Formula]:
    """Register the formula of operations by name."""

    def register(function: Formula) -> Formula:
        for name in names:
            FORMULAS[name] = function
        return function

    return register


def _all(tensor: Tensor) -> tuple[Place, ...]:
    return tuple((tensor, axis) for axis in range(tensor.dim()))


# -- matrix products -----------------------------------------------------------------------------------------------


@formula("mm", "bmm", "_int_mm", "_scaled_mm", "_scaled_mm_v2")
def product(args: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> Iterator[Term]:
    """`(..., m, k) @ (..., k, n)`: every element of the first matrix is multiplied once per column of the second."""
    yield Term(1, (*_all(args[0]), (args[1], args[1].dim() - 1)))


@formula("addmm", "baddbmm", "addbmm", "_addmm_activation")
def added_product(args: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> Iterable[Term]:
    """A product that is added to the first tensor."""
    return product(args[1:], outputs)


@formula("_sparse_addmm")
def sparse_product(args: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> Iterator[Term]:
    """Every stored element of a sparse matrix multiplies one row of a dense one."""
    yield Term(args[1]._nnz(), ((args[2], 1),))


@formula("mv", "dot", "vdot")
def vectors(args: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> Iterator[Term]:
    """`(m, k) @ (k)` or `(k) @ (k)`."""
    yield Term(1, _all(args[0]))


@formula("addmv")
def added_vector(args: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> Iterator[Term]:
    """`(m) + (m, k) @ (k)`."""
    yield Term(1, _all(args[1]))


@formula("linear", "_weight_int8pack_mm")
def linear(args: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> Iterator[Term]:
    """`(..., in)` by `(out, in)`."""
    x, weight = args[0], args[1]
    yield Term(1, (*_all(x), *[(weight, 0)][: weight.dim() - 1]))


@formula("quantized.linear", "quantized.linear_relu", "quantized.linear_dynamic", "quantized.linear_relu_dynamic",
         "quantized.linear_dynamic_fp16", "_weight_int4pack_mm", "_weight_int4pack_mm_for_cpu")  # fmt: skip
def packed_linear(args: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> Iterator[Term]:
    """A weight in a packed layout: every output sums over the last axis of the input."""
    yield Term(args[0].shape[-1], _all(outputs[0]))


@formula("_grouped_mm", "_scaled_grouped_mm", "transformers.grouped_mm_fallback")
def grouped(args: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> Iterator[Term]:
    """Rows sorted by matrix: each row is multiplied by one matrix `(k, n)`; two stacks are a batch of products."""
    a, b = args[0], args[1]
    if a.dim() == 2 and b.dim() == 3:
        yield Term(a.shape[0], ((b, 1), (b, 2)))
    else:
        yield Term(1, (*_all(a), (b, b.dim() - 1)))


@formula("_trilinear")
def bilinear(args: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> Iterator[Term]:
    """`nn.Bilinear`: every weight once for each row of the inputs."""
    x, weight = args[0], args[1]
    if tuple(args[6]) != (2, 3):
        raise ValueError("another contraction than that of nn.Bilinear")
    yield Term(1, ((x, 0), *_all(weight)))


# -- convolutions --------------------------------------------------------------------------------------------------


@formula("convolution", "_convolution", "convolution_overrideable")
def convolution(args: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> Iterator[Term]:
    """`batch * out * (in / groups) * kernel * positions`; the positions of a transposed one are those of its input."""
    yield _slid(args[0], args[1], outputs[0], transposed=bool(args[6]))


@formula("cudnn_convolution", "mkldnn_convolution", "miopen_convolution", "torchvision.deform_conv2d")
def plain_convolution(args: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> Iterator[Term]:
    """A convolution that is not transposed."""
    yield _slid(args[0], args[1], outputs[0], transposed=False)


@formula("cudnn_convolution_transpose", "miopen_convolution_transpose")
def transposed_convolution(args: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> Iterator[Term]:
    """A transposed convolution."""
    yield _slid(args[0], args[1], outputs[0], transposed=True)


def _slid(x: Tensor, weight: Tensor, out: Tensor, *, transposed: bool) -> Term:
    lead = x.dim() - weight.dim() + 1  # 0 for a single sample without a batch
    axes = range(lead + 1, x.dim())
    same = [k for k, length in zip(axes, weight.shape[2:], strict=True) if length == 1 and x.shape[k] == out.shape[k]]
    moved = math.prod((x if transposed else out).shape[k] for k in axes if k not in same)
    kept = (*((x, 0),)[:lead], (weight, 0), (weight, 1), *((x, k) for k in same))
    return Term(moved * math.prod(weight.shape[2:]), kept)


@formula("conv_tbc")
def convolution_of_time(args: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> Iterator[Term]:
    """`(time, batch, in)` by `(kernel, in, out)`."""
    yield Term(outputs[0].shape[0] * args[0].shape[1], _all(args[1]))


@formula(*(f"quantized.conv{n}d{act}" for n in (1, 2, 3) for act in ("", "_relu", "_dynamic")))
def packed_convolution(args: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> Iterator[Term]:
    """A convolution whose weight `(out, in / groups, *kernel)` is packed."""
    weight = args[1].unpack()[0]
    yield Term(math.prod(weight.shape[1:]), _all(outputs[0]))


# -- attention and recurrent layers --------------------------------------------------------------------------------


@formula(*(f"_scaled_dot_product_{kernel}" for kernel in (
    "flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention", "attention_math_for_mps",
    "fused_attention_overrideable")))  # fmt: skip
def attention(args: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> Iterator[Term]:
    """`queries @ keys` and `scores @ values` at all positions, including masked ones that the kernel may skip."""
    query, key, value = args[0], args[1], args[2]
    rows = _all(query)[:-1]
    width = query.dim() - 1
    yield Term(1, (*rows, (key, width - 1), (query, width)))
    yield Term(1, (*rows, (key, width - 1), (value, width)))


@formula("mkldnn_rnn_layer")
def recurrent_layer(args: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> Iterator[Term]:
    """One layer in one direction: every step of every sequence is multiplied by both weights."""
    yield from _steps(args[0], args[1:3])


@formula("_cudnn_rnn", "miopen_rnn")
def recurrent(args: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> Iterator[Term]:
    """All layers in all directions."""
    yield from _steps(args[0], args[1])


@formula("quantized_lstm", "quantized_gru")
def packed_recurrent(args: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> Iterator[Term]:
    """Packed weights: the work is unknown."""
    raise ValueError("its weights are packed")


def _steps(x: Tensor, weights: Iterable[Tensor]) -> Iterator[Term]:
    """x `(time, batch, in)`, or packed `(steps, in)`."""
    for weight in weights:
        if weight.dim() == 2:
            yield Term(1, (*_all(x)[:-1], *_all(weight)))


FREE |= set(
    "_adaptive_avg_pool1d _batch_norm_with_update_functional _chunk_cat _embedding_bag _embedding_bag_forward_only "
    "_fused_moving_avg_obs_fq_helper _functional_assert_async _assert_async _assert_scalar _assert_tensor_metadata "
    "_functional_sym_constrain_range _functional_sym_constrain_range_for_size sym_constrain_range "
    "sym_constrain_range_for_size _jagged_to_padded_dense_forward _list_to_tensor _local_scalar_dense "
    "_masked_scale _native_batch_norm_legit_functional _nested_tensor_from_mask _pack_padded_sequence "
    "_pad_packed_sequence _padded_dense_to_jagged_forward _pin_memory _print _resize_output _spdiags "
    "_standard_gamma _thnn_fused_gru_cell _thnn_fused_lstm_cell _to_copy _to_dense _unique _unique2 _unsafe_index "
    "_unsafe_masked_index _unsafe_masked_index_put_accumulate _upsample_lanczos2d_aa _upsample_nearest_exact1d "
    "_upsample_nearest_exact2d _upsample_nearest_exact3d _weight_norm_interface adaptive_max_pool1d "
    "adaptive_max_pool3d addr affine_grid_generator aminmax as_strided as_strided_scatter avg_pool1d bartlett_window "
    "bernoulli binary_cross_entropy binary_cross_entropy_with_logits blackman_window block_diag bucketize cauchy "
    "col2im complex cross_entropy cummax cummin detach diag_embed diagonal diagonal_scatter dist embedding_renorm "
    "empty_like empty_permuted exponential equal fake_quantize_per_channel_affine_cachemask "
    "fake_quantize_per_tensor_affine_cachemask _fake_quantize_per_tensor_affine_cachemask_tensor_qparams "
    "_fake_quantize_learnable_per_tensor_affine _fake_quantize_learnable_per_channel_affine fractional_max_pool2d "
    "fractional_max_pool3d geometric grid_sampler_2d grid_sampler_3d hamming_window hann_window huber_loss im2col "
    "index_add index_copy index_fill index_put index_reduce is_coalesced is_pinned is_same_size isin item kthvalue "
    "lift linalg_cross log_normal logspace max_unpool2d max_unpool3d masked_scatter masked_select "
    "miopen_batch_norm mode mse_loss multi_margin_loss multilabel_margin_loss_forward multinomial nanmedian "
    "nll_loss2d_forward nll_loss_forward nonzero nonzero_static normal poisson polar quantize_per_channel "
    "quantize_per_tensor quantize_per_tensor_dynamic dequantize int_repr q_scale q_zero_point randint_like "
    "reflection_pad3d renorm repeat_interleave replication_pad3d resize resize_as roll rot90 rrelu_with_noise "
    "rrelu_with_noise_functional scatter scatter_add scatter_reduce searchsorted segment_reduce select_scatter set "
    "size slice_scatter smooth_l1_loss soft_margin_loss stride take threshold to trace unfold uniform "
    "unique_consecutive unique_dim unsafe_split unsafe_split_with_sizes view_as_complex view_as_real "
    "torchvision.nms torchvision.roi_align torchvision.roi_pool torchvision.ps_roi_align torchvision.ps_roi_pool "
    "prim.device _sparse_coo_tensor_with_dims_and_tensors _sparse_coo_tensor_unsafe _coalesce _coalesced _to_sparse "
    "_to_sparse_csr _to_sparse_csc _sparse_compressed_tensor_unsafe _indices _values indices values crow_indices "
    "col_indices _nnz".split()
)
