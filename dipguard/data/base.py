"""What a data set is to dipguard: checked images with labels and lasting indices, and Lightning loaders over them."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from dipguard.checks import check_images, check_int, check_labels


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled images, checked when made.

    Attributes:
        images: float32 [N, 3, H, W] in [0, 1], RGB (other float types are converted).
        labels: int64 [N], at least 0, and below ``len(classes)`` where classes are named.
        indices: int64 [N], each image's position in the whole data set, all different. An image keeps its index
            whatever part of the set was loaded, so seeds derived from it do not change.
        classes: class names in label order; empty where the data set has none (classes are then their numbers).
        name: the data set's name.

    Raises:
        TypeError: a field is not a tensor of the right kind.
        ValueError: wrong shapes, values outside [0, 1], labels out of range, or indices negative or repeated.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    classes: tuple[str, ...] = ()
    name: str = field(default="images")

    def __post_init__(self) -> None:
        images = check_images(self.images).float()
        count = len(images)
        labels = check_labels(self.labels, count=count, num_classes=len(self.classes) or None)
        indices = check_labels(self.indices, count=count, name="indices")
        if len(torch.unique(indices)) != count:
            raise ValueError("`indices` must all be different, got a repeated index")
        for attribute, value in (("images", images), ("labels", labels), ("indices", indices)):
            object.__setattr__(self, attribute, value)

    def __len__(self) -> int:
        return len(self.images)

    def select(self, offset: int = 0, limit: int | None = None) -> ImageSet:
        """Return ``limit`` images (or as many as there are; None: all) from position ``offset`` on.

        Raises:
            TypeError, ValueError: see `window`.
        """
        part = window(len(self), offset=offset, limit=limit)
        return ImageSet(self.images[part], self.labels[part], self.indices[part], self.classes, self.name)


def window(count: int, *, offset: int = 0, limit: int | None = None) -> slice:
    """Return the slice ``[offset, offset + limit)``, cut at ``count``.

    Raises:
        TypeError: ``offset`` or ``limit`` is not an integer.
        ValueError: ``offset`` is negative or not below ``count``, or ``limit`` is below 1.
    """
    check_int(offset, name="offset", low=0)
    if offset >= count:
        raise ValueError(f"`offset` must be below the number of images, {count}, got {offset}")
    if limit is None:
        return slice(offset, count)
    return slice(offset, min(count, offset + check_int(limit, name="limit", low=1)))


def resize(images: Tensor, size: int | None) -> Tensor:
    """Return images [N, 3, H, W] resized to [N, 3, size, size] (bilinear, antialiased, still in [0, 1]).

    ``size`` None, or equal to both sides, changes nothing.

    Raises:
        TypeError, ValueError: ``size`` is not an integer of at least 1.
    """
    if size is None:
        return images
    check_int(size, name="size", low=1)
    if tuple(images.shape[-2:]) == (size, size):
        return images
    resized = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    return resized.clamp(0, 1)


def from_bytes(pictures: Tensor) -> Tensor:
    """Return uint8 pictures [N, H, W, 3] as float32 images [N, 3, H, W] in [0, 1]."""
    return pictures.permute(0, 3, 1, 2).contiguous().float() / 255


class ImageDataModule(pl.LightningDataModule):
    """Loaders of (images, labels, indices) over an `ImageSet`, in its order, for ``Trainer.predict`` and ``test``.

    Raises:
        TypeError, ValueError: ``batch_size`` is not an integer of at least 1, or ``num_workers`` of at least 0.
    """

    def __init__(self, image_set: ImageSet, *, batch_size: int = 32, num_workers: int = 0) -> None:
        super().__init__()
        self.image_set = image_set
        self.batch_size = check_int(batch_size, name="batch_size", low=1)
        self.num_workers = check_int(num_workers, name="num_workers", low=0)

    def predict_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return a loader of batches (images [B, 3, H, W], labels [B], indices [B])."""
        data = TensorDataset(self.image_set.images, self.image_set.labels, self.image_set.indices)
        return DataLoader(data, batch_size=self.batch_size, shuffle=False, num_workers=self.num_workers)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the same loader as `predict_dataloader`."""
        return self.predict_dataloader()
