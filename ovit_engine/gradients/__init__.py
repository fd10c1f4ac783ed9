"""Gradients for the pruners: calibration batches, backward passes, several gradients from one pass."""

from ovit_engine.gradients.backward import GradientPass, LossFunction
from ovit_engine.gradients.calibration import Calibration

__all__ = ["Calibration", "GradientPass", "LossFunction"]
