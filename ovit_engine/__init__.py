"""A compression recipe engine for PyTorch: a YAML recipe, three lines in your loop, one verified sparse int8 ONNX.

Names load when they are first asked for: a machine that only verifies a file needs no PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ovit_engine.calibration import Calibration as Calibration
    from ovit_engine.engine import Engine as Engine
    from ovit_engine.event import Event as Event
    from ovit_engine.masks import Masks as Masks
    from ovit_engine.modifier import Claim as Claim
    from ovit_engine.modifier import Modifier as Modifier
    from ovit_engine.modifier import RecipeError as RecipeError
    from ovit_engine.modifier import Run as Run
    from ovit_engine.modifier import Time as Time
    from ovit_engine.points import load_point as load_point
    from ovit_engine.recipe import Recipe as Recipe
    from ovit_engine.registry import register as register
    from ovit_engine.schedule import Clock as Clock
    from ovit_engine.sharding import whole_model as whole_model
    from ovit_engine.targets import Slot as Slot

__version__ = "0.1.0"

_MODULES = {
    "Calibration": "calibration",
    "Engine": "engine",
    "Event": "event",
    "Masks": "masks",
    "Claim": "modifier",
    "Modifier": "modifier",
    "RecipeError": "modifier",
    "Run": "modifier",
    "Time": "modifier",
    "load_point": "points",
    "Recipe": "recipe",
    "register": "registry",
    "Clock": "schedule",
    "whole_model": "sharding",
    "Slot": "targets",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
