"""Options that several commands take."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import yaml

if TYPE_CHECKING:
    from ovit_engine.core.recipe import Recipe


class KeyValue(click.ParamType):  # type: ignore[type-arg]  # generic in newer releases only
    """`key=value`; the value is read as YAML, so that 0.9 is a number and [1, 2] a list."""

    name = "key=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Any]:
        if isinstance(value, tuple):
            return value
        key, equals, text = str(value).partition("=")
        if not equals or not key:
            self.fail(f"{value!r} is not key=value", param, ctx)
        try:
            return key, yaml.safe_load(text)
        except yaml.YAMLError:
            self.fail(f"{text!r} is no YAML value", param, ctx)


class Shape(click.ParamType):  # type: ignore[type-arg]
    """`input=1,3,48,320`: the sizes of one input."""

    name = "input=sizes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, list[int]]:
        if isinstance(value, tuple):
            return value
        key, _, text = str(value).rpartition("=")
        sizes = text.replace("x", ",").split(",")
        if not key or not all(size.isdecimal() and 0 < int(size[:9]) < 10**5 and len(size) < 6 for size in sizes):
            self.fail(f"{value!r} is not an input with its sizes, as x=1,3,224,224", param, ctx)
        return key, [int(size) for size in sizes]


class Numbers(click.ParamType):  # type: ignore[type-arg]
    """`0.5,0.5,0.5`: a number, or one for each channel."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            found = tuple(float(text) for text in str(value).split(","))
        except ValueError:
            found = ()
        is_std = param is not None and param.name == "std"
        if not found or len(found) > 16 or not all(math.isfinite(each) and (each > 0 or not is_std) for each in found):
            self.fail(
                f"{value!r} is not {'positive numbers' if is_std else 'numbers'}, as 0.485,0.456,0.406", param, ctx
            )
        return found


EXISTING = click.Path(exists=True, dir_okay=False, path_type=Path)

variables = click.option(
    "--var", "variables", type=KeyValue(), multiple=True, help="A variable of the recipe, as sparsity=0.9."
)
model = click.option("--model", help="timm model; the recipe's own if left out.")
model_args = click.option(
    "--model-arg", "model_args", type=KeyValue(), multiple=True, help="Argument of the timm model, as img_size=384."
)
shapes = click.option(
    "--shape", "shapes", type=Shape(), multiple=True, help="Sizes of an input that the file leaves free: x=1,3,48,320."
)
_PREPROCESSING = (
    click.option("--mean", type=Numbers(), help="Mean of each channel, of pixels 0 to 1."),
    click.option("--std", type=Numbers(), help="Deviation of each channel; 0.00392157 for pixels 0 to 255."),
    click.option("--channels", type=click.Choice(["rgb", "bgr"]), help="Order of the channels, also of --mean."),
    click.option("--layout", type=click.Choice(["nchw", "nhwc"]), help="Order of the axes; read from the file."),
    click.option("--crop", type=click.FloatRange(0.01, 1), help="Share of the image's shorter side that is kept."),
    click.option(
        "--crop-mode", type=click.Choice(["center", "squash", "border"]), help="squash: no crop, resize only."
    ),
    click.option("--interpolation", type=click.Choice(["bicubic", "bilinear", "nearest"]), help="Of resized images."),
)


def preprocessing(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options that tell how a file wants its images; see `preprocessing_of`."""
    for option in reversed(_PREPROCESSING):
        command = option(command)
    return command


def preprocessing_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the preprocessing options that were given, as keys of the trainer's data config."""
    return {key: options[name] for name, key in _KEYS.items() if options.get(name) is not None}


_KEYS = {
    "mean": "mean",
    "std": "std",
    "channels": "channels",
    "layout": "layout",
    "crop": "crop_pct",
    "crop_mode": "crop_mode",
    "interpolation": "interpolation",
}

certificate_chain = click.option(
    "--certificate-chain",
    type=EXISTING,
    multiple=True,
    metavar="CERT",
    help="A certificate of the chain of trust (PEM), for signatures by certificate.",
)
epochs = click.option("--epochs", type=click.IntRange(min=1), help="Length of training; else the recipe's, or 10.")


data = click.option(
    "--data", required=True, help="'digits', an image folder with train/ and val/, or a timm dataset name."
)
data_root = click.option("--data-root", type=click.Path(path_type=Path), help="Where downloaded datasets are kept.")
checkpoint = click.option(
    "--checkpoint", type=click.Path(path_type=Path), help="Trained weights: a file, or a run's folder."
)
pretrained = click.option("--pretrained", is_flag=True, help="Take timm's weights (downloads them).")
device = click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
workers = click.option(
    "--workers", type=click.IntRange(min=0), default=0, show_default=True, help="Processes that read images."
)


def check_weights(checkpoint: Path | None, pretrained: bool) -> None:
    """Raise UsageError if weights come from two places."""
    if checkpoint is not None and pretrained:
        raise click.UsageError("weights come from --checkpoint or --pretrained, not both")


def with_options(
    recipe: "Recipe", model: str | None, model_args: tuple[tuple[str, Any], ...], **training: Any
) -> "Recipe":
    """Return `recipe` with a model and options of its training from the command line.

    The recipe's own arguments of the model are kept for its own model alone.
    """
    from ovit_engine.training.models import with_training

    args = dict(model_args)
    if model is None or model == recipe.training.model:
        args = {**recipe.training.model_args, **args}
    return with_training(recipe, model=model, model_args=args, **training)


@contextmanager
def assuming(epochs: int | None) -> Iterator[None]:
    """Where training is too short for a recipe only because its length is assumed, say so (None: it was given)."""
    from ovit_engine.core.errors import TooShortError

    try:
        yield
    except TooShortError as error:
        if epochs is None:
            raise
        raise TooShortError(f"{error}; {epochs} epochs are assumed: give --epochs") from None
