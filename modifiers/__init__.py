"""Built-in modifiers: one idea, one file; importing one registers it."""

from ovit_engine.modifiers import (
    acdc,
    constant_mask,
    cyclic_lr,
    distill,
    dynamic_vit,
    grad_weight_prune,
    magnitude_prune,
    mfac_prune,
    movement_prune,
    obd_prune,
    obert_prune,
    ovit_prune,
    quantize,
    s2vite,
    structured_prune,
    svite_tokens,
)

__all__ = [
    "acdc",
    "constant_mask",
    "cyclic_lr",
    "distill",
    "dynamic_vit",
    "grad_weight_prune",
    "magnitude_prune",
    "mfac_prune",
    "movement_prune",
    "obd_prune",
    "obert_prune",
    "ovit_prune",
    "quantize",
    "s2vite",
    "structured_prune",
    "svite_tokens",
]
