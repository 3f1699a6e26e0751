"""Prune a neural network, and heal it: smaller, measurably faster, and proven.

Public names are loaded when first used, so that the command line answers before torch is imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunella.allocation import Normalise as Normalise
    from prunella.allocation import erk as erk
    from prunella.allocation import erk_densities as erk_densities
    from prunella.allocation import global_ as global_
    from prunella.allocation import lamp as lamp
    from prunella.allocation import owl as owl
    from prunella.allocation import uniform as uniform
    from prunella.apply import apply_ as apply_
    from prunella.apply import finalize as finalize
    from prunella.apply import masks_of as masks_of
    from prunella.apply import reapply_ as reapply_
    from prunella.blockwise import OneShot as OneShot
    from prunella.blockwise import Refine as Refine
    from prunella.blockwise import rescale_ as rescale_
    from prunella.blockwise import rotate as rotate
    from prunella.blockwise import solve_ as solve_
    from prunella.compress.huffman import huffman as huffman
    from prunella.compress.huffman import relative_index as relative_index
    from prunella.compress.int8 import to_int8_ as to_int8_
    from prunella.compress.low_rank import low_rank as low_rank
    from prunella.compress.low_rank import svd_factors as svd_factors
    from prunella.compress.quantise import quantisation_aware as quantisation_aware
    from prunella.compress.quantise import quantise_weight as quantise_weight
    from prunella.compress.quantise import round_weights_ as round_weights_
    from prunella.compress.share import Start as Start
    from prunella.compress.share import deep_compression_ as deep_compression_
    from prunella.compress.share import share_weight as share_weight
    from prunella.criteria import bn_scale as bn_scale
    from prunella.criteria import geometric_median as geometric_median
    from prunella.criteria import group_norm as group_norm
    from prunella.criteria import magnitude as magnitude
    from prunella.criteria import random as random
    from prunella.criteria import taylor as taylor
    from prunella.criteria import taylor_sq as taylor_sq
    from prunella.criteria import wanda as wanda
    from prunella.errors import PruningError as PruningError
    from prunella.granularity import NM as NM
    from prunella.granularity import Block as Block
    from prunella.granularity import Channel as Channel
    from prunella.granularity import Depth as Depth
    from prunella.granularity import Element as Element
    from prunella.granularity import Expert as Expert
    from prunella.granularity import Head as Head
    from prunella.granularity import Reduce as Reduce
    from prunella.granularity import Vocabulary as Vocabulary
    from prunella.granularity import Width as Width
    from prunella.importers import import_plan as import_plan
    from prunella.metrics.effects import SideEffects as SideEffects
    from prunella.metrics.effects import side_effects as side_effects
    from prunella.metrics.outputs import calibration_error as calibration_error
    from prunella.metrics.outputs import flip_rate as flip_rate
    from prunella.metrics.outputs import kl_divergence as kl_divergence
    from prunella.metrics.outputs import per_class_drop as per_class_drop
    from prunella.metrics.outputs import pruning_identified_exemplars as pruning_identified_exemplars
    from prunella.metrics.reach import EffectiveSparsity as EffectiveSparsity
    from prunella.metrics.reach import effective_sparsity as effective_sparsity
    from prunella.metrics.size import Compression as Compression
    from prunella.metrics.size import compression_ratio as compression_ratio
    from prunella.metrics.speed import Speedup as Speedup
    from prunella.metrics.speed import effective_macs as effective_macs
    from prunella.metrics.speed import energy as energy
    from prunella.metrics.speed import speedup as speedup
    from prunella.pipeline import Plan as Plan
    from prunella.pipeline import Recipe as Recipe
    from prunella.pipeline import plan as plan
    from prunella.program import as_program as as_program
    from prunella.realize.artifact import load as load
    from prunella.realize.artifact import save as save
    from prunella.realize.carry import carry_ as carry_
    from prunella.realize.export import export as export
    from prunella.realize.plan_file import load_plan as load_plan
    from prunella.realize.plan_file import save_plan as save_plan
    from prunella.realize.shrink import shrink as shrink
    from prunella.recovery.calibrate import recalibrate_bn as recalibrate_bn
    from prunella.recovery.distill import distill as distill
    from prunella.recovery.distill import distill_attention as distill_attention
    from prunella.recovery.distill import distill_attention_probabilities as distill_attention_probabilities
    from prunella.recovery.distill import distill_features as distill_features
    from prunella.recovery.distill import distill_logits as distill_logits
    from prunella.recovery.finetune import Training as Training
    from prunella.recovery.finetune import finetune as finetune
    from prunella.recovery.lora import mask_adapters_ as mask_adapters_
    from prunella.recovery.lora import merge_adapters_ as merge_adapters_
    from prunella.recovery.rates import Replay as Replay
    from prunella.recovery.rates import adaptive_rate as adaptive_rate
    from prunella.recovery.rates import constant_rate as constant_rate
    from prunella.recovery.rates import linear_rate as linear_rate
    from prunella.recovery.rates import rewind_rate as rewind_rate
    from prunella.recovery.rates import scaled_rate as scaled_rate
    from prunella.recovery.reconstruct import reconstruct as reconstruct
    from prunella.recovery.statistics import correct_statistics as correct_statistics
    from prunella.reporting.count import count as count
    from prunella.reporting.frontier import Frontier as Frontier
    from prunella.reporting.frontier import write_frontier as write_frontier
    from prunella.reporting.latency import compare_latency as compare_latency
    from prunella.reporting.page import write_page as write_page
    from prunella.reporting.report import Curve as Curve
    from prunella.reporting.report import Report as Report
    from prunella.reporting.report import report as report
    from prunella.schedule import cosine as cosine
    from prunella.schedule import cubic as cubic
    from prunella.schedule import exponential as exponential
    from prunella.schedule import linear as linear
    from prunella.schedule import one_shot as one_shot
    from prunella.solvers import admm as admm
    from prunella.solvers import by_score as by_score
    from prunella.solvers import refit as refit
    from prunella.solvers import sparsegpt as sparsegpt
    from prunella.study import Study as Study
    from prunella.study import pareto as pareto
    from prunella.targets import Bytes as Bytes
    from prunella.targets import MACs as MACs
    from prunella.targets import Params as Params
    from prunella.targets import Sparsity as Sparsity
    from prunella.train.pruner import Pruner as Pruner

__version__ = "0.1.0"

_HOME = {
    "bn_scale": "criteria",
    "geometric_median": "criteria",
    "group_norm": "criteria",
    "magnitude": "criteria",
    "random": "criteria",
    "taylor": "criteria",
    "taylor_sq": "criteria",
    "wanda": "criteria",
    "Normalise": "allocation",
    "erk": "allocation",
    "erk_densities": "allocation",
    "global_": "allocation",
    "lamp": "allocation",
    "owl": "allocation",
    "uniform": "allocation",
    "Block": "granularity",
    "Channel": "granularity",
    "Depth": "granularity",
    "Element": "granularity",
    "Expert": "granularity",
    "Head": "granularity",
    "Vocabulary": "granularity",
    "Width": "granularity",
    "NM": "granularity",
    "Reduce": "granularity",
    "Plan": "pipeline",
    "Recipe": "pipeline",
    "plan": "pipeline",
    "import_plan": "importers",
    "Bytes": "targets",
    "Params": "targets",
    "Sparsity": "targets",
    "PruningError": "errors",
    "MACs": "targets",
    "apply_": "apply",
    "finalize": "apply",
    "masks_of": "apply",
    "reapply_": "apply",
    "Pruner": "train.pruner",
    "cosine": "schedule",
    "cubic": "schedule",
    "exponential": "schedule",
    "linear": "schedule",
    "one_shot": "schedule",
    "recalibrate_bn": "recovery.calibrate",
    "reconstruct": "recovery.reconstruct",
    "Training": "recovery.finetune",
    "finetune": "recovery.finetune",
    "distill": "recovery.distill",
    "distill_features": "recovery.distill",
    "distill_logits": "recovery.distill",
    "Start": "compress.share",
    "deep_compression_": "compress.share",
    "huffman": "compress.huffman",
    "low_rank": "compress.low_rank",
    "quantisation_aware": "compress.quantise",
    "quantise_weight": "compress.quantise",
    "relative_index": "compress.huffman",
    "round_weights_": "compress.quantise",
    "share_weight": "compress.share",
    "svd_factors": "compress.low_rank",
    "to_int8_": "compress.int8",
    "Replay": "recovery.rates",
    "adaptive_rate": "recovery.rates",
    "constant_rate": "recovery.rates",
    "correct_statistics": "recovery.statistics",
    "distill_attention": "recovery.distill",
    "distill_attention_probabilities": "recovery.distill",
    "linear_rate": "recovery.rates",
    "mask_adapters_": "recovery.lora",
    "merge_adapters_": "recovery.lora",
    "rewind_rate": "recovery.rates",
    "scaled_rate": "recovery.rates",
    "OneShot": "blockwise",
    "Refine": "blockwise",
    "rescale_": "blockwise",
    "rotate": "blockwise",
    "solve_": "blockwise",
    "admm": "solvers",
    "by_score": "solvers",
    "refit": "solvers",
    "sparsegpt": "solvers",
    "as_program": "program",
    "carry_": "realize.carry",
    "export": "realize.export",
    "load": "realize.artifact",
    "save": "realize.artifact",
    "load_plan": "realize.plan_file",
    "save_plan": "realize.plan_file",
    "shrink": "realize.shrink",
    "count": "reporting.count",
    "compare_latency": "reporting.latency",
    "write_page": "reporting.page",
    "Curve": "reporting.report",
    "Report": "reporting.report",
    "report": "reporting.report",
    "Compression": "metrics.size",
    "EffectiveSparsity": "metrics.reach",
    "Frontier": "reporting.frontier",
    "SideEffects": "metrics.effects",
    "Speedup": "metrics.speed",
    "Study": "study",
    "calibration_error": "metrics.outputs",
    "compression_ratio": "metrics.size",
    "effective_macs": "metrics.speed",
    "effective_sparsity": "metrics.reach",
    "energy": "metrics.speed",
    "flip_rate": "metrics.outputs",
    "kl_divergence": "metrics.outputs",
    "pareto": "study",
    "per_class_drop": "metrics.outputs",
    "pruning_identified_exemplars": "metrics.outputs",
    "side_effects": "metrics.effects",
    "speedup": "metrics.speed",
    "write_frontier": "reporting.frontier",
}

__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'prunella' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"prunella.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return list(__all__)
