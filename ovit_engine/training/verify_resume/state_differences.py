"""Where two saved states differ, to the last bit."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Difference:
    """One place in nested states, and how it differs there."""

    where: str  # "model.blocks.0.attn.qkv.weight"
    how: str

    def __str__(self) -> str:
        return f"{self.where}: {self.how}"


def state_differences(one: Any, two: Any, where: str = "") -> Iterator[Difference]:
    """Yield every leaf of nested mappings and sequences that is not the same in both.

    Tensors are compared by their bits, so that -0.0 is not 0.0 and a NaN is itself; others by type and value.
    """
    if type(one) is not type(two):
        yield Difference(where, f"{type(one).__name__} in one, {type(two).__name__} in the other")
    elif isinstance(one, Mapping):
        for key in dict.fromkeys([*one, *two]):
            inner = f"{where}.{key}" if where else str(key)
            if key not in one or key not in two:
                yield Difference(inner, f"only in the {'first' if key in one else 'second'}")
            else:
                yield from state_differences(one[key], two[key], inner)
    elif isinstance(one, (list, tuple)):
        if len(one) != len(two):
            yield Difference(where, f"{len(one)} entries in one, {len(two)} in the other")
        for index, (first, second) in enumerate(zip(one, two, strict=False)):
            yield from state_differences(first, second, f"{where}[{index}]")
    else:
        how = _tensor_difference(one, two) if isinstance(one, Tensor) else f"{one!r} in one, {two!r} in the other"
        if how and (isinstance(one, Tensor) or repr(one) != repr(two)):  # exact for floats, and NaN is itself
            yield Difference(where, how)


def _tensor_difference(one: Tensor, two: Tensor) -> str:
    """Nothing where they are the same."""
    if one.dtype != two.dtype or one.shape != two.shape:
        return f"{one.dtype} {list(one.shape)} in one, {two.dtype} {list(two.shape)} in the other"
    flat = [tensor.detach().cpu().contiguous().reshape(-1, 1) for tensor in (one, two)]
    differs = (flat[0].view(torch.uint8) != flat[1].view(torch.uint8)).any(dim=1)
    if not differs.any():
        return ""
    count = f"{int(differs.sum())} of {differs.numel()} entries differ"
    if one.is_complex():
        return count
    return f"{count}, by up to {float((flat[0].double() - flat[1].double()).abs()[differs].max()):.3g}"
