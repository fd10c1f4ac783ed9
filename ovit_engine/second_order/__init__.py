"""Second-order pruning on plain tensors: no model, no recipe, nothing but the mathematics."""

from ovit_engine.second_order.memory import available_memory as available_memory
from ovit_engine.second_order.options import LARGEST_BLOCK as LARGEST_BLOCK
from ovit_engine.second_order.passes import Source as Source
from ovit_engine.second_order.plan import Plan as Plan
from ovit_engine.second_order.problem import Pruned as Pruned
from ovit_engine.second_order.prune import METHODS as METHODS
from ovit_engine.second_order.prune import PruneOptions as PruneOptions
from ovit_engine.second_order.prune import estimate_memory as estimate_memory
from ovit_engine.second_order.prune import plan_pruning as plan_pruning
from ovit_engine.second_order.prune import prune_by_scores as prune_by_scores
from ovit_engine.second_order.prune import prune_streamed as prune_streamed
from ovit_engine.second_order.prune import prune_tensors as prune_tensors
from ovit_engine.second_order.stages import Progress as Progress
