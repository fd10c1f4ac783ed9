"""Parity: the file's outputs beside those of the PyTorch model, on images that are kept for later."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ovit_engine.certificate.arrays import read_arrays
from ovit_engine.certificate.errors import CertificateError
from ovit_engine.certificate.model import Accuracy, Parity
from ovit_engine.utils.batches import split_batch
from ovit_engine.utils.class_axis import class_axis

WANTED_IMAGES = 256

MAX_IMAGES = 1024

# below this one disagreement could not be told from a broken file
MIN_IMAGES = 32

STORED_BYTES = 16 * 2**20

# of the largest: how far one number of an image may be off to agree
NEAR = 0.1

_SEED = 0

_TENSOR = "tensor:"

# of a reference, unpacked
_LARGEST = 512 * 2**20

# of the normal distribution, for an interval of 95 %
_QUANTILE = 1.959963984540054


@dataclass(frozen=True)
class Sample:
    """Images in the order they were given: one array [N, ...] for each input of the model."""

    inputs: tuple[np.ndarray, ...]
    labels: np.ndarray | None
    source: str

    def __len__(self) -> int:
        return len(self.inputs[0])


@dataclass(frozen=True)
class Reference:
    """What PyTorch said: logits of all images, the first that fit, a hash of each, hashes of its tensors."""

    logits: np.ndarray
    labels: np.ndarray | None
    stored: tuple[np.ndarray, ...]
    hashes: np.ndarray
    source: str
    # tensor of the file -> its hash, by `tensors.hash_tensors`
    tensors: Mapping[str, np.ndarray] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """As a compressed .npz without pickles."""
        arrays = {"logits": self.logits, "hashes": self.hashes, "source": np.array(self.source)}
        arrays |= {f"input_{index}": array for index, array in enumerate(self.stored)}
        arrays |= {f"{_TENSOR}{name}": array for name, array in self.tensors.items()}
        if self.labels is not None:
            arrays["labels"] = self.labels
        stream = io.BytesIO()
        np.savez_compressed(stream, allow_pickle=False, **arrays)
        return stream.getvalue()

    @classmethod
    def load(cls, path: Path) -> Reference:
        """Read ``to_bytes``'s file; raises ValueError if it is something else."""
        file = read_arrays(path, _LARGEST)
        stored = [file[key] for index in range(len(file)) if (key := f"input_{index}") in file]
        tensors = {key.removeprefix(_TENSOR): file[key] for key in file if key.startswith(_TENSOR)}
        try:
            found = cls(file["logits"], file.get("labels"), tuple(stored), file["hashes"], str(file["source"]), tensors)
        except KeyError as error:
            raise ValueError(f"{path.name} can't be read: it has no {error}") from error
        if not found.is_whole():
            raise ValueError(f"{path.name} was changed: logits, labels, images and hashes do not belong together")
        return found

    def is_whole(self) -> bool:
        """Return whether every part speaks of the same images, and as many are stored as `make_reference` stores."""
        arrays = [self.logits, self.hashes, *self.stored, *([] if self.labels is None else [self.labels])]
        if any(array.ndim == 0 or array.dtype.kind not in "fiub" for array in arrays):
            return False
        count = len(self.logits)
        if not self.stored or len(self.hashes) != count or (self.labels is not None and len(self.labels) != count):
            return False
        if any(len(array) == 0 for array in self.stored):
            return False
        expected = min(count, _fitting(self.stored))
        if any(len(array) != expected for array in self.stored):
            return False
        return np.array_equal(hash_images(self.stored), self.hashes[:expected])


def make_reference(sample: Sample, logits: np.ndarray) -> Reference:
    """Keep the logits, a hash of each image, and as many images as 16 MiB hold (one at least)."""
    stored = tuple(array[: _fitting(sample.inputs)] for array in sample.inputs)
    return Reference(logits.astype(np.float32), sample.labels, stored, hash_images(sample.inputs), sample.source)


def _fitting(inputs: Sequence[np.ndarray]) -> int:
    """How many images are stored."""
    return max(1, STORED_BYTES // sum(int(array[0].nbytes) for array in inputs))


def hash_images(inputs: Sequence[np.ndarray]) -> np.ndarray:
    """SHA-256 of each image over all inputs, uint8 [N, 32]."""
    digests = []
    for index in range(len(inputs[0])):
        digest = hashlib.sha256()
        for array in inputs:
            digest.update(np.ascontiguousarray(array[index]).tobytes())
        digests.append(np.frombuffer(digest.digest(), dtype=np.uint8))
    return np.stack(digests)


def compare(logits: np.ndarray, reference: np.ndarray, source: str) -> Parity:
    """Parity of two outputs [N, ...]. Raises CertificateError if one holds NaN or infinity."""
    if logits.shape != reference.shape:
        raise CertificateError("no parity", [f"outputs of shape {logits.shape}, PyTorch gives {reference.shape}"])
    for name, values in (("the file's", logits), ("PyTorch's", reference)):
        if not np.isfinite(values).all():
            raise CertificateError("no parity", [f"{name} outputs hold NaN or infinity"])
    ours, theirs = (values.astype(np.float64).reshape(len(values), -1) for values in (logits, reference))
    lengths = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    cosines = np.where(lengths > 0, (ours * theirs).sum(axis=1) / np.where(lengths > 0, lengths, 1), 0.0)
    cosines[(ours == theirs).all(axis=1)] = 1.0
    largest = np.abs(theirs).max()
    agreement = same_class(logits, reference)
    low, high = wilson(agreement, len(ours))
    return Parity(
        images=len(ours),
        source=source,
        agreement=agreement,
        agreement_low=low,
        agreement_high=high,
        cosine=float(cosines.mean()),
        max_error=float(np.abs(ours - theirs).max() / (largest if largest > 0 else 1.0)),
    )


def wilson(share: float, count: int) -> tuple[float, float]:
    """95 % interval of a share seen in ``count`` independent trials (Wilson 1927), within [0, 1].

    Where all agree its lower end still says how many images that was.
    """
    square = _QUANTILE**2 / count
    middle = share + square / 2
    half = _QUANTILE * math.sqrt(share * (1 - share) / count + square / (4 * count))
    low, high = (middle - half) / (1 + square), (middle + half) / (1 + square)
    return max(0.0, min(low, share)), min(1.0, max(high, share))  # rounding puts 0 and 1 beside their own interval


def accuracy(logits: np.ndarray, reference: np.ndarray, labels: np.ndarray | None) -> Accuracy | None:
    """Top-1 of both; None where `top1` has none."""
    file, pytorch = (top1(values, labels) for values in (logits, reference))
    if labels is None or file is None or pytorch is None:
        return None
    return Accuracy(images=len(labels), file=file, pytorch=pytorch)


def same_class(logits: np.ndarray, reference: np.ndarray) -> float:
    """Return the share of images, or of their places, with the same argmax along the classes.

    Where each image has one number, which has no argmax, the share of those that are nearly the same.
    """
    if logits[0].size == 1:
        return float((np.abs(logits - reference) <= NEAR * np.abs(reference).max()).mean())
    axis = class_axis(logits.ndim)
    return float((logits.argmax(axis) == reference.argmax(axis)).mean())


def top1(logits: np.ndarray, labels: np.ndarray | None) -> float | None:
    """Return the accuracy of class scores [N, C] on labels [N]; None without labels and for other outputs.

    One column holds a logit, a probability or a number: it has no argmax.
    """
    if labels is None or logits.ndim != 2 or logits.shape[1] < 2:
        return None
    return float((logits.argmax(1) == labels).mean())


def take_sample(data: Any, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[Any], limit: int = MAX_IMAGES) -> Sample:
    """The first images of ``data``, ``limit`` at most.

    ``data``: an iterable of batches (a loader) or a dataset of single items; each in a form of ``split_batch``.
    ``shapes`` and ``dtypes``: of the model's inputs, batch first, 0 for a free size.
    Whole-number targets of one dimension are labels; others are left out. Images with a label below zero do not
    count, as in `cross_entropy`.

    Raises:
        ValueError: fewer than 32 images, or an item that does not fit the model.
    """
    parts: list[tuple[np.ndarray, ...]] = []
    labels: list[np.ndarray | None] = []
    count = 0
    for item in _items(data):
        inputs, target = _as_batch(item, shapes)
        if target is not None and (target < 0).any():
            inputs, target = tuple(array[target >= 0] for array in inputs), target[target >= 0]
        parts.append(tuple(array.astype(dtype, copy=False) for array, dtype in zip(inputs, dtypes, strict=True)))
        labels.append(target)
        count += len(inputs[0])
        if count >= limit:
            break
    if count < MIN_IMAGES:
        raise ValueError(f"data holds {count} images; parity needs {MIN_IMAGES} at least, {WANTED_IMAGES} are wanted")
    arrays = tuple(np.concatenate(column)[:limit] for column in zip(*parts, strict=True))
    known = [target for target in labels if target is not None]
    joined = np.concatenate(known)[:limit] if len(known) == len(labels) else None
    return Sample(arrays, joined, "data")


def random_sample(shapes: Sequence[tuple[int, ...]], dtypes: Sequence[Any], count: int = WANTED_IMAGES) -> Sample:
    """Seeded normal noise, for when there is no data. Raises ValueError if an input is not floating point."""
    wrong = [str(np.dtype(dtype)) for dtype in dtypes if not np.issubdtype(dtype, np.floating)]
    if wrong:
        raise ValueError(f"inputs of type {', '.join(wrong)} cannot be drawn at random: give `data` to measure parity")
    generator = np.random.default_rng(_SEED)
    arrays = [generator.standard_normal((count, *shape[1:]), dtype=np.float32) for shape in shapes]
    return Sample(tuple(a.astype(d, copy=False) for a, d in zip(arrays, dtypes, strict=True)), None, "random")


def find_stored(sample: Sample, reference: Reference) -> tuple[Sample, Reference]:
    """The images of ``sample`` that ``reference`` knows, with their logits, and the labels that ``sample`` gives.

    Raises:
        ValueError: none is known.
        CertificateError: labels of ``sample`` are not those of ``reference``.
    """
    known = {digest.tobytes(): index for index, digest in enumerate(reference.hashes)}
    pairs = [(i, known[d.tobytes()]) for i, d in enumerate(hash_images(sample.inputs)) if d.tobytes() in known]
    if not pairs:
        raise ValueError("none of these images is one that the certificate was measured on")
    ours, theirs = (list(column) for column in zip(*pairs, strict=True))
    known_labels = None if reference.labels is None else reference.labels[theirs]
    labels = known_labels if sample.labels is None else sample.labels[ours]
    if labels is not None and known_labels is not None and (labels != known_labels).any():
        count = int((labels != known_labels).sum())
        raise CertificateError("other labels", [f"{count} of {len(ours)} labels of the data are not the reference's"])
    images = replace(sample, inputs=tuple(array[ours] for array in sample.inputs), labels=labels)
    return images, replace(reference, logits=reference.logits[theirs], labels=labels, hashes=reference.hashes[theirs])


def _items(data: Any) -> Iterator[Any]:
    if isinstance(data, Iterable):
        yield from data
    elif hasattr(data, "__getitem__") and hasattr(data, "__len__"):  # a map-style dataset
        for index in range(len(data)):
            yield data[index]
    else:
        raise TypeError(f"data must be a loader, a dataset or an iterable of batches, got {type(data).__name__}")


def _as_batch(item: Any, shapes: Sequence[tuple[int, ...]]) -> tuple[tuple[np.ndarray, ...], np.ndarray | None]:
    """(inputs, labels) with a batch dimension, whatever form the item has."""
    args, kwargs, target = split_batch(item)
    if len(kwargs) > 1:  # in the file inputs have no names of the model's own, and may be alike in shape
        names = ", ".join(map(repr, kwargs))
        raise ValueError(f"data gives inputs by name ({names}): give them as a tuple, in the order of the model's own")
    columns = [_array(value) for value in (*args, *kwargs.values())]
    if len(columns) != len(shapes):
        raise ValueError(f"data gives {len(columns)} inputs, the model takes {len(shapes)}")
    single = columns[0].ndim == len(shapes[0]) - 1
    arrays = tuple(column[None] if single else column for column in columns)
    for array, shape in zip(arrays, shapes, strict=True):
        if array.ndim != len(shape) or any(
            own not in (0, size) for own, size in zip(shape[1:], array.shape[1:], strict=True)
        ):
            raise ValueError(f"data of shape {array.shape[1:]} an image, the model takes {tuple(shape[1:])}")
    if target is None:
        return arrays, None
    labels = np.atleast_1d(_array(target))
    is_class = np.issubdtype(labels.dtype, np.integer) and labels.shape == (len(arrays[0]),)
    return arrays, labels if is_class else None


def _array(value: Any) -> np.ndarray:
    """A NumPy array of a tensor (any device), an array or a number."""
    detach = getattr(value, "detach", None)
    return np.asarray(value if detach is None else detach().cpu().numpy())
