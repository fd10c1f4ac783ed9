"""How far a student's answers are from its teacher's: the terms of a loss, on plain tensors.

Hinton, Vinyals, Dean, arXiv 1503.02531 (soft labels); DeiT, arXiv 2012.12877 (hard ones); DynamicViT, arXiv 2106.02034,
section 3.3 (tokens). Letters: B images, K classes, N patch tokens, M those that the student has left, C width.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from ovit_engine.utils.class_axis import class_axis


def soft_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL divergence of the student's distribution from the teacher's, mean over images; logits [B, K].

    The logits may be those of a map [B, K, H, W] or sequence [B, L, K]: each place counts as an image (`class_axis`).
    Both are softened by the temperature T, and the result is multiplied by T^2, so that gradients keep their size.
    """
    axis = class_axis(student.ndim)
    ours = log_softmax(_exact(student) / temperature, dim=axis)
    theirs = log_softmax(_exact(teacher) / temperature, dim=axis)
    return kl_div(ours, theirs, reduction="none", log_target=True).sum(axis).mean() * temperature**2


def hard_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Cross-entropy of the student's logits, as in `soft_loss`, with the class that the teacher finds most likely."""
    axis = class_axis(student.ndim)
    return cross_entropy(_exact(student).movedim(axis, 1), teacher.argmax(dim=axis))


def token_loss(student: Tensor, teacher: Tensor, origin: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
    """Return the mean square difference of patch tokens, student [B, M, C] and teacher [B, N, C].

    Args:
        origin: int64 [B, M], the teacher's token that each of the student's is compared with; None: that in its place.
        weight: [B, M], how much each counts: 0 for one that the student has dropped. All 0 gives 0.
    """
    if origin is not None:
        teacher = teacher.gather(1, origin.unsqueeze(-1).expand(-1, -1, teacher.shape[-1]))
    distance = (_exact(student) - _exact(teacher)).square().mean(dim=-1)
    if weight is None:
        return distance.mean()
    weight = weight.detach().to(distance.dtype)  # which token counts is not learned from here
    return (distance * weight).sum() / weight.sum().clamp_min(torch.finfo(distance.dtype).tiny)


def _exact(tensor: Tensor) -> Tensor:
    """At least float32."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
