"""Post-training quantization of a PyTorch model: calibrate, export, and say what it costs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from ovit_engine.certificate import Certificate
from ovit_engine.certificate.kernels import open_session, run_outputs
from ovit_engine.certificate.model import Parity
from ovit_engine.certificate.parity import Sample, compare, take_sample
from ovit_engine.core.modifier import Modifier, anew
from ovit_engine.core.recipe import Recipe
from ovit_engine.core.registry import modifiers
from ovit_engine.export.deploy import write
from ovit_engine.masking.masks import Masks
from ovit_engine.training.checkpoint import KEYS, LAST
from ovit_engine.utils.torch_files import load_file

DEFAULT = "name: ptq\nmodifiers: [{quantize: {}}]\n"

_BATCH = 32


class Quantizes(Protocol):
    """What the `quantize` modifier does without training."""

    @property
    def calibration_images(self) -> int: ...

    @property
    def search(self) -> object | None: ...

    def quantize(self, model: nn.Module, batches: Sequence[tuple[Any, ...]]) -> tuple[str, ...]: ...


@dataclass(frozen=True, kw_only=True)
class Compared:
    """The int8 file beside the float model, on the same images."""

    certificate: Certificate
    # int8 file against float model
    parity: Parity
    # top-1 of both, where the images have labels
    float_accuracy: float | None
    int8_accuracy: float | None
    # what was done besides, and what was left
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """For people."""
        parity = self.parity
        found = [
            f"{parity.agreement:.2%} of {parity.images} images have the same argmax as the float model "
            f"(cosine {parity.cosine:.5f}, largest error {parity.max_error:.2%} of the largest logit)"
        ]
        if self.float_accuracy is not None and self.int8_accuracy is not None:
            found.append(f"accuracy {self.float_accuracy:.2%} float, {self.int8_accuracy:.2%} int8")
        return [*found, *self.notes]


def quantize_of(recipe: Recipe) -> Quantizes:
    """The one `quantize` of a recipe, as a copy.

    Raises:
        ValueError: there is none, or there are several.
    """
    found = [modifier for modifier in recipe.modifiers if modifier.name == "quantize"]
    if len(found) != 1:
        raise ValueError(f"recipe {recipe.name!r} has {len(found)} 'quantize' modifiers; ovit ptq takes one")
    return cast(Quantizes, anew(found[0]))


def calibration_batches(images: Dataset[Any], count: int, *, seed: int = 0) -> list[tuple[Tensor, ...]]:
    """`count` images drawn at random from a dataset of (image, class), in batches; all, where there are fewer."""
    total = len(images)  # type: ignore[arg-type]
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed), device="cpu")[:count]
    return [(batch,) for batch, *_ in DataLoader(Subset(images, order.tolist()), batch_size=_BATCH)]


def ptq(
    model: nn.Module,
    recipe: Recipe,
    batches: Sequence[tuple[Tensor, ...]],
    path: str | Path,
    *,
    example_inputs: Tensor,
    data: Iterable[Any],
    masks: Masks | None = None,
    preprocessing: Mapping[str, Any] | None = None,
) -> Compared:
    """Quantize a trained model in place, without training, and write it as a verified ONNX file.

    Of the recipe only `quantize` is used, and of its options none that is a time.

    Args:
        batches: calibration images: positional arguments of the model, one tuple a batch.
        example_inputs: one batch that the model takes.
        data: (inputs, targets) batches that float model and file are compared on; the first 1024 images are.
        masks: of a pruned model: what the file must keep of its zeros.
        preprocessing: for the file's metadata.

    Raises:
        RecipeError: layers that the model does not have.
        ExportError: the file is not what was promised; nothing is written.
        ValueError: no `quantize` in the recipe, or data that do not fit.
    """
    path, masks = Path(path), masks or Masks()
    quantize = quantize_of(recipe)
    modifier = cast(Modifier, quantize)
    sample = take_sample(data, [tuple(example_inputs.shape)], [example_inputs.numpy().dtype])
    exact = logits(model, sample)
    notes = quantize.quantize(model, batches)
    certificate = write(
        model,
        path,
        example_inputs,
        recipe=replace(recipe, modifiers=(*_held(masks), modifier)),
        modifiers=[modifier],
        masks=masks,
        data=_batches_of(sample),
        preprocessing=preprocessing,
    )
    return compared(path, sample, exact, certificate, notes)


def compared(
    path: Path, sample: Sample, exact: np.ndarray, certificate: Certificate, notes: Sequence[str] = ()
) -> Compared:
    """The file at `path` beside the float model's logits [N, classes]."""
    rounded = run_outputs(open_session(path), sample.inputs)
    accuracies = [
        None if sample.labels is None or values.ndim != 2 else float((values.argmax(1) == sample.labels).mean())
        for values in (exact, rounded)
    ]
    return Compared(
        certificate=certificate,
        parity=compare(rounded, exact, sample.source),
        float_accuracy=accuracies[0],
        int8_accuracy=accuracies[1],
        notes=tuple(notes),
    )


@torch.no_grad()
def logits(model: nn.Module, sample: Sample) -> np.ndarray:
    """The model's outputs [N, classes] in eval mode."""
    model.eval()
    device = next(model.parameters()).device
    parts = [model(torch.from_numpy(part).to(device)).float().cpu().numpy() for part, _ in _batches_of(sample)]
    return np.concatenate(parts)


def run_of(checkpoint: str | Path) -> Mapping[str, Any] | None:
    """The checkpoint of a run of `ovit train`; None for weights from elsewhere.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: damaged.
    """
    path = Path(checkpoint)
    path = path / LAST if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {str(path)!r}")
    state = None if path.suffix == ".safetensors" else load_file(path)
    return state if isinstance(state, dict) and set(state) >= KEYS else None


def masks_of(run: Mapping[str, Any], model: nn.Module) -> Masks:
    """The masks that a run's model has."""
    masks = Masks()
    masks.load_state_dict(run["engine"]["masks"], model)
    return masks


def _held(masks: Masks) -> list[Modifier]:
    """What a recipe says of zeros that were there before: the file's recipe tells where its own come from."""
    names = masks.names()
    return [modifiers()["constant_mask"].model_validate({"targets": names})] if names else []


def _batches_of(sample: Sample) -> list[tuple[np.ndarray, Any]]:
    (images,) = sample.inputs
    starts = range(0, len(sample), _BATCH)
    labels = sample.labels
    return [(images[i : i + _BATCH], None if labels is None else labels[i : i + _BATCH]) for i in starts]
