"""What a foreign ONNX file is calibrated and compared on: how it wants its images, and arrays from an .npz file."""

import json
import logging
from pathlib import Path
from typing import Any

from timm.data.config import resolve_data_config

from ovit_engine.certificate.measure import input_types
from ovit_engine.post_training.onnx_graph import read
from ovit_engine.training.data import config_of, model_data_config

log = logging.getLogger(__name__)


def image_config(source: Path, model: str | None, data: str) -> dict[str, Any]:
    """Return how the file wants its images, for `load_data`.

    Read from a file of ours; otherwise that of timm's `model`, or ImageNet's mean and deviation, with a warning where
    the images of `data` have none of their own.
    """
    proto = read(source)
    (shape,), _ = input_types(proto)
    known = {entry.key: entry.value for entry in proto.metadata_props}
    if known.get("ovit.preprocessing", "{}") != "{}":
        return config_of(json.loads(known["ovit.preprocessing"]))
    if model is None:
        if data != "digits":
            log.warning(
                "%s does not tell its preprocessing: ImageNet's mean and deviation are taken; did you mean --model "
                "NAME?",
                source.name,
            )
        config = dict(resolve_data_config({"input_size": tuple(shape[1:])}))  # type: ignore[no-untyped-call]
        for key in ("mean", "std"):  # of grey images: the mean colour
            if len(config[key]) != shape[1]:
                config[key] = (sum(config[key]) / len(config[key]),) * shape[1]
        return config
    return {**model_data_config(model, {}), "input_size": tuple(shape[1:])}


def classes_of(source: Path) -> int | None:
    """Return how many classes the first output tells apart; None where its size is free."""
    shape = read(source).graph.output[0].type.tensor_type.shape
    return shape.dim[-1].dim_value or None if shape.dim else None
