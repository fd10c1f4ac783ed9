"""A small vision transformer trained on scikit-learn's digits, for tests of quality."""

from functools import cache

import numpy as np
import timm
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import TensorDataset

EPOCHS, BATCH, RATE, NOISE = 40, 64, 2e-3, 0.5
PRUNED = "re:blocks.*(qkv|proj|fc1|fc2)\\.weight"


@cache
def images() -> tuple[TensorDataset, Tensor, Tensor]:
    """The training set, and the images and labels of a fixed held-out 450."""
    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor((x - x.mean()) / x.std(), dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(y)
    train, held_out = train_test_split(np.arange(len(x)), test_size=450, random_state=0, stratify=y)
    return TensorDataset(x[train], y[train]), x[held_out], y[held_out]


def accuracy(model: nn.Module) -> float:
    """Share of the held-out images that the model names rightly."""
    _, x, y = images()
    model.eval()
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


def trained_vit(seed: int) -> nn.Module:
    """Four blocks, 64 wide, 196,608 prunable weights; linear layers start as PyTorch initialises them."""
    torch.manual_seed(seed)
    model: nn.Module = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=64, depth=4, num_heads=4
    )
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.reset_parameters()
    x, y = images()[0].tensors
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.05)
    steps = len(x) // BATCH * EPOCHS
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.05)
    model.train()
    for step in range(steps):
        if step % (len(x) // BATCH) == 0:
            order = torch.randperm(len(x)).split(BATCH)
        batch = order[step % (len(x) // BATCH)]
        optimizer.zero_grad()
        noisy = x[batch] + NOISE * torch.randn(len(batch), 1, 8, 8)
        nn.functional.cross_entropy(model(noisy), y[batch]).backward()
        optimizer.step()
        scheduler.step()
    return model
