"""Modifiers by the name that a recipe calls them."""

from collections.abc import Callable
from functools import cache
from importlib.metadata import entry_points
from typing import TypeVar

from ovit_engine.core.modifier import Modifier

M = TypeVar("M", bound=Modifier)

_REGISTRY: dict[str, type[Modifier]] = {}

GROUP = "ovit_engine.modifiers"


def register(name: str) -> Callable[[type[M]], type[M]]:
    """Class decorator: make a modifier known to recipes.

    Raises:
        ValueError: the name is taken.
    """

    def add(cls: type[M]) -> type[M]:
        if name in _REGISTRY:
            raise ValueError(f"modifier {name!r} is registered twice: by {_REGISTRY[name]!r} and {cls!r}")
        _REGISTRY[name] = cls
        cls.name = name
        return cls

    return add


@cache
def broken_plugins() -> tuple[str, ...]:
    """Import the plugins of installed packages; return a line for each that can't be: it may be of no concern."""
    broken = []
    for plugin in entry_points(group=GROUP):
        try:
            plugin.load()
        except Exception as error:
            package = "an unknown package" if plugin.dist is None else plugin.dist.name
            what = " ".join(f"{type(error).__name__}: {error}".split())
            broken.append(f"the plugin {plugin.name!r} ({plugin.value}) of {package} can't be imported: {what}")
    return tuple(broken)


def modifiers() -> dict[str, type[Modifier]]:
    """All modifiers by name: ours and those of installed packages, all through one entry-point group."""
    broken_plugins()
    return dict(sorted(_REGISTRY.items()))
