"""Heal a pruned model: statistics, least squares, training, distillation."""

from prunella.recovery.bias import fold_means as fold_means
from prunella.recovery.calibrate import recalibrate_bn as recalibrate_bn
from prunella.recovery.distill import distill as distill
from prunella.recovery.distill import distill_features as distill_features
from prunella.recovery.distill import distill_logits as distill_logits
from prunella.recovery.finetune import finetune as finetune
from prunella.recovery.reconstruct import reconstruct as reconstruct
