"""Plain oViT, the yardstick of `pruning_solver.py`: rank-1 recursion, right-looking elimination, every state kept.

Written from the formulas (specs: H <- H - (H g)(H g)^T / (N + g^T H g) for each gradient; then, for all blocks of the
layer side by side, remove the cheapest weight of each, update H, remember all weights), the way a first implementation
would be. Single tensor, unstructured, nothing pruned before, numel a multiple of the block.
"""

import torch
from torch import Tensor


def inverse_fisher(gradients: Tensor, block: int, damp: float) -> Tensor:
    """H [blocks, block, block] from gradients [N, numel], one after the other."""
    total = len(gradients)
    count = gradients.shape[1] // block
    inverse = (torch.eye(block) / damp).repeat(count, 1, 1)
    for gradient in gradients:
        columns = gradient.reshape(count, block, 1)
        products = torch.bmm(inverse, columns)
        scale = (total + torch.bmm(columns.mT, products)).sqrt()
        products = products / scale
        inverse.baddbmm_(products, products.mT, alpha=-1)
    return inverse


def eliminate(inverse: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Cumulative error [blocks, B] at which each weight goes, and all states [B + 1, blocks, B]; destroys H."""
    count, block = weights.shape
    every = torch.arange(count)
    weights, gone = weights.clone(), torch.zeros(count, block, dtype=torch.bool)
    errors, states = torch.zeros(count, block), torch.zeros(block + 1, count, block)
    states[0], error = weights, torch.zeros(count)
    for step in range(block):
        diagonal = inverse.diagonal(dim1=1, dim2=2)
        pivot = (weights.square() / diagonal).masked_fill(gone, torch.inf).argmin(1)
        row, at, weight = inverse[every, pivot], diagonal[every, pivot], weights[every, pivot]
        error = error + weight.square() / at / 2
        errors[every, pivot] = error
        weights = weights - row * (weight / at).unsqueeze(1)
        gone[every, pivot] = True
        weights = weights.masked_fill(gone, 0)
        states[step + 1] = weights
        row = row / at.sqrt().unsqueeze(1)
        inverse -= torch.bmm(row.unsqueeze(2), row.unsqueeze(1))
    return errors, states


def prune(weight: Tensor, gradients: Tensor, *, sparsity: float, block: int, damp: float) -> tuple[Tensor, Tensor]:
    """Mask (True = kept) and weights of one tensor for gradients [N, *shape]."""
    inverse = inverse_fisher(gradients.flatten(1), block, damp)
    errors, states = eliminate(inverse, weight.reshape(-1, block))
    removed = errors.flatten().argsort(stable=True)[: round(sparsity * weight.numel())]
    kept = torch.ones(weight.numel(), dtype=torch.bool)
    kept[removed] = False
    steps = (~kept).reshape(-1, block).sum(1)
    pruned = states[steps, torch.arange(len(steps))]
    return kept.reshape(weight.shape), pruned.reshape(weight.shape)
