"""From scores to decisions that are 0 or 1 and have a gradient (straight through). Pure functions of tensors."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ovit_engine.tokens.ops import top_tokens


class Sampler(ABC):
    """Decides in training which tokens stay. Noise is given: Gumbel, [images, tokens, choices]."""

    choices = 1

    @abstractmethod
    def __call__(self, scores: Tensor, noise: Tensor, keep: int, before: Tensor | None) -> Tensor:
        """Decisions [images, tokens] of 0 and 1 for scores of that shape; `before`: those of the stage before."""


class KeepOrDrop(Sampler):
    """Each token for itself (DynamicViT): Gumbel-softmax over keep and drop at temperature 1.

    How many stay varies; a term of the loss brings the mean to what inference keeps.
    """

    choices = 2

    def __call__(self, scores: Tensor, noise: Tensor, keep: int, before: Tensor | None) -> Tensor:
        soft = (scores + noise[..., 0] - noise[..., 1]).sigmoid()  # of two choices, softmax of their difference
        return _straight((soft > 0.5).to(soft.dtype), soft)


class TopTokens(Sampler):
    """Exactly `keep` tokens of each image, of those left: the largest of log-softmax of scores + noise (SViTE+).

    `temperature` divides them for the soft decision whose gradient is taken.
    """

    def __init__(self, temperature: float) -> None:
        # a tensor, so that no compiled graph compiles again when it changes
        self.temperature = torch.tensor(temperature, device="cpu")

    def __call__(self, scores: Tensor, noise: Tensor, keep: int, before: Tensor | None) -> Tensor:
        noisy = scores.log_softmax(1) + noise[..., 0]
        if before is not None:
            noisy = noisy.masked_fill(before.detach() == 0, -torch.inf)
        soft = (noisy / self.temperature).softmax(1)
        return _straight(torch.zeros_like(soft).scatter(1, top_tokens(noisy.detach(), keep), 1.0), soft)


def gumbel(shape: tuple[int, ...], device: torch.device, seed: int) -> Tensor:
    """Gumbel(0, 1) noise in float32 that depends on `seed` alone."""
    generator = torch.Generator(device).manual_seed(seed)
    return -torch.empty(shape, device=device).exponential_(generator=generator).log()


def _straight(hard: Tensor, soft: Tensor) -> Tensor:
    """`hard` exactly, with the gradient of `soft`."""
    return hard + (soft - soft.detach())


def ratio_loss(decisions: list[Tensor], targets: list[float]) -> Tensor:
    """Mean over stages and images of (share kept - target)^2; decisions [images, tokens] a stage (DynamicViT eq. 9)."""
    terms = [(kept.mean(1) - target).square().mean() for kept, target in zip(decisions, targets, strict=True)]
    return torch.stack(terms).mean()
