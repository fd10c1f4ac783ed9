"""Token merging (ToMe, arXiv 2210.09461): tokens that are alike become one."""

import logging
from collections.abc import Iterable
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from ovit_engine import Clock, Row, Run, register, tokens
from ovit_engine.modifiers._tokens import TokenReduction
from ovit_engine.tokens.between import check_blocks_open
from ovit_engine.tokens.counts import falling_amounts, merged_counts
from ovit_engine.tokens.merging import MergingHooks

log = logging.getLogger(__name__)


@register("tome")
class ToMe(TokenReduction):
    """Merges the tokens of each block that are most alike, between its attention and its MLP.

    Tokens in even places go into those in odd places by the likeness of their keys, averages are weighted by the
    patches that tokens stand for, and class, distillation and register tokens are never merged. Nothing is learned for
    it and the loss has no term: it works on a trained model as it is, at some cost in accuracy, and better on one that
    is trained with it. Tokens are merged in training too.
    """

    r: PositiveInt | list[NonNegativeInt] = Field(
        ..., description="tokens that go in each block: a number (13 as published for DeiT-Small), or one a block"
    )
    curve: Literal["constant", "decreasing"] = Field(
        "constant", description="r in each block, or from twice that in the first to none in the last"
    )
    proportional_attention: bool = Field(
        True, description="count a token in attention as often as the patches it stands for; not for plain MAE models"
    )

    @model_validator(mode="after")
    def _consistent(self) -> "ToMe":
        if isinstance(self.r, list) and self.curve != "constant":
            raise ValueError(f"'curve' {self.curve} says how r falls, and 'r' lists it for each block")
        return self

    def timeline(self, clock: Clock) -> Iterable[Row]:
        falls = isinstance(self.r, int) and self.curve == "decreasing"
        spelled = f"{2 * self.r} merged in the first block, falling to 0" if falls else f"{self.r} merged a block"
        yield 0, "tokens", f"{spelled} ({self.name})"

    def make_hooks(self, run: Run, layout: tokens.Layout) -> MergingHooks:
        with self.errors_at():
            check_blocks_open(tokens.find_transformer(run.model), range(layout.depth))
        return MergingHooks(layout, self.amounts(layout), proportional=self.proportional_attention)

    def kept(self) -> dict[str, float]:
        hooks = self.hooks
        assert isinstance(hooks, MergingHooks)
        return {"kept": 1 - sum(hooks.amounts) / hooks.layout.patches}

    def amounts(self, layout: tokens.Layout) -> list[int]:
        """Tokens that go in each block: at most half of the patch tokens that are there.

        Raises:
            RecipeError: a list that does not fit the model.
        """
        if isinstance(self.r, int):
            wanted = falling_amounts(self.r, layout.depth) if self.curve == "decreasing" else [self.r] * layout.depth
        else:
            wanted = self.r
        if len(wanted) != layout.depth:
            raise self.error(f"{wanted} has {len(wanted)} numbers for {layout.depth} blocks", "r")
        before = layout.patches
        found = []
        for place, (amount, after) in enumerate(zip(wanted, merged_counts(layout.patches, wanted), strict=True)):
            if isinstance(self.r, list) and before - after != amount:
                raise self.error(f"{amount} of {before} patch tokens can't go in block {place}: at most half", "r")
            found.append(before - after)
            before = after
        if found != wanted:
            log.warning("%s: at most half of the patch tokens merge in a block: r is %s here", self.name, found)
        return found
