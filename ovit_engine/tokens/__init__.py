"""Fewer tokens in vision transformers: the mathematics on plain tensors, and the hooks that apply it to a model.

A reduction is a scorer (what a token is worth), a reducer (drop or merge), a way to train it, the blocks where it acts
and how many tokens it keeps there, as whole numbers. Prefix tokens (class, distillation, registers) always stay.
"""

from ovit_engine.tokens.counts import floor_counts, quarter_blocks
from ovit_engine.tokens.layout import Layout, find_layout, find_transformer
from ovit_engine.tokens.learning_rates import param_groups
from ovit_engine.tokens.ops import Survivors, gather_tokens, policy_bias, top_tokens
from ovit_engine.tokens.token_hooks import TokenHooks, hooks_of

__all__ = [
    "Layout",
    "Survivors",
    "TokenHooks",
    "find_layout",
    "find_transformer",
    "floor_counts",
    "gather_tokens",
    "hooks_of",
    "param_groups",
    "policy_bias",
    "quarter_blocks",
    "top_tokens",
]
