"""A tiny ViT whose heads and units can be removed, and what it must compute, written out head by head in float64."""

from collections.abc import Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ovit_engine.structured.gates import find_sites, install, installed, set_gate

DIM, HEADS, DEPTH, UNITS = 32, 4, 2, 64
IMAGES = torch.randn(7, 3, 32, 32, generator=torch.Generator().manual_seed(3))
# kept heads and units of each block
HEADS_KEPT = ([0, 2, 3], [1])
UNITS_KEPT = (list(range(0, 64, 2)), [3, 5, 6, 40, 63])


def vit(name: str = "vit_tiny_patch16_224", **options: Any) -> Any:
    """A ViT whose biases, norms and LayerScale all count, in eval mode."""
    torch.manual_seed(0)
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": DIM, "depth": DEPTH, "num_heads": HEADS, "mlp_ratio": 2}
    model = timm.create_model(name, num_classes=5, **{**settings, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def switch(model: nn.Module, heads: Sequence[Sequence[int]] = HEADS_KEPT, units: Any = UNITS_KEPT) -> Any:
    """Gates on all sites; those of the first blocks keep what is listed."""
    install(find_sites(model))
    for kind, lists in (("heads", heads), ("units", units)):
        for site, kept in zip([site for site in installed(model) if site.kind == kind], lists, strict=False):
            set_gate(site, torch.isin(torch.arange(site.count), torch.tensor(kept)))
    return model


def by_hand(model: Any, images: Tensor, heads: Sequence[Sequence[int]], units: Sequence[Sequence[int]]) -> Tensor:
    """Logits of a plain `vit()` with only these heads and units, float64: nothing of timm's or our forward."""
    p = {name: value.detach().double() for name, value in model.state_dict().items()}

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (DIM,), p[f"{name}.weight"], p[f"{name}.bias"], 1e-6)

    x = F.conv2d(images.double(), p["patch_embed.proj.weight"], p["patch_embed.proj.bias"], stride=8)
    x = torch.cat([p["cls_token"].expand(len(x), -1, -1), x.flatten(2).mT], dim=1) + p["pos_embed"]
    d = DIM // HEADS
    for i, (some_heads, some_units) in enumerate(zip(heads, units, strict=True)):
        w, b, at = p[f"blocks.{i}.attn.qkv.weight"], p[f"blocks.{i}.attn.qkv.bias"], norm(x, f"blocks.{i}.norm1")
        x = x + p[f"blocks.{i}.attn.proj.bias"]
        for h in some_heads:
            q, k, v = (at @ w[c * DIM + h * d :][:d].T + b[c * DIM + h * d :][:d] for c in range(3))
            mixed = (q @ k.mT / d**0.5).softmax(-1) @ v
            x = x + mixed @ p[f"blocks.{i}.attn.proj.weight"][:, h * d : (h + 1) * d].T
        hidden = norm(x, f"blocks.{i}.norm2") @ p[f"blocks.{i}.mlp.fc1.weight"].T + p[f"blocks.{i}.mlp.fc1.bias"]
        for j in some_units:
            x = x + F.gelu(hidden[..., j : j + 1]) * p[f"blocks.{i}.mlp.fc2.weight"][:, j]
        x = x + p[f"blocks.{i}.mlp.fc2.bias"]
    return norm(x, "norm")[:, 0] @ p["head.weight"].T + p["head.bias"]
