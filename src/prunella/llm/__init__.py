"""Language models: one-shot pruning block by block, dropped blocks, rotated and matched residual streams."""

from typing import TYPE_CHECKING

from prunella.errors import suggesting
from prunella.llm.alpha import alpha_sparsities as alpha_sparsities
from prunella.llm.blockwise import Solving as Solving
from prunella.llm.blockwise import solve_ as solve_
from prunella.llm.calibration import Calibration as Calibration
from prunella.llm.calibration import Split as Split
from prunella.llm.distributed import ProcessGroup as ProcessGroup
from prunella.llm.distributed import process_group as process_group
from prunella.llm.match import Match as Match
from prunella.llm.match import match_stream_ as match_stream_
from prunella.llm.match import replace_run as replace_run
from prunella.llm.own_text import OwnText as OwnText
from prunella.llm.own_text import own_text as own_text
from prunella.llm.presets import one_shot as one_shot
from prunella.llm.recipe import OneShot as OneShot
from prunella.llm.refine import Refine as Refine
from prunella.llm.rotate import Rotated as Rotated
from prunella.llm.rotate import rescale_ as rescale_
from prunella.llm.rotate import rotate as rotate
from prunella.llm.rotate import slice_stream as slice_stream
from prunella.llm.streaming import forecast as forecast
from prunella.llm.streaming import forecast_scaling as forecast_scaling
from prunella.llm.streaming import solve_folder as solve_folder
from prunella.planning.depth import drop_blocks as drop_blocks
from prunella.planning.depth import drop_run as drop_run

__all__ = [
    "Calibration",
    "Match",
    "OneShot",
    "OwnText",
    "ProcessGroup",
    "Refine",
    "Rotated",
    "Solving",
    "Split",
    "alpha_sparsities",
    "drop_blocks",
    "drop_run",
    "forecast",
    "forecast_scaling",
    "match_stream_",
    "one_shot",
    "own_text",
    "process_group",
    "replace_run",
    "rescale_",
    "rotate",
    "slice_stream",
    "solve_",
    "solve_folder",
]


def __dir__() -> list[str]:
    return __all__


if not TYPE_CHECKING:
    __getattr__ = suggesting(__name__)
