"""What a recipe's text says of tokens, held against the counts in a file.

Counted here anew, so that a file is checked by other code than reduced it. How many of the tokens are no patches (class
token, distillation, registers) the graph does not tell: a file is right if it is so for any such number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from ovit_engine.certificate.model import TOKENS_UNKNOWN
from ovit_engine.certificate.token_counts import TokenCounts, counts_after

REDUCERS = ("dynamic_vit", "svite_tokens", "evit", "tome")

# a class token and up to sixteen registers
_PREFIXES = range(1, 18)

# shares are decimal fractions, and products of them not quite whole numbers
_SLACK = 1e-9


def token_contradictions(
    steps: Iterable[tuple[str, Mapping[str, Any]]], tokens: TokenCounts | None, reason: str = TOKENS_UNKNOWN
) -> list[str]:
    """Where modifiers (name, options) ask for other counts than a file has, a line each.

    `tokens` is None where the file has none to count; `reason` says why.
    """
    found = []
    for name, options in steps:
        if name not in REDUCERS:
            continue
        if tokens is None:
            found.append(f"tokens: the recipe's {name} reduces them; {reason}")
            continue
        asked = [_asked(name, options, tokens, prefix) for prefix in _PREFIXES if prefix < tokens.entering]
        if tokens not in asked:
            found.append(f"tokens: the recipe's {name} asks for {asked[0] if asked else 'more'}, the file has {tokens}")
    return found


def _asked(name: str, options: Mapping[str, Any], tokens: TokenCounts, prefix: int) -> TokenCounts:
    """The counts that a modifier leaves in a model of as many tokens and blocks, `prefix` of them no patches."""
    depth, patches = len(tokens.attention), tokens.entering - prefix
    if name == "tome":
        left = list(enumerate(_merged(options, patches, depth)))
    else:
        blocks = [0] if name == "svite_tokens" else options.get("blocks") or _quarters(depth)
        fuse = name == "evit" and options.get("fuse", True)
        left = list(zip(blocks, _kept(options, patches, len(blocks), by_stage=name == "evit", fuse=fuse), strict=False))
    within = name in ("evit", "tome")
    return counts_after(tokens.entering, depth, [(block, prefix + count) for block, count in left], within=within)


def _kept(options: Mapping[str, Any], patches: int, stages: int, *, by_stage: bool, fuse: bool) -> list[int]:
    """Patch tokens that leave each stage."""
    listed = options.get("keep_tokens")
    keep = options["keep"] if options.get("keep") is not None else 1 - options.get("prune", 0)
    found, before = [], patches
    for stage in range(stages):
        if listed:
            count = listed[stage]
        elif by_stage:
            count = min(before, math.ceil(keep * before - _SLACK))
        else:
            count = math.floor(patches * keep ** (stage + 1) + _SLACK)
        before = count + (1 if fuse and count < before else 0)
        found.append(before)
    return found


def _merged(options: Mapping[str, Any], patches: int, depth: int) -> list[int]:
    """Patch tokens that leave each block where `r` go, at most half of them."""
    amount = options["r"]
    amounts = amount if isinstance(amount, list) else [amount] * depth
    if options.get("curve") == "decreasing" and depth > 1:
        amounts = [2 * amount * (depth - 1 - block) // (depth - 1) for block in range(depth)]
    found = []
    for each in amounts:
        patches -= min(each, patches // 2)
        found.append(patches)
    return found


def _quarters(depth: int) -> list[int]:
    """A quarter, half and three quarters of the depth, where there are so many blocks."""
    return sorted({max(1, round(depth * part / 4)) for part in (1, 2, 3)} & set(range(1, depth)))
