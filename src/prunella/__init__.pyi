"""The public face, for type checkers and for `lazy_loader`: what is not here is found in a namespace."""

from . import allocation as allocation
from . import compress as compress
from . import criteria as criteria
from . import experiments as experiments
from . import granularity as granularity
from . import integrations as integrations
from . import io as io
from . import llm as llm
from . import lottery as lottery
from . import metrics as metrics
from . import planning as planning
from . import recovery as recovery
from . import reporting as reporting
from . import runtime as runtime
from . import schedules as schedules
from . import search as search
from . import solvers as solvers
from . import tokens as tokens
from . import train as train
from . import transform as transform
from .allocation import global_ as global_
from .allocation import uniform as uniform
from .app.prune import Pruned as Pruned
from .app.prune import prune as prune
from .criteria import magnitude as magnitude
from .criteria import taylor as taylor
from .criteria import wanda as wanda
from .errors import PruningError as PruningError
from .granularity import NM as NM
from .granularity import Block as Block
from .granularity import Channel as Channel
from .granularity import Depth as Depth
from .granularity import Element as Element
from .granularity import Expert as Expert
from .granularity import Head as Head
from .granularity import Width as Width
from .graph.program.capture import as_program as as_program
from .io import importers as importers
from .io.artifact import load as load
from .io.artifact import save as save
from .io.export import export as export
from .model.masks import finalize as finalize
from .model.masks import masks_of as masks_of
from .planning import recipes as recipes
from .planning.plan import Plan as Plan
from .planning.planner import plan as plan
from .planning.recipe import Recipe as Recipe
from .recovery.batchnorm import recalibrate_bn as recalibrate_bn
from .recovery.distill import distill as distill
from .recovery.finetune import finetune as finetune
from .recovery.reconstruct import reconstruct as reconstruct
from .reporting.report import report as report
from .runtime.convert import sparse as sparse
from .targets import Bytes as Bytes
from .targets import Latency as Latency
from .targets import MACs as MACs
from .targets import Params as Params
from .targets import Sparsity as Sparsity
from .targets import Threshold as Threshold
from .train.pruner import Pruner as Pruner
from .transform.apply import apply_ as apply_
from .transform.shrink import shrink as shrink
from .types import Examples as Examples

__all__ = [
    "NM",
    "Block",
    "Bytes",
    "Channel",
    "Depth",
    "Element",
    "Examples",
    "Expert",
    "Head",
    "Latency",
    "MACs",
    "Params",
    "Plan",
    "Pruned",
    "Pruner",
    "PruningError",
    "Recipe",
    "Sparsity",
    "Threshold",
    "Width",
    "__version__",
    "allocation",
    "apply_",
    "as_program",
    "compress",
    "criteria",
    "distill",
    "experiments",
    "export",
    "finalize",
    "finetune",
    "global_",
    "granularity",
    "importers",
    "integrations",
    "io",
    "llm",
    "load",
    "lottery",
    "magnitude",
    "masks_of",
    "metrics",
    "plan",
    "planning",
    "prune",
    "recalibrate_bn",
    "recipes",
    "reconstruct",
    "recovery",
    "report",
    "reporting",
    "runtime",
    "save",
    "schedules",
    "search",
    "shrink",
    "solvers",
    "sparse",
    "taylor",
    "tokens",
    "train",
    "transform",
    "uniform",
    "wanda",
]

__version__: str
