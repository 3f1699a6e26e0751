"""Models larger than memory: prune a Hugging Face folder block by block into another folder, by `solve_folder`."""

from prunella.llm.streaming.folder import Forecast as Forecast
from prunella.llm.streaming.folder import Streamed as Streamed
from prunella.llm.streaming.folder import forecast as forecast
from prunella.llm.streaming.folder import solve_folder as solve_folder
from prunella.llm.streaming.runner import BlockStep as BlockStep
from prunella.llm.streaming.scaling import forecast_scaling as forecast_scaling
