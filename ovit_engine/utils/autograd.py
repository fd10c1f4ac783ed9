"""Gradient checkpointing runs parts of a forward pass a second time, which must do what the first did."""

import torch


def is_recomputed() -> bool:
    """Whether this runs in a backward pass, as where activations are checkpointed."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
