"""Second-order pruning on plain tensors: no model, no recipe, nothing but the mathematics."""

from ovit_engine.pruning.memory import available_memory as available_memory
from ovit_engine.pruning.memory_plan import Plan as Plan
from ovit_engine.pruning.problem import LARGEST_BLOCK as LARGEST_BLOCK
from ovit_engine.pruning.problem import Pruned as Pruned
from ovit_engine.pruning.prune import METHODS as METHODS
from ovit_engine.pruning.prune import PruneOptions as PruneOptions
from ovit_engine.pruning.prune import estimate_memory as estimate_memory
from ovit_engine.pruning.prune import plan_pruning as plan_pruning
from ovit_engine.pruning.prune import prune_by_scores as prune_by_scores
from ovit_engine.pruning.prune import prune_streamed as prune_streamed
from ovit_engine.pruning.prune import prune_tensors as prune_tensors
from ovit_engine.pruning.pruning_step import Progress as Progress
from ovit_engine.pruning.pruning_step import Source as Source
