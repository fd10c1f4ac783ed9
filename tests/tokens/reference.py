"""A vision transformer's forward pass in float64, image by image and part by part: what the hooks must equal."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.tokens.models import IMAGES

# block, tokens after attention [N, C], attention [H, N, N], keys [H, N, d] of one image, state -> tokens, state
Between = Callable[[int, Tensor, Tensor, Tensor, Any], tuple[Tensor, Any]]


def attended(block: Any, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens after attention and LayerScale, and the map and keys of it, of one image x [N, C]."""
    attn = block.attn
    tokens = x.shape[0]
    q, k, v = (part.view(tokens, attn.num_heads, -1) for part in attn.qkv(block.norm1(x)).chunk(3, dim=-1))
    q, k = attn.q_norm(q), attn.k_norm(k)
    heads, maps = [], []
    for head in range(attn.num_heads):
        scores = q[:, head] @ k[:, head].T / k.shape[-1] ** 0.5
        if bias is not None:
            scores = scores + bias
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        maps.append(weights)
        heads.append(weights @ v[:, head])
    out = attn.proj(torch.cat(heads, dim=-1))
    return x + block.ls1(out), torch.stack(maps), k.transpose(0, 1)


def reference_logits(
    model: Any, between: Between, bias: Callable[[Any], Tensor | None] = lambda state: None, images: Tensor = IMAGES
) -> Tensor:
    """Logits of a copy of `model` without hooks, in which `between` is done to each image in each block."""
    plain = copy.deepcopy(model).double().eval()
    plain._token_hooks.remove()
    with torch.no_grad():
        embedded = plain.norm_pre(plain.patch_drop(plain._pos_embed(plain.patch_embed(images.double()))))
        last = []
        for x in embedded:
            state: Any = None
            for number, block in enumerate(plain.blocks):
                x, maps, keys = attended(block, x, bias(state))
                x, state = between(number, x, maps, keys, state)
                x = x + block.ls2(block.mlp(block.norm2(x)))
            last.append(x)
        output: Tensor = plain.forward_head(plain.norm(torch.stack(last)))
    return output.float()
