"""Transformations of a model: masks, cuts, permutations, and the optimizer state after a cut."""

from typing import TYPE_CHECKING

from prunella.errors import suggesting
from prunella.model.masks import copy_masks_ as copy_masks_
from prunella.model.masks import finalize as finalize
from prunella.model.masks import masks_of as masks_of
from prunella.model.masks import plain_weights_ as plain_weights_
from prunella.model.masks import reapply_ as reapply_
from prunella.transform.apply import apply_ as apply_
from prunella.transform.controls import collapsed as collapsed
from prunella.transform.controls import reinitialized as reinitialized
from prunella.transform.controls import shuffled_plan as shuffled_plan
from prunella.transform.optimizer import carry_ as carry_
from prunella.transform.permute import permute as permute
from prunella.transform.shrink import shrink as shrink

__all__ = [
    "apply_",
    "carry_",
    "collapsed",
    "copy_masks_",
    "finalize",
    "masks_of",
    "permute",
    "plain_weights_",
    "reapply_",
    "reinitialized",
    "shrink",
    "shuffled_plan",
]


def __dir__() -> list[str]:
    return __all__


if not TYPE_CHECKING:
    __getattr__ = suggesting(__name__)
