"""Checkpoints of the bundled trainer: all that it takes to go on, or to export, read without running any code."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file as load_safetensors
from torch import Tensor, nn

from ovit_engine.quant import dense_state_dict
from ovit_engine.torch_files import first_line, load_file, save_file

KEYS = {"model", "optimizer", "engine", "epoch", "recipe", "data", "preprocessing", "metrics"}
LAST = "last.pt"


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint whole, or leave the one that is there.

    Raises:
        OSError: the disk is full, or the folder can't be written.
    """
    assert set(state) == KEYS
    save_file(path, state)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint that `ovit train` wrote (or the newest of a run's folder), its tensors on the CPU.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: damaged, or written by something else.
    """
    file = path / LAST if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"no checkpoint {str(file)!r}")
    state = _read(file)
    missing = KEYS - set(state) if isinstance(state, dict) else KEYS
    if missing:
        raise ValueError(f"{str(file)!r} is no checkpoint of ovit train: it lacks {', '.join(sorted(missing))}")
    return dict(state)


def load_weights(model: nn.Module, path: Path) -> None:
    """Start from the weights in a file: a checkpoint of ours, a state dict of timm's or torch's, or safetensors.

    Nothing but weights is taken: masks, quantizers and the optimizer of another run are left behind.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: damaged, or of another model; it names the first tensors that differ.
    """
    file = path / LAST if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"no checkpoint {str(file)!r}")
    found = _read(file)
    for key in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{str(file)!r} holds no weights by name")
    weights, own = dense_state_dict(found), model.state_dict()
    wrong = [f"{name} is missing" for name in own if name not in weights]
    wrong += [f"{name} is unknown" for name in weights if name not in own]
    wrong += [
        f"{name} is {list(weights[name].shape)}, the model has {list(tensor.shape)}"
        for name, tensor in own.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"{str(file)!r} does not fit the model: {'; '.join(wrong[:3])}{more}")
    model.load_state_dict(weights)


def _read(file: Path) -> Any:
    if file.suffix != ".safetensors":
        return load_file(file)
    try:
        return load_safetensors(file)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(f"{str(file)!r} is damaged, or no checkpoint: {first_line(error)}") from error
