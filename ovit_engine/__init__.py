"""A compression recipe engine for PyTorch: a YAML recipe, three lines in your loop, one verified sparse int8 ONNX.

Names load when they are first asked for: a machine that only verifies a file needs no PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ovit_engine.bases.gradient_pruner import GradientPruner as GradientPruner
    from ovit_engine.bases.pruner import Pruner as Pruner
    from ovit_engine.bases.pruner import Targets as Targets
    from ovit_engine.core.capabilities import Claim as Claim
    from ovit_engine.core.capabilities import Coordinated as Coordinated
    from ovit_engine.core.capabilities import Deployable as Deployable
    from ovit_engine.core.capabilities import Distillation as Distillation
    from ovit_engine.core.capabilities import Exclusive as Exclusive
    from ovit_engine.core.capabilities import LearningRate as LearningRate
    from ovit_engine.core.capabilities import LossTerm as LossTerm
    from ovit_engine.core.capabilities import Patterned as Patterned
    from ovit_engine.core.capabilities import Row as Row
    from ovit_engine.core.capabilities import Scheduled as Scheduled
    from ovit_engine.core.capabilities import Surgical as Surgical
    from ovit_engine.core.capabilities import Synchronized as Synchronized
    from ovit_engine.core.errors import RecipeError as RecipeError
    from ovit_engine.core.modifier import Event as Event
    from ovit_engine.core.modifier import Modifier as Modifier
    from ovit_engine.core.recipe import Recipe as Recipe
    from ovit_engine.core.registry import register as register
    from ovit_engine.core.run import Run as Run
    from ovit_engine.core.schedule import Clock as Clock
    from ovit_engine.core.schedule import Time as Time
    from ovit_engine.distributed.sharding import whole_model as whole_model
    from ovit_engine.engine import Engine as Engine
    from ovit_engine.gradients.calibration import Calibration as Calibration
    from ovit_engine.masking.masks import Masks as Masks
    from ovit_engine.masking.parameters import Slot as Slot
    from ovit_engine.masking.targets import find_slots as find_slots
    from ovit_engine.pruning.patterns import NM as NM
    from ovit_engine.pruning.patterns import Block as Block
    from ovit_engine.pruning.patterns import Pattern as Pattern
    from ovit_engine.pruning.patterns import Unstructured as Unstructured
    from ovit_engine.training.sweep_run import load_point as load_point

__version__ = "0.1.0"

_MODULES = {
    "GradientPruner": "bases.gradient_pruner",
    "Pruner": "bases.pruner",
    "Targets": "bases.pruner",
    "Claim": "core.capabilities",
    "Coordinated": "core.capabilities",
    "Deployable": "core.capabilities",
    "Distillation": "core.capabilities",
    "Exclusive": "core.capabilities",
    "LearningRate": "core.capabilities",
    "LossTerm": "core.capabilities",
    "Patterned": "core.capabilities",
    "Row": "core.capabilities",
    "Scheduled": "core.capabilities",
    "Surgical": "core.capabilities",
    "Synchronized": "core.capabilities",
    "RecipeError": "core.errors",
    "Event": "core.modifier",
    "Modifier": "core.modifier",
    "Recipe": "core.recipe",
    "register": "core.registry",
    "Run": "core.run",
    "Clock": "core.schedule",
    "Time": "core.schedule",
    "whole_model": "distributed.sharding",
    "Engine": "engine",
    "Calibration": "gradients.calibration",
    "Masks": "masking.masks",
    "Slot": "masking.parameters",
    "find_slots": "masking.targets",
    "NM": "pruning.patterns",
    "Block": "pruning.patterns",
    "Pattern": "pruning.patterns",
    "Unstructured": "pruning.patterns",
    "load_point": "training.sweep_run",
}

__all__ = list(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
