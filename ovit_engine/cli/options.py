"""Options that several commands take."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import yaml


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


EXISTING = click.Path(exists=True, dir_okay=False, path_type=Path)


def as_mapping(pairs: tuple[tuple[str, Any], ...]) -> Mapping[str, Any]:
    """Options given as key=value, the last of each."""
    return dict(pairs)


variables = click.option(
    "--var", "variables", type=KeyValue(), multiple=True, help="A variable of the recipe, as sparsity=0.9."
)
model = click.option("--model", help="timm model; the recipe's own if left out.")
model_args = click.option(
    "--model-arg", "model_args", type=KeyValue(), multiple=True, help="Argument of the timm model, as img_size=384."
)
certificate_chain = click.option(
    "--certificate-chain",
    type=EXISTING,
    multiple=True,
    metavar="CERT",
    help="A certificate of the chain of trust (PEM), for signatures by certificate.",
)
epochs = click.option("--epochs", type=click.IntRange(min=1), help="Length of training; else the recipe's, or 10.")


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
