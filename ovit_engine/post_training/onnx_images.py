"""What a foreign ONNX file is calibrated and compared on: images as it wants them, or arrays from an .npz file."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from timm.data.config import resolve_data_config

from ovit_engine.certificate.arrays import read_arrays
from ovit_engine.certificate.parity import MAX_IMAGES, MIN_IMAGES
from ovit_engine.post_training.onnx_graph import Shapes, data_shapes
from ovit_engine.training.data import config_of, model_data_config
from ovit_engine.utils.suggest import suggest

log = logging.getLogger(__name__)

_LABELS = "labels"

_LARGEST = 8 * 2**30  # bytes of arrays in an .npz file

_BATCH = 32


def image_config(
    proto: onnx.ModelProto, name: str, model: str | None, data: str, told: Mapping[str, Any], shapes: Shapes
) -> dict[str, Any]:
    """Return how a file wants its images, for `load_data`.

    `told` goes first; then what a file of ours says of itself, timm's `model`, and ImageNet's mean and deviation, with
    a warning where the images of `data` have none of their own.

    Raises:
        ValueError: the file takes something else than images, or `told` does not fit.
    """
    sizes, types, _ = data_shapes(proto, shapes, name)
    if len(sizes) != 1 or len(sizes[0]) != 4 or not np.issubdtype(types[0], np.floating):
        inputs = ", ".join(f"{list(shape)} {kind}" for shape, kind in zip(sizes, types, strict=True))
        raise ValueError(f"{name} takes {inputs}, which are not images: give its inputs, --data inputs.npz")
    known = {entry.key: entry.value for entry in proto.metadata_props}
    config = {}
    if known.get("ovit.preprocessing", "{}") != "{}":
        config = config_of(json.loads(known["ovit.preprocessing"]))
    layout = told.get("layout", config.get("layout", _layout(sizes[0])))
    size = sizes[0][1:] if layout == "nchw" else (sizes[0][3], *sizes[0][1:3])
    if not config and model is not None:
        config = model_data_config(model, {})
    if not config:
        if data != "digits" and not {"mean", "std"} <= told.keys():
            log.warning(
                "%s does not tell its preprocessing: ImageNet's mean and deviation are taken; give --mean and --std, "
                "or did you mean --model NAME?",
                name,
            )
        config = dict(resolve_data_config({"input_size": size}))  # type: ignore[no-untyped-call]
    config = {**config, **told, "layout": layout, "input_size": size}
    for key in ("mean", "std"):  # of grey images: the mean colour
        if len(config[key]) != size[0]:
            if key in told and len(told[key]) > 1:
                raise ValueError(f"--{key} has {len(config[key])} values, {name} takes {size[0]} channels")
            config[key] = (sum(config[key]) / len(config[key]),) * size[0]
    return config


def _layout(shape: tuple[int, ...]) -> str:
    return "nhwc" if shape[3] in (1, 3) and shape[1] not in (1, 3) else "nchw"


def classes_of(proto: onnx.ModelProto) -> int | None:
    """Return how many classes the first output tells apart; None where its size is free."""
    shape = proto.graph.output[0].type.tensor_type.shape
    return shape.dim[-1].dim_value or None if shape.dim else None


def read_inputs(proto: onnx.ModelProto, path: Path) -> tuple[list[tuple[np.ndarray, ...]], list[Any]]:
    """Return (calibration batches, batches to compare on) from arrays [N, ...] by the names of the inputs.

    Every other example is for calibration. An array "labels" holds classes.

    Raises:
        ValueError: an input is missing, or the arrays have different lengths.
    """
    arrays = read_arrays(path, _LARGEST)
    names = [value.name for value in proto.graph.input]
    for name in names:
        if name not in arrays:
            raise ValueError(f"{str(path)!r} has no array {name!r}{suggest(name, arrays)}")
    used = {name: arrays[name] for name in (*names, _LABELS) if name in arrays}
    lengths = {name: len(array) if array.ndim else 0 for name, array in used.items()}
    if len(set(lengths.values())) > 1 or min(lengths.values()) < 2 * MIN_IMAGES:
        told = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise ValueError(
            f"{str(path)!r} holds {told} examples: as many of each are needed, {2 * MIN_IMAGES} at least (half of them "
            "are calibrated on)"
        )
    count = min(lengths[names[0]], 2 * MAX_IMAGES)
    halves = [[used[name][first:count:2] for name in names] for first in (1, 0)]
    labels = used[_LABELS][0:count:2] if _LABELS in used else None
    starts = range(0, len(halves[0][0]), _BATCH)
    batches = [tuple(array[start : start + _BATCH] for array in halves[0]) for start in starts]
    return batches, [(tuple(halves[1]), labels)]
