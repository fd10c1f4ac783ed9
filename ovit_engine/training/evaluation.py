"""Top-1 accuracy."""

from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from ovit_engine.distributed.comm import SINGLE_PROCESS, Comm


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader[Any], device: torch.device, *, comm: Comm = SINGLE_PROCESS) -> float:
    """Top-1 accuracy in eval mode; the model's training flags are put back.

    Args:
        comm: processes that see a part of the images each, and then return the accuracy over all.
    """
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    counts = torch.zeros(2, dtype=torch.long, device=device)  # right, all
    for images, labels in loader:
        labels = labels.to(device)
        counts[0] += (model(images.to(device)).argmax(-1) == labels).sum()
        counts[1] += (labels >= 0).sum()  # less than zero: an unreadable image, for which another stands in
    for module, flag in flags:
        module.training = flag
    right, count = comm.sum(counts).tolist()
    return float(right / count)
