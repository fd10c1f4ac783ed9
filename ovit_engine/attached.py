"""Whether an engine is attached to a model: a mark that lies on the model itself."""

from torch import nn

from ovit_engine.targets import unwrapped

_MARK = "_ovit_engine"


class Mark:
    """Says that an engine is attached to `model`, until it is removed; a handle like those of hooks.

    A copy or a pickle of the model has none: no engine watches that one.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = unwrapped(model)
        vars(self._model)[_MARK] = self

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()

    def remove(self) -> None:
        """Say that the engine is attached no more."""
        if vars(self._model).get(_MARK) is self:
            del vars(self._model)[_MARK]


def is_attached(model: nn.Module) -> bool:
    """Whether an engine is attached to `model`, which must not be cut meanwhile."""
    return isinstance(vars(unwrapped(model)).get(_MARK), Mark)
