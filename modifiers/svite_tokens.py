"""A learned selection of tokens before the first block (SViTE+, arXiv 2106.04533)."""

from typing import Literal

from pydantic import Field, NonNegativeInt

from ovit_engine import Run, register, tokens
from ovit_engine.masking.parameters import SCORER
from ovit_engine.modifiers._tokens import TokenPruning
from ovit_engine.tokens.samplers import TopTokens
from ovit_engine.tokens.scorers import LinearScorer, make_scorer
from ovit_engine.tokens.selector import SelectorHooks, Stage

WARM, COLD = 10.0, 0.1  # temperature at the first step and after the last


@register("svite_tokens")
class SViTETokens(TokenPruning):
    """Drops a share of the tokens before block 0 by a linear score of each; in training with Gumbel noise.

    Exactly as many tokens stay in training as in inference, so the loss needs no term. Other than in the published
    code prefix tokens are never scored, inference has no noise, the temperature falls (it rose in early releases), and
    dropped tokens are masked in attention: set to zero, as there (`masking: zero`), they still act as keys, so a model
    trained like that changes when they are really dropped.
    """

    masking: Literal["attention", "zero"] = Field(
        "attention", description="how training hides dropped tokens: from attention, or by setting them to zero"
    )
    seed: NonNegativeInt = Field(0, description="of the scorer's first weights and of the noise")

    def make_hooks(self, run: Run, layout: tokens.Layout) -> SelectorHooks:
        (count,) = self.counts(layout.patches, 1)
        block = tokens.find_transformer(run.model).blocks[0]
        block.add_module(SCORER, make_scorer(LinearScorer, next(block.parameters()), layout.width, seed=self.seed))
        stages = [Stage(0, count)]
        return SelectorHooks(layout, stages, TopTokens(WARM), seed=self.seed, masking=self.masking)

    @property
    def selector(self) -> SelectorHooks:
        """The hooks of the model that is trained."""
        hooks = self.hooks
        assert isinstance(hooks, SelectorHooks)
        return hooks

    def kept(self) -> dict[str, float]:
        return {"kept_1": self.selector.stages[0].keep / self.selector.layout.patches}

    def attach(self, run: Run) -> None:
        super().attach(run)
        self._cool(run)

    def step_end(self, run: Run) -> None:
        super().step_end(run)
        self._cool(run)

    def _cool(self, run: Run) -> None:
        sampler = self.selector.sampler
        assert isinstance(sampler, TopTokens)
        sampler.temperature.fill_(temperature(run.step / run.total_steps))


def temperature(progress: float) -> float:
    """Of the softmax whose gradient is taken, at `progress` in [0, 1] of training."""
    return WARM + (COLD - WARM) * min(1.0, progress)
