"""Models larger than memory: a Hugging Face folder is pruned block by block into another one: `solve_folder`."""

from prunella.streaming.folder import Forecast as Forecast
from prunella.streaming.folder import Streamed as Streamed
from prunella.streaming.folder import forecast as forecast
from prunella.streaming.folder import solve_folder as solve_folder
from prunella.streaming.job import Step as Step
