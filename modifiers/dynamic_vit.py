"""Token pruning by small predictors that are trained with the model (DynamicViT, arXiv 2106.02034)."""

from collections.abc import Iterable
from typing import Any

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PrivateAttr
from torch import Tensor

from ovit_engine import Clock, LossTerm, Row, Run, Time, register, tokens
from ovit_engine.distributed.comm import world
from ovit_engine.masking.parameters import SCORER
from ovit_engine.modifiers._tokens import TokenPruning, check_blocks
from ovit_engine.tokens.learning_rates import ScaledRates, backbone_groups
from ovit_engine.tokens.samplers import KeepOrDrop, ratio_loss
from ovit_engine.tokens.scorers import Predictor, make_scorer
from ovit_engine.tokens.selector import SelectorHooks, Stage


@register("dynamic_vit")
class DynamicViT(TokenPruning, LossTerm):
    """Drops tokens before some blocks; a predictor there learns which (sections 3.2 to 3.4 of the paper).

    In training each predictor decides by Gumbel-softmax, dropped tokens are masked in attention, and the loss gets a
    term that brings the share kept to that of inference: write `loss = engine.loss(loss)`, or give the loss module to
    `engine.attach(criterion=...)`. In inference the best tokens are gathered, and the others are gone. The published
    share 0.7 is of tokens kept: `keep: 0.7`; oViT's table 9 speaks of tokens pruned: `prune: 0.2`.
    """

    blocks: list[NonNegativeInt] | None = Field(
        None,
        min_length=1,
        description="blocks before which tokens go, from 0; the quarters of the depth if left out",
    )
    ratio_weight: NonNegativeFloat = Field(
        2.0, description="of the loss term for the share kept: 2 as published, 5 for DeiT-Base"
    )
    backbone_lr_scale: float = Field(
        1.0, gt=0, le=1, description="learning rate of all but the predictors, relative to theirs: 0.01 as published"
    )
    freeze: Time = Field("0ep", description="time until which only the predictors learn: 5ep as published")
    seed: NonNegativeInt = Field(0, description="of the predictors' first weights and of the noise")

    _targets: list[float] = PrivateAttr(default_factory=list)  # share of all patches kept after each stage
    _frozen_until: int = PrivateAttr(default=0)
    _backbone: list[dict[str, Any]] = PrivateAttr(default_factory=list)  # groups of the optimizers
    _rates: ScaledRates = PrivateAttr(default_factory=ScaledRates)

    def timeline(self, clock: Clock) -> Iterable[Row]:
        yield from super().timeline(clock)
        thaw = self._thaw(clock)
        if thaw:
            yield 0, "backbone rate", f"0 but for the predictors ({self.name})"
        if thaw or self.backbone_lr_scale != 1:
            yield thaw, "backbone rate", f"x {self.backbone_lr_scale:g} but for the predictors ({self.name})"

    def _thaw(self, clock: Clock) -> int:
        thaw = self.time_of(clock, "freeze")
        if thaw == clock.total_steps:
            raise self.too_short(
                f"{self.freeze!r} is the end of training: no step is left in which more than the predictors learns",
                "freeze",
            )
        return thaw

    def make_hooks(self, run: Run, layout: tokens.Layout) -> SelectorHooks:
        self._frozen_until = self._thaw(run.clock)
        blocks = check_blocks(self, self.blocks, layout.depth)
        counts = self.counts(layout.patches, len(blocks))
        self._targets = [count / layout.patches for count in counts]
        vit = tokens.find_transformer(run.model)
        for number, place in enumerate(blocks):
            like = next(vit.blocks[place].parameters())
            vit.blocks[place].add_module(SCORER, make_scorer(Predictor, like, layout.width, seed=self.seed + number))
        stages = [Stage(block, count) for block, count in zip(blocks, counts, strict=True)]
        return SelectorHooks(layout, stages, KeepOrDrop(), seed=self.seed)

    def attach(self, run: Run) -> None:
        super().attach(run)
        if self.backbone_lr_scale == 1 and not self._frozen_until:
            return
        self._backbone = []
        for optimizer in run.optimizers:
            with self.errors_at("freeze" if self._frozen_until else "backbone_lr_scale"):
                self._backbone += backbone_groups(run.model, optimizer.param_groups)

    def loss_term(self, run: Run) -> Tensor | None:
        decisions = self.selector.take_decisions()
        return None if decisions is None else self.ratio_weight * ratio_loss(decisions, self._targets)

    @property
    def selector(self) -> SelectorHooks:
        """The hooks of the model that is trained."""
        hooks = self.hooks
        assert isinstance(hooks, SelectorHooks)
        return hooks

    def step_begin(self, run: Run) -> None:
        # after `write_rates` of a modifier that writes learning rates
        self._rates.scale(self._backbone, 0.0 if run.step < self._frozen_until else self.backbone_lr_scale)

    def abandon(self, run: Run) -> None:
        self._rates.restore()

    def detach(self, run: Run) -> None:
        if self._frozen_until and run.step <= self._frozen_until:
            self.check_length(run, f"the end of freeze at step {self._frozen_until}")
            raise self.error("training ended before a step was made in which more than the predictors learns", "freeze")

    def step_end(self, run: Run) -> None:
        self._rates.restore()
        if run.step % run.steps_per_epoch == 0:
            of_ranks = world().gather(self.selector.kept_shares())
            for number, kept in enumerate(zip(*of_ranks, strict=True), 1):
                run.log(f"{self.name}/kept_{number}", sum(kept) / len(kept))
        super().step_end(run)
