"""Images that may be broken: each unreadable one is named, counted and stood in for, or stops training when asked."""

import copy
import logging
from collections.abc import Callable
from contextlib import closing
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

log = logging.getLogger(__name__)

IGNORED = -100  # torch's own word for a label that does not count


class UnreadableImageError(ValueError):
    """An image that can't be decoded; the message names it."""


class ImageSource:
    """Images and their classes, from a timm reader (a folder, a tar file, Hugging Face) or a torchvision dataset."""

    def __init__(self, items: Any) -> None:
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def read(self, index: int) -> tuple[Any, int]:
        """Return an open file or a PIL image, and its class."""
        image, target, *_ = self._items[index]
        return image, int(target)

    def name(self, index: int) -> str:
        """Return what to call the image when it can't be read."""
        if hasattr(self._items, "filename"):
            return str(self._items.filename(index, absolute=True))
        samples = getattr(self._items, "samples", None)
        return str(samples[index][0]) if samples else f"image {index} of {type(self._items).__name__}"


class Images(Dataset[tuple[Tensor, int]]):
    """Decoded and transformed images of a source.

    The image after an unreadable one stands in for it, so that the length, and with it every schedule, stays as it was
    and the same folder gives the same training. Where labels are counted (`ignore`) its label is IGNORED.

    Args:
        ignore: give the stand-in the label IGNORED, which evaluation, export and `cross_entropy` leave out.
        mode: PIL mode that images are converted to: "RGB" or "L".
        strict: raise UnreadableImageError at the first one instead.
    """

    def __init__(
        self, source: ImageSource, transform: Callable[[Any], Tensor], *, mode: str, strict: bool, ignore: bool
    ) -> None:
        self._source = source
        self._transform = transform
        self._mode = mode
        self._strict = strict
        self._ignore = ignore
        # in shared memory: the loader's workers write it, the trainer counts
        self._unreadable = torch.zeros(len(source), dtype=torch.bool).share_memory_()  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        count = len(self)
        for candidate in range(index, index + count):
            try:
                image, target = self.decode(candidate % count)
            except UnreadableImageError as error:
                if self._strict:
                    raise
                self._report(candidate % count, error)
                continue
            return self._transform(image), IGNORED if self._ignore and candidate != index else target
        raise UnreadableImageError(f"none of the {count} images can be read, {self._source.name(index)!r} for one")

    def decode(self, index: int) -> tuple[Image.Image, int]:
        """Return one image as it is stored, in the right mode, and its class.

        Raises:
            UnreadableImageError: it is no image, cut off, or gone.
        """
        try:
            opened, target = self._source.read(index)
            with closing(opened):
                image = opened if isinstance(opened, Image.Image) else Image.open(opened)
                return image.convert(self._mode), target  # decodes: a file that is cut off is noticed here
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            unknown = isinstance(error, UnidentifiedImageError)  # its own text names a stream, not a file
            reason = "no image format is known in it" if unknown else str(error)
            raise UnreadableImageError(f"{self._source.name(index)!r} is unreadable: {reason}") from None

    def with_transform(self, transform: Callable[[Any], Tensor]) -> "Images":
        """Return the same images looked at in another way; what is unreadable is known to both."""
        other = copy.copy(self)
        other._transform = transform
        return other

    @property
    def unreadable(self) -> list[str]:
        """Names of the unreadable images met so far, in all workers."""
        return [self._source.name(int(index)) for index in self._unreadable.nonzero()]

    def _report(self, index: int, error: UnreadableImageError) -> None:
        if not self._unreadable[index]:
            self._unreadable[index] = True
            log.warning("image %s; the next one stands in for it", error)
