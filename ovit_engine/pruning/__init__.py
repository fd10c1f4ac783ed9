"""Pruning on plain tensors: no model, no recipe, nothing but the mathematics."""

from ovit_engine.pruning.memory import available_memory
from ovit_engine.pruning.memory_plan import Plan
from ovit_engine.pruning.patterns import NM, Block, Pattern, Unstructured, parse_pattern
from ovit_engine.pruning.problem import LARGEST_BLOCK, Pruned
from ovit_engine.pruning.prune import (
    METHODS,
    PruneOptions,
    estimate_memory,
    plan_pruning,
    prune_by_scores,
    prune_streamed,
    prune_tensors,
)
from ovit_engine.pruning.pruning_step import GradientSource

__all__ = [
    "LARGEST_BLOCK",
    "METHODS",
    "NM",
    "Block",
    "GradientSource",
    "Pattern",
    "Plan",
    "PruneOptions",
    "Pruned",
    "Unstructured",
    "available_memory",
    "estimate_memory",
    "parse_pattern",
    "plan_pruning",
    "prune_by_scores",
    "prune_streamed",
    "prune_tensors",
]
