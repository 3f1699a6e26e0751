"""Names of calls that a recorded run treats specially."""

from __future__ import annotations

SIZED = frozenset(
    (
        "view reshape unflatten expand repeat split split_with_sizes chunk tensor_split narrow slice __getitem__ "
        "__setitem__ zeros ones empty new_zeros new_ones new_empty new_full conv1d conv2d conv3d conv_transpose1d "
        "conv_transpose2d conv_transpose3d group_norm channel_shuffle view_as expand_as pad broadcast_to histc "
        "bincount multi_head_attention_forward"
    ).split()
)
"""Calls whose integers are sizes, handled by the rules; in other calls a tracked size is used as a number."""


RESTRICTED = frozenset(
    "mean var std var_mean std_mean norm linalg_vector_norm sum normalize layer_norm rms_norm group_norm softmax "
    "topk".split()
)
"""Calls along an axis that the oracle can restrict to the kept positions."""
SIZE = "shape"
"""The name of a read of sizes, by `shape` or `size()`."""
CALCULATES = frozenset(
    f"{start}{name}{end}"
    for name in "add sub mul div truediv pow".split()
    for start, end in (("", ""), ("", "_"), ("__", "__"), ("__r", "__"), ("__i", "__"))
)
"""Calls in which an integer is a number among floating-point numbers."""


PARTS = frozenset("unbind split chunk tensor_split split_with_sizes".split())
"""Calls that split an axis into separate tensors."""
UNSEEN = "nothing passed through it: the example gives it an empty batch"
"""The reason for axes through which no position passes."""
NEEDS_DATA = frozenset("conv1d conv2d conv3d batch_norm instance_norm group_norm".split())
"""Calls that torch computes differently for an empty batch, so that the record is not complete."""


OPAQUE = frozenset("_native_multi_head_attention _transformer_encoder_layer_fwd ctc_loss".split())
"""Calls that check or compute sizes that neither mode observes."""
