"""Gradients for the pruners: calibration batches, backward passes, several gradients from one pass."""
