"""Order of channels and axes in which a model takes its images, where it is not [C, H, W] in RGB."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

CHANNELS, LAYOUTS = ("rgb", "bgr"), ("nchw", "nhwc")


class Arrange:
    """Turns an image [C, H, W] in RGB into what `config` asks for; made for `config["channels"]` and `["layout"]`."""

    def __init__(self, config: Mapping[str, Any], transform: Callable[[Any], Tensor]) -> None:
        self._is_bgr = config.get("channels", "rgb") == "bgr"
        self._is_last = config.get("layout", "nchw") == "nhwc"
        self._transform = transform

    def __call__(self, image: Any) -> Tensor:
        """Transform the image, then arrange it."""
        found = self._transform(image)
        found = found.flip(0) if self._is_bgr else found
        return found.permute(1, 2, 0) if self._is_last else found


def arrangement(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the part of a config, or of `preprocessing`, that differs from [C, H, W] in RGB.

    Raises:
        ValueError: an unknown order.
    """
    found = {}
    for key, known in (("channels", CHANNELS), ("layout", LAYOUTS)):
        value = config.get(key, known[0])
        if value not in known:
            raise ValueError(f"{key} must be {' or '.join(known)}, not {value!r}")
        if value != known[0]:
            found[key] = value
    return found


def in_rgb(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return `config` with its mean and deviation, given in the order of the model's channels, in the order of RGB."""
    if config.get("channels") != "bgr":
        return dict(config)
    return {**config, "mean": tuple(config["mean"])[::-1], "std": tuple(config["std"])[::-1]}
