"""A data set in dipguard: checked images with labels and fixed indices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dipguard.checks import check_images, check_int, check_labels


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled images, checked on construction.

    Attributes:
        images: float32 [N, 3, H, W] in [0, 1], RGB (other float types are converted).
        labels: int64 [N], at least 0, and below ``len(classes)`` if classes are named.
        indices: int64 [N], positions in the whole data set, all different. They seed the random draws, and do not
            depend on which part of the set was loaded.
        classes: Class names in label order; empty if unknown.
        name: Name of the data set.

    Raises:
        TypeError: A field is not a tensor of the right kind.
        ValueError: Wrong shapes, values outside [0, 1], labels out of range, or indices negative or repeated.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    classes: tuple[str, ...] = ()
    name: str = "images"

    def __post_init__(self) -> None:
        images = check_images(self.images).float()
        labels = check_labels(self.labels, count=len(images), num_classes=len(self.classes) or None)
        indices = check_labels(self.indices, count=len(images), name="indices")
        if len(torch.unique(indices)) != len(images):
            raise ValueError("`indices` must all be different, got a repeated index")
        for attribute, value in (("images", images), ("labels", labels), ("indices", indices)):
            object.__setattr__(self, attribute, value)

    def __len__(self) -> int:
        return len(self.images)

    def select(self, offset: int = 0, limit: int | None = None) -> ImageSet:
        """Return up to ``limit`` images (None: all) from position ``offset`` on; errors are those of `window`."""
        part = window(len(self), offset=offset, limit=limit)
        return ImageSet(self.images[part], self.labels[part], self.indices[part], self.classes, self.name)


def window(count: int, *, offset: int = 0, limit: int | None = None) -> slice:
    """Return the slice ``[offset, offset + limit)``, cut at ``count``.

    Raises:
        TypeError: ``offset`` or ``limit`` is not an integer.
        ValueError: ``offset`` is not in [0, count), or ``limit`` is below 1.
    """
    check_int(offset, name="offset", low=0)
    if offset >= count:
        raise ValueError(f"`offset` must be below the number of images, {count}, got {offset}")
    return slice(offset, count if limit is None else min(count, offset + check_int(limit, name="limit", low=1)))


def resize(images: Tensor, size: int | None) -> Tensor:
    """Resize images [N, 3, H, W] to [N, 3, size, size] (bilinear, antialiased, clamped to [0, 1]); None: no change.

    Raises:
        TypeError: ``size`` is not an integer.
        ValueError: ``size`` is below 1.
    """
    if size is None or tuple(images.shape[-2:]) == (check_int(size, name="size", low=1),) * 2:
        return images
    resized = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    return resized.clamp(0, 1)


def from_bytes(pictures: Tensor) -> Tensor:
    """Convert uint8 [N, H, W, 3] to float32 images [N, 3, H, W] in [0, 1]."""
    return pictures.permute(0, 3, 1, 2).contiguous().float() / 255
