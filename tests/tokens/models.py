"""Tiny vision transformers: 16 patches, four blocks."""

from typing import Any

import torch
from timm.models import VisionTransformer, VisionTransformerDistilled
from torch import Tensor, nn

IMAGES = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(3))


class RowVit(VisionTransformer):
    """Takes the rows of tests/loops.py as images of eight pixels."""

    def __init__(self, outputs: int) -> None:
        super().__init__((2, 4), 1, 1, outputs, embed_dim=16, depth=2, num_heads=4)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = super().forward(x.view(-1, 1, 2, 4))
        return output


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter drawn anew: timm's initial biases and tokens are zero, and hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.ndim < 2 else 1.5 / parameter.shape[-1] ** 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def vit(distilled: bool = False, seed: int = 0, **options: Any) -> Any:
    kind: Any = VisionTransformerDistilled if distilled else VisionTransformer
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 3, "num_classes": 5}
    return randomised(kind(**{**settings, **options}), seed)


# what a layout may hold: one prefix token, two, five, LayerScale, norms of q and k
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "distilled": {"distilled": True},
    "registers": {"reg_tokens": 4},
    "layer_scale": {"init_values": 0.5},
    "qk_norm": {"qk_norm": True},
}


def logits(model: nn.Module, images: Tensor = IMAGES) -> Tensor:
    with torch.no_grad():
        output: Tensor = model.eval()(images)
    return output
