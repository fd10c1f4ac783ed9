"""Taking some of the tokens, in a form that exports as TopK with a constant count and one gather."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Survivors:
    """Which patch tokens a forward pass in training left.

    origin: int64 [images, tokens], the place among all patches of each patch token that comes out of the model.
    weight: float [images, tokens], 1 where it counts: 0 for one that is masked, or is no single patch (a fused token).
    """

    origin: Tensor
    weight: Tensor


def top_tokens(scores: Tensor, keep: int) -> Tensor:
    """Places of the `keep` largest scores of each image, int64 [images, keep]; scores [images, tokens].

    In the order of the scores, not of the image: behind the position embedding attention does not ask for places.
    """
    return scores.topk(keep, dim=1).indices


def gather_tokens(x: Tensor, index: Tensor, prefix: int) -> Tensor:
    """The first `prefix` tokens of x [images, prefix + tokens, width], then patch tokens at `index` [images, keep]."""
    patches = x[:, prefix:]
    kept = patches.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
    return torch.cat([x[:, :prefix], kept], dim=1) if prefix else kept
