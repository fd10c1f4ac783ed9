"""Two pruners for ovit-engine."""

from ovit_plugin_example.pruners import RiaPrune, RiaRescalePrune, relative_importance, rescale_rows

__all__ = ["RiaPrune", "RiaRescalePrune", "relative_importance", "rescale_rows"]
