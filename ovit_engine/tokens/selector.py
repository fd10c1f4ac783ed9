"""Hooks that let scorers select tokens: by a bias of attention in training, by a real gather in inference."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ovit_engine.distributed.comm import world
from ovit_engine.masking.parameters import SCORER
from ovit_engine.tokens.layout import Layout
from ovit_engine.tokens.ops import Survivors, compute_epsilon, gather_tokens, policy_bias, top_tokens
from ovit_engine.tokens.samplers import Sampler, gumbel
from ovit_engine.tokens.scorers import Scorer
from ovit_engine.tokens.token_hooks import TokenHooks
from ovit_engine.utils.autograd import is_recomputed
from ovit_engine.utils.random_states import mixed

Masking = Literal["attention", "zero"]


@dataclass(frozen=True)
class Stage:
    """Before `block` tokens go, until `keep` patch tokens are left."""

    block: int
    keep: int


class SelectorHooks(TokenHooks):
    """In training all tokens stay in place and dropped ones are masked; what is decided has a gradient.

    What is kept of a forward pass lies by stage, and is overwritten by the next: gradient checkpointing runs the same
    hooks a second time, in backward, and must find or make the same.

    Args:
        seed: of the noise, with the step, the process, and the number of the forward pass within the step.
        masking: by attention, or with tokens set to zero, which still act as keys (SViTE+ as published).
    """

    def __init__(
        self,
        layout: Layout,
        stages: list[Stage],
        sampler: Sampler,
        *,
        seed: int,
        masking: Masking = "attention",
    ) -> None:
        super().__init__(layout)
        self.stages, self.sampler, self.seed, self.masking = stages, sampler, seed, masking
        self._step = 0
        self._calls = 0  # forward passes in training since the step began
        self._with_gradient = False  # whether the last one had gradients
        self._untaken: dict[int, Tensor] = {}  # decisions by stage of the last one that had, until somebody asks
        self._decisions: dict[int, Tensor] = {}  # by stage: [images, patches], those of earlier stages multiplied in
        self._biases: dict[int, Tensor] = {}
        self._training_only: list[RemovableHandle] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_decisions": {}, "_biases": {}, "_untaken": {}}

    def register(self, vit: Any) -> list[RemovableHandle]:
        handles = []
        number = -1  # of the stage that is in force
        for place, block in enumerate(vit.blocks):
            begins = any(stage.block == place for stage in self.stages)
            number += begins
            if number < 0:
                continue
            hook = _BlockHook(self, number, begins=begins)
            handles.append(block.register_forward_pre_hook(hook.enter, with_kwargs=True))
            if not begins:
                self._training_only.append(handles[-1])
        return handles

    def patches_left(self) -> list[tuple[int, int]]:
        return [(stage.block, stage.keep) for stage in self.stages]

    def finish(self, vit: Any) -> None:
        super().finish(vit)
        self.end_step(self._step)
        for handle in self._training_only:
            handle.remove()
        self._training_only = []

    def end_step(self, step: int) -> None:
        super().end_step(step)
        self._step, self._calls = step, 0
        self._decisions, self._biases, self._untaken = {}, {}, {}

    def take_decisions(self) -> list[Tensor] | None:
        """The decisions [images, patches] of each stage in the last forward in training, with gradients; only once."""
        if not self._untaken or not torch.is_grad_enabled():
            return None
        taken, self._untaken = self._untaken, {}
        return [taken[number] for number in range(len(self.stages))]

    def kept_shares(self) -> list[float]:
        """Mean share of all patches that each stage kept in the last forward pass in training; none after a step."""
        return [float(decided.detach().mean()) for decided in self._decisions.values()]

    def gather(self, number: int, block: nn.Module, x: Tensor) -> Tensor:
        """Stage `number` in inference: the best tokens of x [images, prefix + tokens, width], and the prefix."""
        before = self.stages[number - 1].keep if number else self.layout.patches
        self.check_tokens(x, before)
        keep = self.stages[number].keep
        if keep == before:
            return x
        index = top_tokens(_scorer(block)(x[:, self.layout.prefix :], None), keep)
        return gather_tokens(x, index, self.layout.prefix)

    @torch._disable_dynamo  # type: ignore[attr-defined]  # as torch.compiler.disable, which loads the compiler when this file is imported
    def decide(self, number: int, block: nn.Module, x: Tensor) -> Tensor:
        """Stage `number` in training: score the tokens of x, and keep what is decided for the blocks after it."""
        self.check_tokens(x, self.layout.patches)
        x = self._begin(number, x)
        before = self._decisions.get(number - 1)
        scores = _scorer(block)(x[:, self.layout.prefix :], before).float()
        shape = (*scores.shape, self.sampler.choices)
        seed = mixed(self.seed, world().rank, self._step, self._calls, number)
        decided = self.sampler(scores, gumbel(shape, x.device, seed), self.stages[number].keep, before)
        if before is not None:
            decided = decided * before
        self._decisions[number] = decided
        if torch.is_grad_enabled() and not is_recomputed():
            self._untaken[number] = decided
        policy = torch.cat([decided.new_ones(len(x), self.layout.prefix), decided], dim=1)
        self._biases[number] = policy_bias(policy, compute_epsilon(x)) if self.masking == "attention" else policy
        places = torch.arange(self.layout.patches, device=x.device).expand(len(x), -1)
        self.survivors = Survivors(places, decided.detach())
        return x

    def mask(self, number: int, begins: bool, x: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Let a block of training see what stage `number` decided."""
        if kwargs.get("attn_mask") is not None:
            raise ValueError("the model was called with an attn_mask of its own, and its tokens are reduced by another")
        if self.masking == "zero":
            return (x * self._biases[number].unsqueeze(-1).to(x.dtype) if begins else x), kwargs
        return x, {**kwargs, "attn_mask": self._biases[number].to(x.dtype)}

    def _begin(self, number: int, x: Tensor) -> Tensor:
        """Note that a stage of training begins; the tokens to go on with."""
        if number or is_recomputed():
            return x
        self._calls += 1
        self._decisions, self._biases = {}, {}
        self._with_gradient = torch.is_grad_enabled()
        if not self._with_gradient:
            return x
        self._untaken = {}
        return self.passes.begin(x, training=True)

    def check_again(self) -> None:
        """A block runs a second time, in backward.

        Raises:
            RuntimeError: the decisions that it was run with are gone.
        """
        if not self._with_gradient:
            raise RuntimeError(
                "gradient checkpointing runs a block again whose token decisions had no gradient: call "
                "torch.utils.checkpoint with use_reentrant=False (timm's default), and make no forward pass in "
                "training mode under torch.no_grad() between a forward pass and its backward"
            )
        self.passes.check_last("token decisions")


class _BlockHook:
    """The hook of one block."""

    def __init__(self, hooks: SelectorHooks, number: int, *, begins: bool) -> None:
        self._hooks, self._number, self._begins = hooks, number, begins

    def enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Act before the block's forward."""
        x, *others = args
        hooks, number = self._hooks, self._number
        if hooks.is_training:
            if is_recomputed():
                hooks.check_again()
            if self._begins:
                x = hooks.decide(number, block, x)
            x, kwargs = hooks.mask(number, self._begins, x, kwargs)
            return (x, *others), kwargs
        if is_recomputed():
            hooks.passes.check_mode(training=False)
        elif self._begins and number == 0:
            hooks.passes.begin(x, training=False)
        if self._begins:
            x = hooks.gather(number, block, x)
        return (x, *others), kwargs


def _scorer(block: nn.Module) -> Scorer:
    scorer = getattr(block, SCORER)
    assert isinstance(scorer, Scorer)
    return scorer
