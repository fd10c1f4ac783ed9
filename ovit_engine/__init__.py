"""A compression recipe engine for PyTorch: a YAML recipe, three lines in your loop, one verified sparse int8 ONNX.

Names load when they are first asked for: a machine that only verifies a file needs no PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ovit_engine.core.modifier import Claim as Claim
    from ovit_engine.core.modifier import Event as Event
    from ovit_engine.core.modifier import Modifier as Modifier
    from ovit_engine.core.modifier import RecipeError as RecipeError
    from ovit_engine.core.modifier import Run as Run
    from ovit_engine.core.modifier import Time as Time
    from ovit_engine.core.recipe import Recipe as Recipe
    from ovit_engine.core.registry import register as register
    from ovit_engine.core.schedule import Clock as Clock
    from ovit_engine.distributed.sharding import whole_model as whole_model
    from ovit_engine.engine import Engine as Engine
    from ovit_engine.gradients.calibration import Calibration as Calibration
    from ovit_engine.masking.masks import Masks as Masks
    from ovit_engine.masking.parameters import Slot as Slot
    from ovit_engine.training.sweep_run import load_point as load_point

__version__ = "0.1.0"

_MODULES = {
    "Claim": "core.modifier",
    "Event": "core.modifier",
    "Modifier": "core.modifier",
    "RecipeError": "core.modifier",
    "Run": "core.modifier",
    "Time": "core.modifier",
    "Recipe": "core.recipe",
    "register": "core.registry",
    "Clock": "core.schedule",
    "whole_model": "distributed.sharding",
    "Engine": "engine",
    "Calibration": "gradients.calibration",
    "Masks": "masking.masks",
    "Slot": "masking.parameters",
    "load_point": "training.sweep_run",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
