"""A policy over tokens: kept or not, in training as a bias of attention. Pure functions.

DynamicViT, arXiv 2106.02034, section 3.3. Letters: p policy, tau temperature.
"""

import torch
from torch import Tensor

# What a dropped token keeps, so that the gradient by which it may come back is a number. In float16 that of 1e-6 would
# be lost in rounding: measured in specs/structured-and-tokens.md §7.2.
EPSILON = 1e-6
EPSILON_HALF = 1e-4


def policy_bias(policy: Tensor, epsilon: float = EPSILON) -> Tensor:
    """What to add to attention scores so that no token sees a dropped one, but each sees itself.

    policy [images, tokens] between 0 and 1; returns log(policy + epsilon) [images, 1, tokens, tokens], 0 on the
    diagonal. Softmax of scores with it is the published masked softmax, exp(s_ij) p_j over its sum, also in its
    gradients. (No clamp: its gradient at 0 is 0, and dropped tokens would stay dropped.)
    """
    bias = (policy + epsilon).log()[:, None, None, :]
    itself = torch.eye(policy.shape[1], dtype=torch.bool, device=policy.device)
    return bias.masked_fill(itself, 0.0)


def compute_epsilon(x: Tensor) -> float:
    """The epsilon for the type in which attention of `x` is computed, autocast included."""
    kind = x.device.type
    computed = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return EPSILON_HALF if computed == torch.float16 else EPSILON
