"""Which weights a recipe acts on, and which of them are zero."""

from ovit_engine.masking.masks import Masks
from ovit_engine.masking.parameters import Slot, parameter_slots, unwrapped
from ovit_engine.masking.presets import TARGET_PRESETS
from ovit_engine.masking.targets import find_slots, match_targets

__all__ = ["TARGET_PRESETS", "Masks", "Slot", "find_slots", "match_targets", "parameter_slots", "unwrapped"]
