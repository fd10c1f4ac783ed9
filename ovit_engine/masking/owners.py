"""What kind of layer owns a weight: whether zeros in it reach the file, and which of its axes products sum over."""

from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.weight_norm import WeightNorm

from ovit_engine.masking.parameters import Slot

# weights [out, in, ...]; a tied embedding is a head, whose sums run along its features
_OUT_IN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention, nn.Embedding, nn.RNNCellBase)

# parametrizations that scale the weight, and the tensor whose zeros are those of the weight
_SCALED = {parametrizations._WeightNorm: "original1", parametrizations._SpectralNorm: "original"}

_COMPUTED = "the layer's weight is computed from it by {}"


def why_not_pruned(slot: Slot) -> str | None:
    """Return why zeros in a weight would not be those of a weight in the exported file; None where they are."""
    owner = slot.module
    if isinstance(owner, nn.RNNBase):
        kind = f"nn.{type(owner).__name__}"
        return f"the file packs weights of {kind} in another order, and their zeros can't be checked there"
    if isinstance(owner, nn.Bilinear):
        return "the file rearranges the weight of nn.Bilinear, and its zeros can't be checked there"
    if isinstance(owner, parametrize.ParametrizationList):
        other = next((each for each in owner if _SCALED.get(type(each)) != slot.attribute), None)
        return (
            None if other is None else f"the layer's weight is computed from it by {type(other).__name__.lstrip('_')}"
        )
    hooks = owner._forward_pre_hooks.values()
    if any(isinstance(hook, WeightNorm) and slot.attribute == f"{hook.name}_g" for hook in hooks):
        return _COMPUTED.format("WeightNorm")
    return None


def sums_along_rows(slot: Slot) -> bool:
    """Return whether the second axis of a weight is known to be the one that products sum over."""
    return isinstance(slot.module, (*_OUT_IN, parametrize.ParametrizationList))
