"""Compression without training: quantization, one-shot pruning, tuning of its options."""
