"""What every reduction of tokens shares: the model it fits, the hooks, how many tokens stay."""

from abc import abstractmethod
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PrivateAttr, model_validator
from torch import nn

from ovit_engine import Claim, Clock, Deployable, Exclusive, Modifier, Row, Run, Scheduled, Surgical, tokens
from ovit_engine.tokens.counts import check_counts
from ovit_engine.tokens.token_hooks import finish


def _check_share(value: Any) -> Any:
    """Explain a percentage, which pydantic would only call too large or no number."""
    text = str(value).strip()
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        return value
    if text.endswith("%") or 2 <= number <= 100:
        raise ValueError(f"{value} is no share of the tokens: did you mean {number / 100:g}?")
    return value


Share = Annotated[float, BeforeValidator(_check_share)]


class TokenReduction(Scheduled, Surgical, Deployable, Exclusive):
    """Makes tokens fewer in a vision transformer, from PREPARE on. A subclass makes the hooks that do it."""

    _hooks: tokens.TokenHooks | None = PrivateAttr(default=None)

    @property
    def hooks(self) -> tokens.TokenHooks:
        """What reduces the tokens of the model that is trained, once PREPARE is over."""
        assert self._hooks is not None, "before PREPARE"
        return self._hooks

    @abstractmethod
    def make_hooks(self, run: Run, layout: tokens.Layout) -> tokens.TokenHooks:
        """The hooks for a model of this layout, and what modules they need put into `run.model`."""

    def prepare(self, run: Run) -> None:
        with self.errors_at():
            layout = tokens.find_layout(run.model)
            if (others := tokens.hooks_of(run.model)) is not None:
                raise ValueError(f"the model's tokens are reduced already, by {others.made_by}")
        self._hooks = self.make_hooks(run, layout)
        self._hooks.made_by = f"{self.name} ({self._origins.get('', 'another recipe')})"
        self._hooks.install(run.model)

    def outcome(self, run: Run) -> Iterable[str]:
        yield f"tokens {self.hooks.token_counts()}"

    def claims(self, run: Run) -> Iterable[Claim]:
        yield Claim("tokens", "", 0, run.total_steps)

    def attach(self, run: Run) -> None:
        self.hooks.end_step(run.step)
        self._log_kept(run)

    def step_end(self, run: Run) -> None:
        self.hooks.end_step(run.step)
        if run.step % run.steps_per_epoch == 0:
            self._log_kept(run)

    def kept(self) -> dict[str, float]:
        """Shares of the patch tokens that training keeps at present, by the name under which they are logged."""
        return {}

    def _log_kept(self, run: Run) -> None:
        """Log the shares that are not what they were when last logged."""
        before = {name: value for _, name, value in run.history}
        for name, share in self.kept().items():
            if before.get(f"{self.name}/{name}") != share:
                run.log(f"{self.name}/{name}", share)

    def apply_to(self, model: nn.Module) -> None:
        if tokens.hooks_of(model) is None:
            raise RuntimeError(
                f"{self.name}: the EMA copy has all its tokens: call engine.prepare() before the copy is made"
            )

    def bake(self, model: nn.Module) -> None:
        finish(model)


class TokenPruning(TokenReduction):
    """A reduction that drops tokens before some blocks, to counts that a share or a list gives."""

    keep: Share | None = Field(
        None, gt=0, le=1, description="share of the patch tokens that each stage keeps of those before it"
    )
    prune: Share | None = Field(None, ge=0, lt=1, description="the same as 1 - keep: the share that each stage drops")
    keep_tokens: list[int] | None = Field(
        None, min_length=1, description="patch tokens left after each stage, in place of a share"
    )

    @model_validator(mode="after")
    def _one_amount(self) -> "TokenPruning":
        given = [name for name in ("keep", "prune", "keep_tokens") if getattr(self, name) is not None]
        if len(given) != 1:
            found = f"not {' and '.join(given)}" if given else "none is given"
            raise ValueError(
                f"say once how many tokens stay, by 'keep', 'prune' or 'keep_tokens': {found} (keep: 0.8 is prune: 0.2)"
            )
        return self

    @property
    def kept_share(self) -> float | None:
        """The share that each stage keeps; None where counts are listed."""
        return round(1 - self.prune, 12) if self.prune is not None else self.keep

    def counts(self, patches: int, stages: int) -> list[int]:
        """Patch tokens left after each stage.

        Raises:
            RecipeError: counts that do not fit the model, or not the number of stages.
        """
        option = next(name for name in ("keep", "prune", "keep_tokens") if getattr(self, name) is not None)
        with self.errors_at(option):
            if self.keep_tokens is None:
                assert self.kept_share is not None
                return self.share_counts(patches, self.kept_share, stages)
            if len(self.keep_tokens) != stages:
                raise ValueError(f"{self.keep_tokens} has {len(self.keep_tokens)} counts for {stages} stages")
            check_counts(patches, self.keep_tokens)
        return list(self.keep_tokens)

    def share_counts(self, patches: int, keep: float, stages: int) -> list[int]:
        """Patch tokens left after each stage where each keeps a share; ValueError where none would be left."""
        return tokens.floor_counts(patches, keep, stages)

    def timeline(self, clock: Clock) -> Iterable[Row]:
        amount: Any = self.keep_tokens
        spelled = f"patch tokens {amount}" if amount else f"{self.kept_share:.0%} of the patch tokens a stage"
        yield 0, "tokens", f"{spelled} ({self.name})"


def check_blocks(modifier: Modifier, blocks: list[int] | None, depth: int) -> list[int]:
    """The blocks of a model `depth` deep before which tokens go, at the quarters if not given.

    Raises:
        RecipeError: not in rising order, or past the last block.
    """
    if blocks is None:
        return tokens.quarter_blocks(depth)
    if blocks != sorted(set(blocks)):
        raise modifier.error(f"{blocks} must rise: blocks count from 0", "blocks")
    if blocks[0] < 0 or blocks[-1] >= depth:
        raise modifier.error(f"{blocks}: the model has blocks 0 to {depth - 1}", "blocks")
    return list(blocks)
