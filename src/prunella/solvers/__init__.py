"""Methods that find the mask and the weights together, or new weights for a mask.

Layer solvers take one layer as a quadratic, `(weight, gram, pattern)`, and know no model: `sparsegpt`, `admm`, `refit`.
"""

from prunella.solvers.admm import admm as admm
from prunella.solvers.layer import Solved as Solved
from prunella.solvers.layer import by_score as by_score
from prunella.solvers.refit import refit as refit
from prunella.solvers.sparsegpt import sparsegpt as sparsegpt
