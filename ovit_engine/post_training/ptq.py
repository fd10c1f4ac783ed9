"""Post-training quantization of a PyTorch model: calibrate, export, and say what it costs."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from ovit_engine.certificate import Certificate, ExportError
from ovit_engine.certificate.kernels import open_session, run_outputs
from ovit_engine.certificate.model import Parity
from ovit_engine.certificate.parity import Sample, compare, take_sample, top1
from ovit_engine.core.modifier import Modifier
from ovit_engine.core.recipe import Recipe
from ovit_engine.core.registry import modifiers
from ovit_engine.export.deploy import write
from ovit_engine.integrations.neural_compressor import passes, search
from ovit_engine.masking.masks import Masks
from ovit_engine.modifiers.quantize import Quantize
from ovit_engine.training.checkpoint import KEYS, checkpoint_file, read_state
from ovit_engine.utils.files import staged

DEFAULT = "name: ptq\nmodifiers: [{quantize: {}}]\n"

_BATCH = 32

# images that a search measures its trials on, and how many must be left: with 512, one image is 0.2 % of accuracy
_SEARCH_IMAGES, _LEAST_SEARCH_IMAGES = 512, 32


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


def quantize_of(recipe: Recipe) -> Quantize:
    """Return a copy of the one `quantize` of a recipe.

    Raises:
        ValueError: there is none, or there are several.
    """
    found = [modifier for modifier in recipe.modifiers if isinstance(modifier, Quantize)]
    if len(found) != 1:
        raise ValueError(f"recipe {recipe.name!r} has {len(found)} 'quantize' modifiers; ovit ptq takes one")
    return found[0].fresh_copy()


def calibration_batches(images: Dataset[Any], count: int, *, seed: int = 0) -> list[tuple[Tensor, ...]]:
    """Return `count` images drawn at random from a dataset of (image, class), in batches; all if there are fewer."""
    return [(batch,) for batch, *_ in DataLoader(_random_subset(images, 0, count, seed), batch_size=_BATCH)]


def search_batches(images: Dataset[Any], skip: int, *, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Return (images, classes) batches of images that `calibration_batches` leaves when it takes `skip` of them.

    Raises:
        ValueError: fewer than 32 are left.
    """
    drawn = _random_subset(images, skip, _SEARCH_IMAGES, seed)
    if len(drawn) < _LEAST_SEARCH_IMAGES:
        raise ValueError(
            f"a search measures accuracy on training images that no range is taken from: {len(drawn)} of "
            f"{len(images)} are left, {_LEAST_SEARCH_IMAGES} needed: "  # type: ignore[arg-type]
            f"lower 'ptq.images' ({skip})"
        )
    return [(batch, labels) for batch, labels, *_ in DataLoader(drawn, batch_size=_BATCH)]


def ptq(
    model: nn.Module,
    recipe: Recipe,
    batches: Sequence[tuple[Tensor, ...]],
    path: str | Path,
    *,
    example_inputs: Tensor,
    data: Iterable[Any],
    search_data: Sequence[tuple[Tensor, Tensor]] = (),
    masks: Masks | None = None,
    preprocessing: Mapping[str, Any] | None = None,
) -> Compared:
    """Quantize a trained model in place, without training, and write it as a verified ONNX file.

    Of the recipe only `quantize` is used, and of its options none that is a time. If it asks for a search, what the
    search picks is written, and must lose no more accuracy on `data` than the search may.

    Args:
        batches: calibration images: positional arguments of the model, one tuple a batch.
        example_inputs: one batch that the model takes.
        data: (inputs, targets) batches that float model and file are compared on; the first 1024 images are.
        search_data: (images, classes) batches that the trials of a search are measured on; see `search_batches`.
        masks: of a pruned model: what the file must keep of its zeros.
        preprocessing: for the file's metadata.

    Raises:
        RecipeError: layers that the model does not have.
        ExportError: the file is not what was promised, or loses too much; nothing is written.
        ValueError: no `quantize` in the recipe, data that do not fit, or no configuration that passed the search.
    """
    path, masks = Path(path), masks or Masks()
    quantize = quantize_of(recipe)
    limits = quantize.search
    notes: list[str] = []
    if limits is not None:
        found = search(model, quantize, batches, search_data)
        quantize = quantize.picked(found.picked.exclude, found.picked.observer)
        notes = found.lines()
    sample = take_sample(data, [tuple(example_inputs.shape)], [example_inputs.numpy().dtype])
    exact = logits(model, sample)
    notes += quantize.quantize(model, batches)
    with staged(path) as draft:
        certificate = write(
            model,
            draft,
            example_inputs,
            recipe=replace(recipe, modifiers=(*_constant_mask(masks), quantize)),
            modifiers=[quantize],
            masks=masks,
            data=_batches_of(sample),
            preprocessing=preprocessing,
        )
        result = compared(draft, sample, exact, certificate, notes)
        if limits is not None:
            _check_loss(result, path.name, limits.tolerable_loss)
    return result


def compared(
    path: Path, sample: Sample, exact: np.ndarray, certificate: Certificate, notes: Sequence[str] = ()
) -> Compared:
    """Return the file at `path` beside the float model's logits [N, classes]."""
    rounded = run_outputs(open_session(path), sample.inputs)
    return Compared(
        certificate=certificate,
        parity=compare(rounded, exact, sample.source),
        float_accuracy=top1(exact, sample.labels),
        int8_accuracy=top1(rounded, sample.labels),
        notes=tuple(notes),
    )


@torch.no_grad()
def logits(model: nn.Module, sample: Sample) -> np.ndarray:
    """Return the model's outputs [N, classes] in eval mode."""
    model.eval()
    device = next(model.parameters()).device
    parts = [model(torch.from_numpy(part).to(device)).float().cpu().numpy() for part, _ in _batches_of(sample)]
    return np.concatenate(parts)


def run_of(checkpoint: str | Path) -> Mapping[str, Any] | None:
    """Return the checkpoint of a run of `ovit train`; None for weights from elsewhere.

    Raises:
        FileNotFoundError: nothing there.
        ValueError: damaged.
    """
    state = read_state(checkpoint_file(Path(checkpoint)))
    return state if isinstance(state, dict) and set(state) >= KEYS else None


def masks_of(run: Mapping[str, Any], model: nn.Module) -> Masks:
    """Return the masks that a run's model has."""
    masks = Masks()
    masks.load_state_dict(run["engine"]["masks"], model)
    return masks


def _random_subset(images: Dataset[Any], first: int, count: int, seed: int) -> Subset[Any]:
    """Return `count` images of a random order, from place `first` on."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator, device="cpu")  # type: ignore[arg-type]
    return Subset(images, order[first : first + count].tolist())


def _check_loss(result: Compared, name: str, tolerable_loss: float) -> None:
    exact, rounded = result.float_accuracy, result.int8_accuracy
    if exact is None or rounded is None:
        raise ValueError("a search within a loss of accuracy needs data with classes")
    if not passes(rounded, exact, tolerable_loss):
        raise ExportError(
            f"{name} loses too much",
            [f"accuracy {exact:.2%} float, {rounded:.2%} int8: tolerable_loss is {tolerable_loss:g} of it"],
        )


def _constant_mask(masks: Masks) -> list[Modifier]:
    """Return what keeps these zeros in a recipe: that of the file says where its zeros come from."""
    names = masks.names()
    return [modifiers()["constant_mask"].model_validate({"targets": names})] if names else []


def _batches_of(sample: Sample) -> list[tuple[np.ndarray, Any]]:
    (images,) = sample.inputs
    starts = range(0, len(sample), _BATCH)
    labels = sample.labels
    return [(images[i : i + _BATCH], None if labels is None else labels[i : i + _BATCH]) for i in starts]
