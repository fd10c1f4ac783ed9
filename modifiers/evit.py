"""Token pruning by the attention of the class token (EViT, arXiv 2202.07800)."""

from collections.abc import Iterable

from pydantic import Field, NonNegativeInt

from ovit_engine import Clock, Row, Run, Time, register, tokens
from ovit_engine.modifiers._tokens import TokenPruning, check_blocks
from ovit_engine.tokens.attended import AttendedHooks
from ovit_engine.tokens.between import check_blocks_open
from ovit_engine.tokens.counts import ceil_counts, shares_of


@register("evit")
class EViT(TokenPruning):
    """Drops tokens to which the class token pays little attention, between attention and MLP of some blocks.

    Nothing is learned for it and the loss has no term, but the model must be trained with it to get its accuracy back.
    Tokens are gone in training too, which makes it faster; between `start` and `end` it keeps more of them. Counts are
    rounded up, of the tokens that come to a stage: 138, 97 and 68 of 196 for 0.7 without `fuse`. With `fuse` each stage
    that drops tokens adds one to those it keeps. A distillation token's attention counts as the class token's does.
    """

    blocks: list[NonNegativeInt] | None = Field(
        None,
        min_length=1,
        description="blocks after whose attention tokens go, from 0; the quarters of the depth if left out",
    )
    fuse: bool = Field(True, description="whether the dropped tokens leave one, their sum weighted by attention")
    start: Time = Field("0ep", description="time until which training keeps all tokens: 10ep as published")
    end: Time | None = Field(
        None, description="time from which it keeps as few as inference, after half a cosine; at once if left out"
    )

    def timeline(self, clock: Clock) -> Iterable[Row]:
        start, end = self._resolve(clock)
        (_, what, spelled), *_ = super().timeline(clock)
        if start:
            yield 0, what, f"all in training ({self.name})"
        if end > start:
            yield start, what, f"fewer with each step of training, along half a cosine ({self.name})"
        yield end, what, spelled

    def _resolve(self, clock: Clock) -> tuple[int, int]:
        start = self.time_of(clock, "start")
        end = start if self.end is None else self.time_of(clock, "end")
        if end < start:
            raise self.error(f"{self.end!r} comes before the start at {self.start!r}", "end")
        return start, end

    def make_hooks(self, run: Run, layout: tokens.Layout) -> AttendedHooks:
        shrink = self._resolve(run.clock)
        vit = tokens.find_transformer(run.model)
        places = check_blocks(self, self.blocks, layout.depth)
        with self.errors_at():
            check_blocks_open(vit, places)
        counts = self.counts(layout.patches, len(places))
        share = self.kept_share
        shares = [share] * len(places) if share is not None else shares_of(layout.patches, counts, fuse=self.fuse)
        readers = 1 if getattr(vit, "dist_token", None) is None else 2
        return AttendedHooks(layout, places, shares, fuse=self.fuse, readers=readers, shrink=shrink)

    def kept(self) -> dict[str, float]:
        hooks = self.hooks
        assert isinstance(hooks, AttendedHooks)
        counts = enumerate(hooks.training_counts, 1)
        return {f"kept_{stage}": count / hooks.layout.patches for stage, count in counts}

    def share_counts(self, patches: int, keep: float, stages: int) -> list[int]:
        """Patch tokens that each stage keeps."""
        return ceil_counts(patches, [keep] * stages, fuse=self.fuse)
