"""Plain weights in the copy that is exported: reparametrized ones computed, packed projections of attention split."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ovit_engine.masking.masks import Masks, pack_mask

_PARTS = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


def resolve_weights(model: nn.Module, masks: Masks, inputs: tuple[Tensor, ...]) -> Masks:
    """Replace each weight of `model`, a copy, that its forward computes by its value; return the masks of the copy.

    A packed `in_proj_weight` is split where the attention is not self-attention: no single product reads it there.
    """
    renamed: dict[str, tuple[str, ...]] = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        for old, new in _computed(module).items():
            renamed[prefix + old] = (prefix + new,)
    for name, module in _mixed_attention(model, inputs).items():
        _split(module)
        prefix = f"{name}." if name else ""
        renamed[f"{prefix}in_proj_weight"] = tuple(f"{prefix}{part}" for part in _PARTS)
    return masks if not renamed else _renamed(masks, model, renamed)


def _computed(module: nn.Module) -> dict[str, str]:
    """Make computed weights of one module plain parameters; return parameter -> the weight that has its zeros."""
    names: dict[str, str] = {}
    if parametrize.is_parametrized(module):
        lists = module.parametrizations
        assert isinstance(lists, nn.ModuleDict)
        values = {name: getattr(module, name).detach().clone() for name in lists}
        # not by remove_parametrizations: it changes the class, which the model that was copied shares
        module.__class__ = type(module).__bases__[0]
        del module.parametrizations
        for name, value in values.items():
            module.register_parameter(name, nn.Parameter(value, requires_grad=False))
            names |= {f"parametrizations.{name}.{each}": name for each in ("original", "original1")}
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, (WeightNorm, SpectralNorm, prune.BasePruningMethod)):
            name = hook._tensor_name if isinstance(hook, prune.BasePruningMethod) else hook.name
            hook.remove(module)
            del module._forward_pre_hooks[key]
            names |= {f"{name}_v": name, f"{name}_orig": name}
    return names


@torch.no_grad()
def _mixed_attention(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, nn.MultiheadAttention]:
    """The attention modules that are called with a query, key and value that are not one tensor."""
    packed = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None
    }
    if not packed:
        return {}
    mixed: set[nn.Module] = set()
    handles = [each.register_forward_pre_hook(partial(_watch, mixed), with_kwargs=True) for each in packed.values()]
    device = next(iter(packed.values())).in_proj_weight.device
    try:
        model(*(value.to(device) for value in inputs))
    finally:
        for handle in handles:
            handle.remove()
    return {name: module for name, module in packed.items() if module in mixed}


def _watch(mixed: set[nn.Module], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    operands = [*args[:3], *(kwargs[name] for name in ("query", "key", "value") if name in kwargs)]
    if any(each is not operands[0] for each in operands):
        mixed.add(module)


def _split(module: nn.MultiheadAttention) -> None:
    """Give the attention separate projections, which `nn.MultiheadAttention` knows for keys of another width."""
    for name, part in zip(_PARTS, module.in_proj_weight.detach().chunk(3), strict=True):
        module.register_parameter(name, nn.Parameter(part.clone(), requires_grad=False))
    module.register_parameter("in_proj_weight", None)
    module._qkv_same_embed_dim = False


def _renamed(masks: Masks, model: nn.Module, names: Mapping[str, tuple[str, ...]]) -> Masks:
    state = {}
    for name in masks.names():
        mask, parts = masks.get(name), names.get(name, (name,))
        assert mask is not None
        for part, piece in zip(parts, mask.chunk(len(parts)), strict=True):
            state[part] = {**pack_mask(piece), "pattern": masks.pattern(name)}
    own = Masks()
    own.load_state_dict(state, model)
    return own
