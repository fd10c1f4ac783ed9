"""How much each layer alone costs: what its rounding does to the outputs of an otherwise float model."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ovit_engine.quant.fake_quantizer import FakeQuantize
from ovit_engine.quant.prepare import quantizers, rounding_layers


@torch.no_grad()
def layer_sensitivity(model: nn.Module, batches: Sequence[tuple[Any, ...]]) -> dict[str, float]:
    """Relative squared error of the outputs with one layer rounded, for each quantized layer of a calibrated model.

    Quantizers are as before afterwards; layers whose own are off are left out.

    Args:
        batches: positional arguments of the model, one tuple a batch.

    Returns:
        layer -> `sum((y - y_float)^2) / sum(y_float^2)`; infinite where an output is not finite.

    Raises:
        ValueError: no batches.
    """
    if not batches:
        raise ValueError("no batches to measure the sensitivity of layers on")
    model.eval()
    layers = rounding_layers(model)
    states = [(quantizer, bool(quantizer.enabled)) for _, quantizer in quantizers(model)]
    try:
        for quantizer, _ in states:
            quantizer.enabled.fill_(False)
        exact = [_flat_outputs(model, batch) for batch in batches]
        power = sum(float(values.square().sum()) for values in exact)
        found = {}
        for name, layer in layers.items():
            own = [child for child in layer.children() if isinstance(child, FakeQuantize)]
            for quantizer in own:
                quantizer.enabled.fill_(True)
            noise = sum(
                float((_flat_outputs(model, batch) - values).square().sum())
                for batch, values in zip(batches, exact, strict=True)
            )
            for quantizer in own:
                quantizer.enabled.fill_(False)
            found[name] = noise / power if power and noise == noise else float("inf")
    finally:
        for quantizer, enabled in states:
            quantizer.enabled.fill_(enabled)
    return found


def _flat_outputs(model: nn.Module, batch: tuple[Any, ...]) -> Tensor:
    leaves = [leaf for leaf in pytree.tree_leaves(model(*batch)) if isinstance(leaf, Tensor)]
    return torch.cat([leaf.double().flatten() for leaf in leaves])
