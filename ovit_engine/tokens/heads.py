"""What heads of attention say together, where some of them may be switched off."""

from torch import Tensor


def mean_of_heads(x: Tensor, gate: Tensor | None) -> Tensor:
    """The mean of x [images, heads, ...] over heads, of those that `gate`, bool [heads], keeps.

    A head that is off is gone in the model that is deployed: it must have no say in training either.
    """
    if gate is None:
        return x.mean(dim=1)
    kept = gate.view(-1, *[1] * (x.ndim - 2))
    return x.masked_fill(~kept, 0.0).sum(dim=1) / gate.sum().to(x.dtype)
