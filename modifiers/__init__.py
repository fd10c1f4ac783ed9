"""Built-in modifiers: one idea, one file; importing one registers it."""

from ovit_engine.modifiers import cyclic_lr, magnitude_prune, ovit_prune, quantize

__all__ = ["cyclic_lr", "magnitude_prune", "ovit_prune", "quantize"]
