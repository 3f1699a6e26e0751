"""Recover a pruned model: statistics, least squares, training, distillation."""

from typing import TYPE_CHECKING

from prunella.errors import suggesting
from prunella.recovery.adapters import Adapters as Adapters
from prunella.recovery.adapters import add_adapters_ as add_adapters_
from prunella.recovery.adapters import distill_lm_ as distill_lm_
from prunella.recovery.batchnorm import absorb_bn as absorb_bn
from prunella.recovery.batchnorm import recalibrate_bn as recalibrate_bn
from prunella.recovery.distill import distill as distill
from prunella.recovery.distill import distill_attention as distill_attention
from prunella.recovery.distill import distill_attention_probabilities as distill_attention_probabilities
from prunella.recovery.distill import distill_features as distill_features
from prunella.recovery.distill import distill_logits as distill_logits
from prunella.recovery.finetune import Training as Training
from prunella.recovery.finetune import finetune as finetune
from prunella.recovery.fold_means import FoldedMeans as FoldedMeans
from prunella.recovery.fold_means import fold_means as fold_means
from prunella.recovery.fsdp import hold_sharded_ as hold_sharded_
from prunella.recovery.lora import mask_adapters_ as mask_adapters_
from prunella.recovery.lora import merge_adapters_ as merge_adapters_
from prunella.recovery.lr_schedules import RecordedLR as RecordedLR
from prunella.recovery.lr_schedules import adaptive_lr as adaptive_lr
from prunella.recovery.lr_schedules import constant_lr as constant_lr
from prunella.recovery.lr_schedules import linear_lr as linear_lr
from prunella.recovery.lr_schedules import rewind_lr as rewind_lr
from prunella.recovery.lr_schedules import scaled_lr as scaled_lr
from prunella.recovery.moments import correct_statistics as correct_statistics
from prunella.recovery.reconstruct import reconstruct as reconstruct

__all__ = [
    "Adapters",
    "FoldedMeans",
    "RecordedLR",
    "Training",
    "absorb_bn",
    "adaptive_lr",
    "add_adapters_",
    "constant_lr",
    "correct_statistics",
    "distill",
    "distill_attention",
    "distill_attention_probabilities",
    "distill_features",
    "distill_lm_",
    "distill_logits",
    "finetune",
    "fold_means",
    "hold_sharded_",
    "linear_lr",
    "mask_adapters_",
    "merge_adapters_",
    "recalibrate_bn",
    "reconstruct",
    "rewind_lr",
    "scaled_lr",
]


def __dir__() -> list[str]:
    return __all__


if not TYPE_CHECKING:
    __getattr__ = suggesting(__name__)
