"""Which heads and units are removed, what replaces them, and the proof that outputs stay, one module at a time."""

import copy
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ovit_engine import quant
from ovit_engine.masking.masks import Masks
from ovit_engine.pruning.patterns import parse_pattern
from ovit_engine.quant import QuantAttention
from ovit_engine.structured.gates import GateSite
from ovit_engine.structured.groups import Groups, tile_of


@dataclass(frozen=True, kw_only=True)
class Removal:
    """What is removed at one site."""

    site: GateSite
    # bool [count]: those that stay
    keep: Tensor
    # bool [count]: those of them that must have no effect any more, since a pattern holds them in their place
    mute: Tensor
    # the reader's bias [out] in float64, with what the removed ones always added; None where it stays as it is
    bias: Tensor | None = None

    @property
    def is_nothing(self) -> bool:
        """Whether the site stays as it is."""
        return bool(self.keep.all()) and not bool(self.mute.any())


def whole_groups(keep: Tensor, groups: Groups) -> Tensor:
    """Return `keep` [count] with every group kept whole if one of its members is; at least one group is kept."""
    whole = groups.of_gate(keep).clone()
    if not whole.any():
        whole[0] = True
    return groups.spread(whole)


def groups_of(site: GateSite, masks: Masks | None) -> Groups:
    """Return which neighbors are kept or removed together, so that the patterns of `masks` hold."""
    if masks is None:
        return Groups(site.count)
    return Groups.of(site, {name: tile_of(parse_pattern(masks.pattern(name))) for name in masks.names()})


def removal_by_gate(site: GateSite, masks: Masks | None) -> Removal:
    """Return the removal of what a gate switches off; what a pattern holds in its place is muted instead."""
    gate = site.gate.cpu()
    keep = whole_groups(gate, groups_of(site, masks))
    return Removal(site=site, keep=keep, mute=keep & ~gate)


@torch.no_grad()
def removal_of_dead(site: GateSite, masks: Masks | None) -> Removal:
    """Return the removal of what has no effect, because of zeros in the weights of a site without a gate.

    A head or unit whose columns in `proj` or `fc2` are zero does nothing. One whose rows in the value part of `qkv`, or
    in `fc1`, are zero is the same for every token and image, so that it moves into the bias of `proj` or `fc2`:
    attention weights sum to one, whatever query and key are (specs/structured-and-tokens.md §9.1). Where that layer has
    no bias only what is always zero is removed.
    """
    copy, width, count = float64_copy(site), site.width, site.count
    unread = (copy.linear.weight == 0).all(dim=0).view(count, width).all(dim=1)
    writes = (copy.source.weight == 0).all(dim=1)[-count * width :].view(count, width).all(dim=1)
    value = _input_of(copy).flatten(0, -2)
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


def _input_of(site: GateSite) -> Tensor:
    """Return what `proj` or `fc2` reads."""
    seen: list[Tensor] = []
    with site.linear.register_forward_pre_hook(lambda module, args: seen.append(args[0])):
        site.owner(probe_inputs(site))
    return seen[0]


# of the largest output; float64 rounds at 1e-16, and a wrong row or column shows as 1e-3 and more
_TOLERANCE = 1e-9

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def float64_copy(site: GateSite) -> GateSite:
    """Return the same site in a copy of its owner: float64, on the CPU, in eval mode, with fixed ranges.

    Hooks that are methods stay behind: they belong to objects that watch the training model.
    """
    with _without_methods(site.owner):
        owner = copy.deepcopy(site.owner)
    owner = owner.to("cpu", torch.float64).eval()
    hold_ranges(owner)
    return replace(site, owner=owner, linear=owner.get_submodule(site.name.rpartition(".")[2]))  # type: ignore[arg-type]


def hold_ranges(model: nn.Module) -> None:
    """Stop observers, after live ranges of weights have followed the weights of this moment."""
    for module in model.modules():
        if isinstance(module, (quant.QuantLinear, quant.QuantConv2d)):
            module.weight_quantizer.observe(module.weight)
    quant.set_observing(model, False)


def probe_inputs(site: GateSite) -> Tensor:
    """Return inputs of the owner, float64 [2, 7, features], always the same."""
    generator = torch.Generator().manual_seed(20090)
    shape = 2, 7, site.source.in_features
    return torch.randn(shape, dtype=torch.float64, generator=generator, device="cpu")


@torch.no_grad()
def check_same_outputs(before: GateSite, after: GateSite) -> None:
    """Raise RuntimeError unless two copies of an owner, before and after removal, compute the same."""
    inputs = probe_inputs(before)
    wanted = before.owner(inputs)
    try:
        found = after.owner(inputs)
    except RuntimeError as mismatch:
        raise RuntimeError(
            f"{before.owner_name}: its {before.kind} can't be removed, since not only {before.name!r} reads them"
        ) from mismatch
    error, size = float((found - wanted).abs().max()), float(wanted.abs().max())
    if not error <= _TOLERANCE * size:
        raise RuntimeError(
            f"{before.owner_name}: without its removed {before.kind} it computes something else (largest difference "
            f"{error:.3g} of {size:.3g} in float64): the model stays as it was"
        )


@contextmanager
def _without_methods(owner: nn.Module) -> Iterator[None]:
    """Hide the hooks of `owner` that are bound methods."""
    before = [(module, name, getattr(module, name)) for module in owner.modules() for name in _HOOKS]
    try:
        for module, name, hooks in before:
            functions = ((key, hook) for key, hook in hooks.items() if not isinstance(hook, types.MethodType))
            setattr(module, name, type(hooks)(functions))
        yield
    finally:
        for module, name, hooks in before:
            setattr(module, name, hooks)
