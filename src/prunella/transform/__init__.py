"""What changes a model: masks applied, units cut, rows permuted, optimizers carried along."""

from prunella.model.masks import finalize as finalize
from prunella.model.masks import masks_of as masks_of
from prunella.model.masks import reapply_ as reapply_
from prunella.transform.apply import apply_ as apply_
from prunella.transform.optimizer import carry_ as carry_
from prunella.transform.permute import permute as permute
from prunella.transform.sanity import collapsed as collapsed
from prunella.transform.sanity import reinitialised as reinitialised
from prunella.transform.sanity import shuffled_plan as shuffled_plan
from prunella.transform.shrink import shrink as shrink

__all__ = [
    "apply_",
    "carry_",
    "collapsed",
    "finalize",
    "masks_of",
    "permute",
    "reapply_",
    "reinitialised",
    "shrink",
    "shuffled_plan",
]


def __dir__() -> list[str]:
    return __all__
