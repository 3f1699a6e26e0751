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
    from prunella.allocation import fixed as fixed
    from prunella.allocation import from_scan as from_scan
    from prunella.allocation import global_ as global_
    from prunella.allocation import isomorphic as isomorphic
    from prunella.allocation import lamp as lamp
    from prunella.allocation import owl as owl
    from prunella.allocation import per_round as per_round
    from prunella.allocation import uniform as uniform
    from prunella.allocation import uniform_plus as uniform_plus
    from prunella.compress.huffman import huffman as huffman
    from prunella.compress.huffman import relative_index as relative_index
    from prunella.compress.int8 import to_int8_ as to_int8_
    from prunella.compress.low_rank import low_rank as low_rank
    from prunella.compress.low_rank import svd_factors as svd_factors
    from prunella.compress.quantize import quantisation_aware as quantisation_aware
    from prunella.compress.quantize import quantise_weight as quantise_weight
    from prunella.compress.quantize import round_weights_ as round_weights_
    from prunella.compress.storage import Format as Format
    from prunella.compress.storage import stored_bytes as stored_bytes
    from prunella.compress.weight_sharing import Start as Start
    from prunella.compress.weight_sharing import deep_compression_ as deep_compression_
    from prunella.compress.weight_sharing import share_weight as share_weight
    from prunella.criteria import activation_norm as activation_norm
    from prunella.criteria import activation_variance as activation_variance
    from prunella.criteria import apoz as apoz
    from prunella.criteria import block_influence as block_influence
    from prunella.criteria import bn_scale as bn_scale
    from prunella.criteria import fisher as fisher
    from prunella.criteria import fluctuation as fluctuation
    from prunella.criteria import geometric_median as geometric_median
    from prunella.criteria import grasp as grasp
    from prunella.criteria import group_norm as group_norm
    from prunella.criteria import head_importance as head_importance
    from prunella.criteria import hrank as hrank
    from prunella.criteria import inverted as inverted
    from prunella.criteria import magnitude as magnitude
    from prunella.criteria import mfac_saliency as mfac_saliency
    from prunella.criteria import movement as movement
    from prunella.criteria import obd as obd
    from prunella.criteria import obert as obert
    from prunella.criteria import obs_saliency as obs_saliency
    from prunella.criteria import random as random
    from prunella.criteria import reap as reap
    from prunella.criteria import ria as ria
    from prunella.criteria import router_frequency as router_frequency
    from prunella.criteria import router_weight as router_weight
    from prunella.criteria import shuffled as shuffled
    from prunella.criteria import snip as snip
    from prunella.criteria import synflow as synflow
    from prunella.criteria import taylor as taylor
    from prunella.criteria import taylor_abs as taylor_abs
    from prunella.criteria import taylor_sq as taylor_sq
    from prunella.criteria import wanda as wanda
    from prunella.errors import PruningError as PruningError
    from prunella.experiments.compare import compare as compare
    from prunella.experiments.pareto import Study as Study
    from prunella.experiments.pareto import pareto as pareto
    from prunella.granularity import NM as NM
    from prunella.granularity import Block as Block
    from prunella.granularity import Channel as Channel
    from prunella.granularity import Depth as Depth
    from prunella.granularity import Element as Element
    from prunella.granularity import Expert as Expert
    from prunella.granularity import Filter as Filter
    from prunella.granularity import Head as Head
    from prunella.granularity import Kernel as Kernel
    from prunella.granularity import KernelPattern as KernelPattern
    from prunella.granularity import Reduce as Reduce
    from prunella.granularity import Vector as Vector
    from prunella.granularity import Vocabulary as Vocabulary
    from prunella.granularity import Width as Width
    from prunella.graph.program.capture import as_program as as_program
    from prunella.io.add_biases import with_biases as with_biases
    from prunella.io.artifact import load as load
    from prunella.io.artifact import save as save
    from prunella.io.card import Card as Card
    from prunella.io.card import write_card as write_card
    from prunella.io.export import export as export
    from prunella.io.importers import import_plan as import_plan
    from prunella.io.plan_file import load_plan as load_plan
    from prunella.io.plan_file import save_plan as save_plan
    from prunella.llm import Match as Match
    from prunella.llm import OneShot as OneShot
    from prunella.llm import Refine as Refine
    from prunella.llm import alpha_sparsities as alpha_sparsities
    from prunella.llm import drop_blocks as drop_blocks
    from prunella.llm import drop_run as drop_run
    from prunella.llm import match_stream_ as match_stream_
    from prunella.llm import one_shot_recipe as one_shot_recipe
    from prunella.llm import replace_run as replace_run
    from prunella.llm import rescale_ as rescale_
    from prunella.llm import rotate as rotate
    from prunella.llm import slice_stream as slice_stream
    from prunella.llm import solve_ as solve_
    from prunella.llm.distributed import processes as processes
    from prunella.llm.streaming import forecast as forecast
    from prunella.llm.streaming import solve_folder as solve_folder
    from prunella.lottery.connectivity import barrier as barrier
    from prunella.lottery.connectivity import instability as instability
    from prunella.lottery.early_bird import EarlyBird as EarlyBird
    from prunella.lottery.early_bird import mask_distance as mask_distance
    from prunella.lottery.imp import imp as imp
    from prunella.lottery.search import RateRewind as RateRewind
    from prunella.lottery.search import WeightRewind as WeightRewind
    from prunella.lottery.search import find_ticket as find_ticket
    from prunella.lottery.session import Lap as Lap
    from prunella.lottery.training import Course as Course
    from prunella.lottery.training import descent as descent
    from prunella.measure.count import count as count
    from prunella.measure.throughput import throughput as throughput
    from prunella.measure.timing import Timing as Timing
    from prunella.measure.timing import compare_latency as compare_latency
    from prunella.metrics import perplexity as perplexity
    from prunella.metrics import token_agreement as token_agreement
    from prunella.metrics import zero_shot as zero_shot
    from prunella.metrics.effective_sparsity import EffectiveSparsity as EffectiveSparsity
    from prunella.metrics.effective_sparsity import effective_sparsity as effective_sparsity
    from prunella.metrics.outputs import calibration_error as calibration_error
    from prunella.metrics.outputs import flip_rate as flip_rate
    from prunella.metrics.outputs import kl_divergence as kl_divergence
    from prunella.metrics.outputs import per_class_drop as per_class_drop
    from prunella.metrics.outputs import pruning_identified_exemplars as pruning_identified_exemplars
    from prunella.metrics.side_effects import SideEffects as SideEffects
    from prunella.metrics.side_effects import side_effects as side_effects
    from prunella.metrics.size import Compression as Compression
    from prunella.metrics.size import compression_ratio as compression_ratio
    from prunella.metrics.speedup import Speedup as Speedup
    from prunella.metrics.speedup import effective_macs as effective_macs
    from prunella.metrics.speedup import energy as energy
    from prunella.metrics.speedup import speedup as speedup
    from prunella.model.masks import finalize as finalize
    from prunella.model.masks import masks_of as masks_of
    from prunella.model.masks import reapply_ as reapply_
    from prunella.planning.plan import Plan as Plan
    from prunella.planning.planner import plan as plan
    from prunella.planning.recipe import Recipe as Recipe
    from prunella.planning.rounds import Rounds as Rounds
    from prunella.planning.rounds import force as force
    from prunella.planning.rounds import iterate as iterate
    from prunella.planning.rounds import iterative_snip as iterative_snip
    from prunella.planning.rounds import synflow_rounds as synflow_rounds
    from prunella.planning.zeros import plan_zeros as plan_zeros
    from prunella.recovery import Adapters as Adapters
    from prunella.recovery import add_adapters_ as add_adapters_
    from prunella.recovery import heal_ as heal_
    from prunella.recovery.batchnorm import recalibrate_bn as recalibrate_bn
    from prunella.recovery.distill import distill as distill
    from prunella.recovery.distill import distill_attention as distill_attention
    from prunella.recovery.distill import distill_attention_probabilities as distill_attention_probabilities
    from prunella.recovery.distill import distill_features as distill_features
    from prunella.recovery.distill import distill_logits as distill_logits
    from prunella.recovery.finetune import Training as Training
    from prunella.recovery.finetune import finetune as finetune
    from prunella.recovery.fold_means import Folded as Folded
    from prunella.recovery.fold_means import fold_means as fold_means
    from prunella.recovery.fsdp import hold_sharded_ as hold_sharded_
    from prunella.recovery.lora import mask_adapters_ as mask_adapters_
    from prunella.recovery.lora import merge_adapters_ as merge_adapters_
    from prunella.recovery.lr_schedules import Replay as Replay
    from prunella.recovery.lr_schedules import adaptive_rate as adaptive_rate
    from prunella.recovery.lr_schedules import constant_rate as constant_rate
    from prunella.recovery.lr_schedules import linear_rate as linear_rate
    from prunella.recovery.lr_schedules import rewind_rate as rewind_rate
    from prunella.recovery.lr_schedules import scaled_rate as scaled_rate
    from prunella.recovery.moments import correct_statistics as correct_statistics
    from prunella.recovery.reconstruct import reconstruct as reconstruct
    from prunella.reporting.frontier import Frontier as Frontier
    from prunella.reporting.frontier import write_frontier as write_frontier
    from prunella.reporting.page import write_page as write_page
    from prunella.reporting.report import Curve as Curve
    from prunella.reporting.report import Report as Report
    from prunella.reporting.report import report as report
    from prunella.runtime.artifact import load_sparse as load_sparse
    from prunella.runtime.artifact import save_sparse as save_sparse
    from prunella.runtime.convert import Sparsified as Sparsified
    from prunella.runtime.convert import sparse as sparse
    from prunella.runtime.convert import sparsified as sparsified
    from prunella.runtime.dense import dense_fast as dense_fast
    from prunella.runtime.kernels.library import Precision as Precision
    from prunella.schedules import acdc as acdc
    from prunella.schedules import cosine as cosine
    from prunella.schedules import cubic as cubic
    from prunella.schedules import exponential as exponential
    from prunella.schedules import linear as linear
    from prunella.schedules import one_shot as one_shot
    from prunella.schedules import rounds as rounds
    from prunella.search import Found as Found
    from prunella.search import LatencyTable as LatencyTable
    from prunella.search import Levels as Levels
    from prunella.search import Option as Option
    from prunella.search import Scan as Scan
    from prunella.search import Space as Space
    from prunella.search import agreement as agreement
    from prunella.search import amc_reward as amc_reward
    from prunella.search import cheapest as cheapest
    from prunella.search import evolve as evolve
    from prunella.search import evolve_front as evolve_front
    from prunella.search import evolve_levels as evolve_levels
    from prunella.search import greedy_blocks as greedy_blocks
    from prunella.search import knapsack as knapsack
    from prunella.search import latency_table as latency_table
    from prunella.search.netadapt import netadapt as netadapt
    from prunella.search.scan import scan as scan
    from prunella.search.space import space as space
    from prunella.solvers import Grid as Grid
    from prunella.solvers import by_score as by_score
    from prunella.solvers import mfac as mfac
    from prunella.solvers import obs as obs
    from prunella.solvers import prune_and_quantise as prune_and_quantise
    from prunella.solvers import woodfisher as woodfisher
    from prunella.solvers.admm import admm as admm
    from prunella.solvers.alps import alps as alps
    from prunella.solvers.refit import refit as refit
    from prunella.solvers.sparsegpt import sparsegpt as sparsegpt
    from prunella.solvers.swap import swap as swap
    from prunella.targets import Bytes as Bytes
    from prunella.targets import Latency as Latency
    from prunella.targets import MACs as MACs
    from prunella.targets import Params as Params
    from prunella.targets import Sparsity as Sparsity
    from prunella.tokens import TokenMerging as TokenMerging
    from prunella.tokens import bipartite_match as bipartite_match
    from prunella.tokens import contextual_ as contextual_
    from prunella.tokens import merge_tokens_ as merge_tokens_
    from prunella.train.dynamic.drop_grow import DropGrow as DropGrow
    from prunella.train.dynamic.rules import Rule as Rule
    from prunella.train.dynamic.rules import granet as granet
    from prunella.train.dynamic.rules import itop as itop
    from prunella.train.dynamic.rules import rigl as rigl
    from prunella.train.dynamic.rules import rigl_flops as rigl_flops
    from prunella.train.dynamic.rules import set_ as set_
    from prunella.train.dynamic.rules import sparse_momentum as sparse_momentum
    from prunella.train.gates.gate import advance_ as advance_
    from prunella.train.gates.gate import bake_ as bake_
    from prunella.train.gates.gate import gate_penalty as gate_penalty
    from prunella.train.gates.hard_concrete import l0_gates_ as l0_gates_
    from prunella.train.gates.movement import soft_movement_ as soft_movement_
    from prunella.train.gates.movement import top_movement_ as top_movement_
    from prunella.train.gates.supermask import finalize_supermask as finalize_supermask
    from prunella.train.gates.supermask import supermask_ as supermask_
    from prunella.train.gates.target_shape import TargetShape as TargetShape
    from prunella.train.gates.thresholds import learned_threshold_ as learned_threshold_
    from prunella.train.gates.top_kast import top_kast_ as top_kast_
    from prunella.train.gates.variational import variational_dropout_ as variational_dropout_
    from prunella.train.penalty.admm import AdmmTraining as AdmmTraining
    from prunella.train.penalty.greg import Growing as Growing
    from prunella.train.penalty.halfspace import HalfSpace as HalfSpace
    from prunella.train.penalty.penalties import group_lasso as group_lasso
    from prunella.train.penalty.penalties import group_sparsity as group_sparsity
    from prunella.train.penalty.penalties import penalised as penalised
    from prunella.train.penalty.penalties import slimming as slimming
    from prunella.train.penalty.proximal import Proximal as Proximal
    from prunella.train.penalty.proximal import group_soft as group_soft
    from prunella.train.penalty.proximal import soft as soft
    from prunella.train.penalty.proximal import sparse_group_soft as sparse_group_soft
    from prunella.train.penalty.units import Coupled as Coupled
    from prunella.train.penalty.units import coupled as coupled
    from prunella.train.pruner import Pruner as Pruner
    from prunella.train.soft import SoftPruner as SoftPruner
    from prunella.train.soft import Surgery as Surgery
    from prunella.transform.apply import apply_ as apply_
    from prunella.transform.controls import Control as Control
    from prunella.transform.controls import Controls as Controls
    from prunella.transform.controls import reinit_ as reinit_
    from prunella.transform.controls import shuffle_masks_ as shuffle_masks_
    from prunella.transform.optimizer import carry_ as carry_
    from prunella.transform.permute import permute as permute
    from prunella.transform.sanity import collapsed as collapsed
    from prunella.transform.sanity import reinitialised as reinitialised
    from prunella.transform.sanity import shuffled_plan as shuffled_plan
    from prunella.transform.shrink import shrink as shrink

__version__ = "0.1.0"

_HOME = {
    "Normalise": "allocation",
    "erk": "allocation",
    "erk_densities": "allocation",
    "fixed": "allocation",
    "from_scan": "allocation",
    "global_": "allocation",
    "isomorphic": "allocation",
    "lamp": "allocation",
    "owl": "allocation",
    "per_round": "allocation",
    "uniform": "allocation",
    "uniform_plus": "allocation",
    "huffman": "compress.huffman",
    "relative_index": "compress.huffman",
    "to_int8_": "compress.int8",
    "low_rank": "compress.low_rank",
    "svd_factors": "compress.low_rank",
    "quantisation_aware": "compress.quantize",
    "quantise_weight": "compress.quantize",
    "round_weights_": "compress.quantize",
    "Format": "compress.storage",
    "stored_bytes": "compress.storage",
    "Start": "compress.weight_sharing",
    "deep_compression_": "compress.weight_sharing",
    "share_weight": "compress.weight_sharing",
    "activation_norm": "criteria",
    "activation_variance": "criteria",
    "apoz": "criteria",
    "block_influence": "criteria",
    "bn_scale": "criteria",
    "fisher": "criteria",
    "fluctuation": "criteria",
    "geometric_median": "criteria",
    "grasp": "criteria",
    "group_norm": "criteria",
    "head_importance": "criteria",
    "hrank": "criteria",
    "inverted": "criteria",
    "magnitude": "criteria",
    "mfac_saliency": "criteria",
    "movement": "criteria",
    "obd": "criteria",
    "obert": "criteria",
    "obs_saliency": "criteria",
    "random": "criteria",
    "reap": "criteria",
    "ria": "criteria",
    "router_frequency": "criteria",
    "router_weight": "criteria",
    "shuffled": "criteria",
    "snip": "criteria",
    "synflow": "criteria",
    "taylor": "criteria",
    "taylor_abs": "criteria",
    "taylor_sq": "criteria",
    "wanda": "criteria",
    "PruningError": "errors",
    "compare": "experiments.compare",
    "Study": "experiments.pareto",
    "pareto": "experiments.pareto",
    "NM": "granularity",
    "Block": "granularity",
    "Channel": "granularity",
    "Depth": "granularity",
    "Element": "granularity",
    "Expert": "granularity",
    "Filter": "granularity",
    "Head": "granularity",
    "Kernel": "granularity",
    "KernelPattern": "granularity",
    "Reduce": "granularity",
    "Vector": "granularity",
    "Vocabulary": "granularity",
    "Width": "granularity",
    "as_program": "graph.program.capture",
    "with_biases": "io.add_biases",
    "load": "io.artifact",
    "save": "io.artifact",
    "Card": "io.card",
    "write_card": "io.card",
    "export": "io.export",
    "import_plan": "io.importers",
    "load_plan": "io.plan_file",
    "save_plan": "io.plan_file",
    "Match": "llm",
    "OneShot": "llm",
    "Refine": "llm",
    "alpha_sparsities": "llm",
    "drop_blocks": "llm",
    "drop_run": "llm",
    "match_stream_": "llm",
    "one_shot_recipe": "llm",
    "replace_run": "llm",
    "rescale_": "llm",
    "rotate": "llm",
    "slice_stream": "llm",
    "solve_": "llm",
    "processes": "llm.distributed",
    "forecast": "llm.streaming",
    "solve_folder": "llm.streaming",
    "barrier": "lottery.connectivity",
    "instability": "lottery.connectivity",
    "EarlyBird": "lottery.early_bird",
    "mask_distance": "lottery.early_bird",
    "imp": "lottery.imp",
    "RateRewind": "lottery.search",
    "WeightRewind": "lottery.search",
    "find_ticket": "lottery.search",
    "Lap": "lottery.session",
    "Course": "lottery.training",
    "descent": "lottery.training",
    "count": "measure.count",
    "throughput": "measure.throughput",
    "Timing": "measure.timing",
    "compare_latency": "measure.timing",
    "perplexity": "metrics",
    "token_agreement": "metrics",
    "zero_shot": "metrics",
    "EffectiveSparsity": "metrics.effective_sparsity",
    "effective_sparsity": "metrics.effective_sparsity",
    "calibration_error": "metrics.outputs",
    "flip_rate": "metrics.outputs",
    "kl_divergence": "metrics.outputs",
    "per_class_drop": "metrics.outputs",
    "pruning_identified_exemplars": "metrics.outputs",
    "SideEffects": "metrics.side_effects",
    "side_effects": "metrics.side_effects",
    "Compression": "metrics.size",
    "compression_ratio": "metrics.size",
    "Speedup": "metrics.speedup",
    "effective_macs": "metrics.speedup",
    "energy": "metrics.speedup",
    "speedup": "metrics.speedup",
    "finalize": "model.masks",
    "masks_of": "model.masks",
    "reapply_": "model.masks",
    "Plan": "planning.plan",
    "plan": "planning.planner",
    "Recipe": "planning.recipe",
    "Rounds": "planning.rounds",
    "force": "planning.rounds",
    "iterate": "planning.rounds",
    "iterative_snip": "planning.rounds",
    "synflow_rounds": "planning.rounds",
    "plan_zeros": "planning.zeros",
    "Adapters": "recovery",
    "add_adapters_": "recovery",
    "heal_": "recovery",
    "recalibrate_bn": "recovery.batchnorm",
    "distill": "recovery.distill",
    "distill_attention": "recovery.distill",
    "distill_attention_probabilities": "recovery.distill",
    "distill_features": "recovery.distill",
    "distill_logits": "recovery.distill",
    "Training": "recovery.finetune",
    "finetune": "recovery.finetune",
    "Folded": "recovery.fold_means",
    "fold_means": "recovery.fold_means",
    "hold_sharded_": "recovery.fsdp",
    "mask_adapters_": "recovery.lora",
    "merge_adapters_": "recovery.lora",
    "Replay": "recovery.lr_schedules",
    "adaptive_rate": "recovery.lr_schedules",
    "constant_rate": "recovery.lr_schedules",
    "linear_rate": "recovery.lr_schedules",
    "rewind_rate": "recovery.lr_schedules",
    "scaled_rate": "recovery.lr_schedules",
    "correct_statistics": "recovery.moments",
    "reconstruct": "recovery.reconstruct",
    "Frontier": "reporting.frontier",
    "write_frontier": "reporting.frontier",
    "write_page": "reporting.page",
    "Curve": "reporting.report",
    "Report": "reporting.report",
    "report": "reporting.report",
    "load_sparse": "runtime.artifact",
    "save_sparse": "runtime.artifact",
    "Sparsified": "runtime.convert",
    "sparse": "runtime.convert",
    "sparsified": "runtime.convert",
    "dense_fast": "runtime.dense",
    "Precision": "runtime.kernels.library",
    "acdc": "schedules",
    "cosine": "schedules",
    "cubic": "schedules",
    "exponential": "schedules",
    "linear": "schedules",
    "one_shot": "schedules",
    "rounds": "schedules",
    "Found": "search",
    "LatencyTable": "search",
    "Levels": "search",
    "Option": "search",
    "Scan": "search",
    "Space": "search",
    "agreement": "search",
    "amc_reward": "search",
    "cheapest": "search",
    "evolve": "search",
    "evolve_front": "search",
    "evolve_levels": "search",
    "greedy_blocks": "search",
    "knapsack": "search",
    "latency_table": "search",
    "netadapt": "search.netadapt",
    "scan": "search.scan",
    "space": "search.space",
    "Grid": "solvers",
    "by_score": "solvers",
    "mfac": "solvers",
    "obs": "solvers",
    "prune_and_quantise": "solvers",
    "woodfisher": "solvers",
    "admm": "solvers.admm",
    "alps": "solvers.alps",
    "refit": "solvers.refit",
    "sparsegpt": "solvers.sparsegpt",
    "swap": "solvers.swap",
    "Bytes": "targets",
    "Latency": "targets",
    "MACs": "targets",
    "Params": "targets",
    "Sparsity": "targets",
    "TokenMerging": "tokens",
    "bipartite_match": "tokens",
    "contextual_": "tokens",
    "merge_tokens_": "tokens",
    "DropGrow": "train.dynamic.drop_grow",
    "Rule": "train.dynamic.rules",
    "granet": "train.dynamic.rules",
    "itop": "train.dynamic.rules",
    "rigl": "train.dynamic.rules",
    "rigl_flops": "train.dynamic.rules",
    "set_": "train.dynamic.rules",
    "sparse_momentum": "train.dynamic.rules",
    "advance_": "train.gates.gate",
    "bake_": "train.gates.gate",
    "gate_penalty": "train.gates.gate",
    "l0_gates_": "train.gates.hard_concrete",
    "soft_movement_": "train.gates.movement",
    "top_movement_": "train.gates.movement",
    "finalize_supermask": "train.gates.supermask",
    "supermask_": "train.gates.supermask",
    "TargetShape": "train.gates.target_shape",
    "learned_threshold_": "train.gates.thresholds",
    "top_kast_": "train.gates.top_kast",
    "variational_dropout_": "train.gates.variational",
    "AdmmTraining": "train.penalty.admm",
    "Growing": "train.penalty.greg",
    "HalfSpace": "train.penalty.halfspace",
    "group_lasso": "train.penalty.penalties",
    "group_sparsity": "train.penalty.penalties",
    "penalised": "train.penalty.penalties",
    "slimming": "train.penalty.penalties",
    "Proximal": "train.penalty.proximal",
    "group_soft": "train.penalty.proximal",
    "soft": "train.penalty.proximal",
    "sparse_group_soft": "train.penalty.proximal",
    "Coupled": "train.penalty.units",
    "coupled": "train.penalty.units",
    "Pruner": "train.pruner",
    "SoftPruner": "train.soft",
    "Surgery": "train.soft",
    "apply_": "transform.apply",
    "Control": "transform.controls",
    "Controls": "transform.controls",
    "reinit_": "transform.controls",
    "shuffle_masks_": "transform.controls",
    "carry_": "transform.optimizer",
    "permute": "transform.permute",
    "collapsed": "transform.sanity",
    "reinitialised": "transform.sanity",
    "shuffled_plan": "transform.sanity",
    "shrink": "transform.shrink",
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
