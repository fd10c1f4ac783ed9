"""A compression recipe engine for PyTorch: a YAML recipe, three lines in your loop, one verified sparse int8 ONNX."""

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
