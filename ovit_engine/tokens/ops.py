"""Operations on tokens as pure functions of tensors: keep, gather, mask, and decide in full precision."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

# What a dropped token keeps, so that the gradient by which it may come back is a number. In float16 that of 1e-6 would
# be lost in rounding: measured in specs/structured-and-tokens.md §7.2.
EPSILON = 1e-6

EPSILON_HALF = 1e-4


@dataclass(frozen=True)
class Survivors:
    """Which patch tokens a forward pass in training left.

    origin: int64 [images, tokens], the place among all patches of each patch token that comes out of the model.
    weight: float [images, tokens], 1 where it counts: 0 for one that is masked, or is no single patch (a fused token).
    """

    origin: Tensor
    weight: Tensor


def top_tokens(scores: Tensor, keep: int) -> Tensor:
    """Return the places of the `keep` largest scores of each image, int64 [images, keep]; scores [images, tokens].

    In the order of the scores, not of the image: behind the position embedding attention does not ask for places.
    """
    return scores.topk(keep, dim=1).indices


def gather_tokens(x: Tensor, index: Tensor, prefix: int) -> Tensor:
    """The first `prefix` tokens of x [images, prefix + tokens, width], then patch tokens at `index` [images, keep]."""
    patches = x[:, prefix:]
    kept = patches.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
    return torch.cat([x[:, :prefix], kept], dim=1) if prefix else kept


def policy_bias(policy: Tensor, epsilon: float = EPSILON) -> Tensor:
    """Return what to add to attention scores so that no token sees a dropped one, but each sees itself.

    policy [images, tokens] between 0 and 1; returns log(policy + epsilon) [images, 1, tokens, tokens], 0 on the
    diagonal. Softmax of scores with it is the published masked softmax, exp(s_ij) p_j over its sum, also in its
    gradients. (No clamp: its gradient at 0 is 0, and dropped tokens would stay dropped.)
    """
    bias = (policy + epsilon).log()[:, None, None, :]
    itself = torch.eye(policy.shape[1], dtype=torch.bool, device=policy.device)
    return bias.masked_fill(itself, 0.0)


def compute_epsilon(x: Tensor) -> float:
    """Return the epsilon for the type in which attention of `x` is computed, autocast included."""
    kind = x.device.type
    computed = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return EPSILON_HALF if computed == torch.float16 else EPSILON


def widened(x: Tensor) -> Tensor:
    """`x` in float32, or wider where it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def is_autocast(x: Tensor) -> bool:
    """Return whether autocast is on where `x` is."""
    kind = x.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)  # torch 2.11 can't trace `is_autocast_available`


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Return a context in which autocast lets products on the device of `x` be."""
    return torch.autocast(x.device.type, enabled=False) if is_autocast(x) else nullcontext()
