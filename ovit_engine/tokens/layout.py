"""What of a vision transformer token reduction must know."""

import inspect
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ovit_engine.masking.parameters import unwrapped


@dataclass(frozen=True)
class Layout:
    """The tokens of a model: `prefix` ones that always stay, then `patches`, each `width` numbers; `depth` blocks."""

    prefix: int
    patches: int
    width: int
    depth: int


def find_transformer(model: nn.Module) -> Any:
    """Return the vision transformer of `model`: itself, or the one inside it.

    Raises:
        ValueError: there is none with a layout as timm's VisionTransformer has it, or more than one.
    """
    found = [
        module
        for module in unwrapped(model).modules()
        if all(hasattr(module, name) for name in ("blocks", "num_prefix_tokens", "patch_embed"))
    ]
    if len(found) != 1:
        what = "no vision transformer" if not found else f"{len(found)} vision transformers"
        raise ValueError(
            f"{type(unwrapped(model)).__name__} has {what} whose tokens can be reduced: one is needed with blocks, "
            "patch_embed and num_prefix_tokens, as timm's VisionTransformer"
        )
    return found[0]


def find_layout(model: nn.Module) -> Layout:
    """Return the layout of the vision transformer in `model`.

    Raises:
        ValueError: there is none, or one that needs all its tokens: pooling over patches, positions inside the blocks,
            images of any size, tokens that are dropped at random already.
    """
    vit = find_transformer(model)
    why = _why_not_reducible(vit)
    if why is not None:
        raise ValueError(f"tokens of {type(vit).__name__} can't be reduced: {why}")
    return Layout(vit.num_prefix_tokens, vit.patch_embed.num_patches, vit.embed_dim, len(vit.blocks))


def _why_not_reducible(vit: Any) -> str | None:
    pool = getattr(vit, "global_pool", None)
    if pool != "token":
        return f"its global_pool is {pool!r}, and only the class token ('token') does not ask for all patches"
    if vit.num_prefix_tokens < 1:
        return "it has no class token"
    if not isinstance(getattr(vit.patch_embed, "num_patches", None), int):
        return "its patch_embed does not say how many patches there are (num_patches)"
    if getattr(vit, "dynamic_img_size", False):
        return "dynamic_img_size lets the number of patches vary, and counts are fixed"
    if not isinstance(getattr(vit, "patch_drop", None), (nn.Identity, type(None))):
        return "patch_drop_rate drops patches at random in training: set it to 0"
    if getattr(vit, "rope", None) is not None:
        return "rotary positions belong to places, and tokens change theirs"
    for number, block in enumerate(vit.blocks):
        attention = getattr(block, "attn", None)
        if attention is None:
            return f"block {number} ({type(block).__name__}) has no attention of its own (attn)"
        for what, module in ((f"block {number}", block), (f"the attention of block {number}", attention)):
            # a quantized module is of a class made beside its own, whose forward takes whatever comes
            if not any("attn_mask" in inspect.signature(kind.forward).parameters for kind in _forwards(module)):
                return f"{what} ({type(module).__name__}) takes no attn_mask; timm >= 1.0.20 has it in its Block"
    return None


def _forwards(module: nn.Module) -> list[Any]:
    """Return the classes of `module` that say what it takes."""
    return [kind for kind in type(module).__mro__ if "forward" in vars(kind)]


def mean_of_heads(x: Tensor, gate: Tensor | None) -> Tensor:
    """Return the mean of x [images, heads, ...] over heads, of those that `gate`, bool [heads], keeps.

    A head that is off is gone in the model that is deployed: it must have no say in training either.
    """
    if gate is None:
        return x.mean(dim=1)
    kept = gate.view(-1, *[1] * (x.ndim - 2))
    return x.masked_fill(~kept, 0.0).sum(dim=1) / gate.sum().to(x.dtype)
