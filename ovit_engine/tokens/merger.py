"""Hooks that merge tokens that are alike (ToMe)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ovit_engine.recomputation import is_recomputed
from ovit_engine.tokens.between import BetweenHooks
from ovit_engine.tokens.gather import Survivors
from ovit_engine.tokens.heads import mean_of_heads
from ovit_engine.tokens.layout import Layout
from ovit_engine.tokens.merging import Matching, follow_places, match_tokens, merge_tokens, merged_counts


class MergingHooks(BetweenHooks):
    """Merges tokens in every block; of each token is known how many patches it stands for.

    Args:
        amounts: by block, how many tokens go; at most half of the patch tokens that come to it.
        proportional: whether attention counts a token as often as the patches it stands for.
    """

    def __init__(self, layout: Layout, amounts: Sequence[int], *, proportional: bool) -> None:
        super().__init__(layout, range(layout.depth))
        self.amounts, self.proportional = list(amounts), proportional
        # how many patches each token of the forward pass that runs stands for, [images, tokens]; None: one each
        self._sizes: Tensor | None = None
        # in training the same by block, of what came to it: gradient checkpointing asks again
        self._kept: dict[int, Tensor | None] = {}
        self._with_gradient = False  # whether the last forward pass is one of training that has a backward pass

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_sizes": None, "_kept": {}, "_with_gradient": False}

    def finish(self, vit: Any) -> None:
        super().finish(vit)
        self.end_step(0)

    def patches_left(self) -> list[tuple[int, int]]:
        return list(enumerate(merged_counts(self.layout.patches, self.amounts)))

    def end_step(self, step: int) -> None:
        super().end_step(step)
        self._kept = {}

    def begin(self, x: Tensor, *, training: bool) -> None:
        super().begin(x, training=training)
        self._sizes = None
        # grad is off where reentrant checkpointing runs the first time, and what comes to it requires a gradient
        self._with_gradient = training and (torch.is_grad_enabled() or x.requires_grad)
        if training:
            self.survivors = None

    def run_again(self, *, training: bool) -> None:
        super().run_again(training=training)
        if training:  # the sizes of the passes before are gone
            self.passes.check_last("merged tokens")

    def bias(self, number: int, x: Tensor, *, training: bool) -> Tensor | None:
        if not is_recomputed() and self._with_gradient:
            self._kept[number] = self._sizes
        sizes = self._incoming(number)
        return sizes.log()[:, None, None, :].to(x.dtype) if self.proportional and sizes is not None else None

    def reduce(
        self, number: int, x: Tensor, queries: Tensor, keys: Tensor, gate: Tensor | None, *, training: bool
    ) -> Tensor:
        amount, prefix, sizes = self.amounts[number], self.layout.prefix, self._incoming(number)
        if amount:
            if sizes is None:
                sizes = torch.ones(x.shape[:2], dtype=torch.float32, device=x.device)
            matching = match_tokens(mean_of_heads(keys.detach(), gate), prefix, amount)
            x, sizes = merge_tokens(x, sizes, matching, prefix)
        if not is_recomputed():
            self._sizes = None if number == len(self.places) - 1 else sizes
            if training and sizes is not None and amount:
                self._follow(matching, sizes)
        return x

    def _incoming(self, number: int) -> Tensor | None:
        return self._kept[number] if is_recomputed() else self._sizes

    def _follow(self, matching: Matching, sizes: Tensor) -> None:
        """Note where the patch tokens come from; one that stands for several patches is none of them."""
        prefix = self.layout.prefix
        if self.survivors is None:
            origin = torch.arange(self.layout.patches, device=sizes.device).expand(len(sizes), -1)
        else:
            origin = self.survivors.origin
        weight = (sizes[:, prefix:] == 1).float()
        self.survivors = Survivors(follow_places(origin, matching, prefix), weight)
