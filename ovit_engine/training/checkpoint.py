"""Checkpoints of the bundled trainer: what is needed to resume or export, read without running any code."""

import logging
import os
import secrets
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file as load_safetensors
from torch import Tensor, nn

from ovit_engine.certificate.manifest import Manifest
from ovit_engine.quant import dense_state_dict
from ovit_engine.structured.gates import GATE, install
from ovit_engine.structured.shrink_model import known_sites, manifest_of, rebuild, shrink
from ovit_engine.training.metrics import METRICS
from ovit_engine.utils.files import remove_leftovers
from ovit_engine.utils.torch_files import first_line, load_file, save_file

log = logging.getLogger(__name__)

# what each has; besides, `loop`: what it takes to go on, and `ema`: the averaged weights, where there are such
KEYS = {"model", "optimizer", "engine", "epoch", "recipe", "data", "preprocessing", "metrics"}

LAST = "last.pt"

PREVIOUS = "previous.pt"


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint whole, or leave the one that is there; that one stays as previous.pt.

    A write that fails halfway leaves the last one whole: the previous one is for a file that was damaged later, by a
    disk or by a copy. It is a second name of the same bytes, so it costs no time, and where the file system has no
    such names there is none.

    Raises:
        OSError: the disk is full, or the folder can't be written.
    """
    assert set(state) >= KEYS
    kept = path.with_name(f".{PREVIOUS}.{secrets.token_hex(4)}.tmp")
    try:
        os.link(path, kept)
    except OSError as error:  # the first of a run, or no hard links here
        log.debug("no %s: %s", PREVIOUS, error)
    try:
        save_file(path, state)
        if kept.exists():  # only now: until here the file before it may be the one that is whole
            os.replace(kept, path.with_name(PREVIOUS))
    finally:
        kept.unlink(missing_ok=True)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint that `ovit train` wrote (or the newest of a run's folder), its tensors on the CPU.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: damaged, if by one bit, or written by something else.
    """
    file = checkpoint_file(path)
    state = read_state(file)
    missing = KEYS - set(state) if isinstance(state, dict) else KEYS
    if missing:
        raise ValueError(
            f"{str(file)!r} is no checkpoint of ovit train: it lacks {', '.join(sorted(missing))}; what a loop of your "
            "own trains is exported by engine.export(...)"
        )
    with zipfile.ZipFile(file) as parts:  # torch reads past checksums
        broken = parts.testzip()
    if broken is not None:
        raise ValueError(f"{str(file)!r} is damaged: the checksum of its {broken!r} is wrong")
    return dict(state)


def last_whole(folder: Path) -> Path | None:
    """Return the newest checkpoint of a run that can be read, None where there is none at all; a damaged one is told.

    Raises:
        ValueError: there are some, and all are damaged.
    """
    files = [folder / LAST, folder / PREVIOUS]
    damage: list[str] = []
    for file in files:
        try:
            load_checkpoint(file)
        except FileNotFoundError:
            continue
        except ValueError as error:
            damage.append(str(error))
            continue
        if file.name == PREVIOUS:
            log.warning("%s: going on from %s", damage[0] if damage else f"no {str(files[0])!r}", file)
        return file
    if damage:
        raise ValueError(f"no whole checkpoint to go on from: {'; '.join(damage)}")
    return None


def checkpoint_file(path: Path) -> Path:
    """Return the file that `path` means: itself, or the newest checkpoint of a run's folder. FileNotFoundError."""
    file = path / LAST if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"no checkpoint {str(file)!r}")
    return file


def folder_of(path: Path) -> Path:
    """Return the folder of a run, of which `path` is a checkpoint or that folder itself."""
    return path if path.is_dir() else path.parent


def set_aside(file: Path) -> None:
    """Rename a checkpoint if it is damaged, so that the next one saved does not keep it as the previous one."""
    try:
        load_checkpoint(file)
    except FileNotFoundError:
        return
    except ValueError:
        os.replace(file, file.with_name("damaged.pt"))


def clear_leftovers(folder: Path) -> None:
    """Remove the hidden files that a killed process of this run left: it is resumed, so nobody is at them."""
    for name in (LAST, PREVIOUS, METRICS):
        remove_leftovers(folder / name, older=0.0)


def load_weights(model: nn.Module, path: Path) -> None:
    """Start from the weights in a file: a checkpoint of ours, a state dict of timm's or torch's, or safetensors.

    Of a run with an averaged copy that copy is taken. Nothing but weights is: masks, quantizers and the optimizer of
    another run are left behind. A model that had lost heads or units makes `model` as small, in place: by the manifest
    beside the weights, or by the gates among them.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: damaged, or of another model; it names the first tensors that differ.
    """
    file = checkpoint_file(path)
    found = read_state(file)
    manifest = saved_manifest(found) if isinstance(found, dict) else Manifest()
    if isinstance(found, dict) and set(found) >= KEYS:
        found = deployed_weights(found)
    for key in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{str(file)!r} holds no weights by name")
    if manifest:
        rebuild(model, manifest)
    weights = dense_state_dict(found)
    has_gates = any(name.endswith(f".{GATE}") for name in weights)
    gated = [site for site in known_sites(model) if f"{site.name}.{GATE}" in weights] if has_gates else []
    install(gated)
    own = model.state_dict()
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
    if gated:
        shrink(model)


def saved_manifest(state: Mapping[str, Any]) -> Manifest:
    """Return which heads and units the model of a checkpoint has left; empty where it has all.

    Raises:
        ValueError: it is no manifest.
    """
    try:
        return Manifest.model_validate(state.get("manifest") or {})
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"]))
        raise ValueError(f"the checkpoint holds no manifest of heads and units: {where}: {fault['msg']}") from None


def with_manifest(model: nn.Module) -> dict[str, Any]:
    """Return what a checkpoint says besides of a model that has lost heads or units."""
    manifest = manifest_of(model)
    return {"manifest": manifest.model_dump(mode="json")} if manifest else {}


def deployed_weights(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The weights of a checkpoint of ours that were validated, and are exported: the averaged ones, if there are."""
    weights: Mapping[str, Any] = state["ema"] if state.get("ema") else state["model"]
    return weights


def read_state(file: Path) -> Any:
    """Return what a checkpoint or a safetensors file holds. ValueError if it is damaged."""
    if file.suffix != ".safetensors":
        return load_file(file)
    try:
        return load_safetensors(file)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(f"{str(file)!r} is damaged, or no checkpoint: {first_line(error)}") from error
