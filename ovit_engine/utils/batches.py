"""What a batch of a user's data is made of: the model's arguments, and targets."""

from collections.abc import Mapping
from typing import Any, NamedTuple

LABELS = ("labels", "label", "targets", "target")


class Batch(NamedTuple):
    """Arguments of the model by position and by name, and targets; None where a batch has none."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    targets: Any


def split_batch(batch: Any) -> Batch:
    """Read a batch in the forms people use.

    A pair is (inputs, targets), and of a longer tuple the last is the targets. A mapping has its targets under
    "labels", "label", "targets" or "target". Inputs are one tensor, a tuple of arguments, or a mapping of them by name.

    Raises:
        ValueError: an empty batch.
    """
    if isinstance(batch, Mapping):
        key = next((key for key in LABELS if key in batch), None)
        named = {name: value for name, value in batch.items() if name != key}
        if not named:
            raise ValueError("a batch holds no inputs")
        return Batch((), named, None if key is None else batch[key])
    if not isinstance(batch, (tuple, list)):
        return Batch((batch,), {}, None)
    if not batch:
        raise ValueError("a batch is empty")
    *inputs, targets = batch if len(batch) > 1 else (*batch, None)
    if len(inputs) > 1:
        return Batch(tuple(inputs), {}, targets)
    (only,) = inputs
    if isinstance(only, Mapping):
        return Batch((), dict(only), targets)
    return Batch(tuple(only) if isinstance(only, (tuple, list)) else (only,), {}, targets)
