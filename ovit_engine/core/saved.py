"""Tensors that a modifier takes up from a checkpoint."""

from collections.abc import Mapping

from torch import Tensor


def place_saved(
    saved: Mapping[str, Tensor], here: Mapping[str, Tensor], what: str, *, complete: bool = False
) -> dict[str, Tensor]:
    """Return copies of saved tensors, each where the tensor of its name is here; all of them or none.

    Args:
        what: what they are, for messages.
        complete: whether every name here must have one.

    Raises:
        ValueError: a name or a shape that does not fit, or a name that lacks.
    """
    lost = [name for name in here if name not in saved]
    if complete and lost:
        raise ValueError(f"half a state: the checkpoint has no {what} of {lost[0]!r}")
    for name, tensor in saved.items():
        if name not in here or tensor.shape != here[name].shape:
            raise ValueError(f"the checkpoint's {what} of {name!r} {list(tensor.shape)} fits nothing here")
    return {name: tensor.to(here[name].device, copy=True) for name, tensor in saved.items()}
