"""Prune a trained model block by block, each from the outputs of the pruned blocks before it: `solve_`."""

from prunella.blockwise.one_shot import OneShot as OneShot
from prunella.blockwise.one_shot import Solving as Solving
from prunella.blockwise.one_shot import solve_ as solve_
from prunella.blockwise.preset import one_shot_recipe as one_shot_recipe
from prunella.blockwise.processes import processes as processes
from prunella.blockwise.refine import Refine as Refine
from prunella.blockwise.rotation import Rotated as Rotated
from prunella.blockwise.rotation import rescale_ as rescale_
from prunella.blockwise.rotation import rotate as rotate
from prunella.blockwise.rotation import slice_stream as slice_stream
from prunella.blockwise.spectrum import alpha_sparsities as alpha_sparsities
from prunella.blockwise.stream import Match as Match
from prunella.blockwise.stream import match_stream_ as match_stream_
from prunella.blockwise.stream import replace_run as replace_run
from prunella.planning.depth import drop_blocks as drop_blocks
from prunella.planning.depth import drop_run as drop_run
