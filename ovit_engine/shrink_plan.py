"""Which heads and units go, and what takes their place: pure tensors and one MLP or attention module at a time."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ovit_engine.gate_groups import Groups, tile_of
from ovit_engine.gates import GateSite
from ovit_engine.masks import Masks
from ovit_engine.pattern import parse_pattern
from ovit_engine.quant import QuantAttention


@dataclass(frozen=True, kw_only=True)
class Removal:
    """What is done at one site."""

    site: GateSite
    # bool [count]: those that stay
    keep: Tensor
    # bool [count]: those of them that must have no effect any more, since a pattern holds them in their place
    mute: Tensor
    # the reader's bias [out] in float64, with what the removed ones always added; None where it stays as it is
    bias: Tensor | None = None

    @property
    def rows(self) -> list[int]:
        """Rows of `qkv` or `fc1` that go."""
        features = self.keep.repeat_interleave(self.site.width)
        times = self.site.source.out_features // features.numel()
        return _where(~features.repeat(times))

    @property
    def columns(self) -> list[int]:
        """Columns of `proj` or `fc2` that go."""
        return _where(~self.keep.repeat_interleave(self.site.width))

    @property
    def muted_columns(self) -> list[int]:
        """Columns of `proj` or `fc2` that become zero."""
        return _where(self.mute.repeat_interleave(self.site.width))


def whole_groups(keep: Tensor, groups: Groups) -> Tensor:
    """`keep` [count] with every group kept whole of which one is kept; at least one group is."""
    whole = groups.of_gate(keep).clone()
    if not whole.any():
        whole[0] = True
    return groups.spread(whole)


def groups_of(site: GateSite, masks: Masks | None) -> Groups:
    """How many neighbouring heads or units must stay or go together, so that the patterns of `masks` hold."""
    if masks is None:
        return Groups(site.count)
    return Groups.of(site, {name: tile_of(parse_pattern(masks.pattern(name))) for name in masks.names()})


def gated(site: GateSite, masks: Masks | None) -> Removal:
    """What a gate says of a site: what is off goes, or is muted where a pattern holds it in its place."""
    gate = site.gate.cpu()
    keep = whole_groups(gate, groups_of(site, masks))
    return Removal(site=site, keep=keep, mute=keep & ~gate)


@torch.no_grad()
def dead(site: GateSite, copy: GateSite, masks: Masks | None, probe: Tensor) -> Removal:
    """What has lost its effect by zeros in the weights of a site that has no gate.

    A head or unit whose columns in `proj` or `fc2` are zero does nothing. One whose rows in the value part of `qkv`, or
    in `fc1`, are zero is the same for every token and image, so that it moves into the bias of `proj` or `fc2`: weights
    of attention sum to one, whatever query and key are (specs/structured-and-tokens.md §9.1). Where that layer has no
    bias only what is always zero goes.

    Args:
        copy: the same site of a float64 copy of its owner, in eval mode.
        probe: inputs of the owner, [batch, tokens, features].
    """
    width, count = site.width, site.count
    unread = (copy.linear.weight == 0).all(dim=0).view(count, width).all(dim=1)
    writes = (copy.source.weight == 0).all(dim=1)[-count * width :].view(count, width).all(dim=1)
    features = _input_of(copy.linear, copy.owner, probe)
    value = features.flatten(0, -2)
    constant = value[0]
    steady = ((value - constant).abs().amax(dim=0) <= 1e-12 * constant.abs()).view(count, width).all(dim=1)
    silent = (constant == 0).view(count, width).all(dim=1)
    # rounded attention weights do not quite sum to one; and without a bias there is no place for a constant
    only_silent = isinstance(copy.owner, QuantAttention) or copy.linear.bias is None
    foldable = writes & steady & (silent if only_silent else torch.ones_like(silent))
    keep = whole_groups(~(unread | foldable), groups_of(site, masks))
    folded = foldable & ~keep
    bias = None
    if copy.linear.bias is not None and bool(folded.any()):
        bias = copy.linear(torch.where(folded.repeat_interleave(width), constant, 0.0))
    return Removal(site=site, keep=keep, mute=torch.zeros_like(keep), bias=bias)


def _input_of(linear: nn.Linear, owner: nn.Module, probe: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = linear.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        owner(probe)
    finally:
        handle.remove()
    return seen[0]


def _where(flags: Tensor) -> list[int]:
    return flags.nonzero().flatten().tolist()
