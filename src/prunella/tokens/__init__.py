"""Token pruning: tokens are merged between the blocks, and neurons masked per token."""

from typing import TYPE_CHECKING

from prunella.errors import suggesting
from prunella.tokens.contextual import contextual_ as contextual_
from prunella.tokens.contextual import keep_top as keep_top
from prunella.tokens.matching import Matching as Matching
from prunella.tokens.matching import bipartite_match as bipartite_match
from prunella.tokens.matching import merge as merge
from prunella.tokens.matching import unmerge as unmerge
from prunella.tokens.merging import TokenMerging as TokenMerging
from prunella.tokens.merging import merge_tokens_ as merge_tokens_

__all__ = [
    "Matching",
    "TokenMerging",
    "bipartite_match",
    "contextual_",
    "keep_top",
    "merge",
    "merge_tokens_",
    "unmerge",
]


def __dir__() -> list[str]:
    return __all__


if not TYPE_CHECKING:
    __getattr__ = suggesting(__name__)
