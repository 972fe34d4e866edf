"""A data set in dipguard: checked images with labels and fixed indices."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dipguard.checks import check_images, check_indices, check_int, check_labels


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled images, checked on construction (TypeError, ValueError).

    Attributes:
        images: float32 [N, 3, H, W] in [0, 1], RGB (other float types are converted).
        labels: int64 [N], at least 0, and below ``len(classes)`` if classes are named.
        indices: int64 [N], positions in the whole data set, all different. They seed the random draws, and do not
            depend on which part of the set was loaded.
        classes: Class names in label order; empty if unknown.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    classes: tuple[str, ...] = ()
    name: str = "images"

    def __post_init__(self) -> None:
        images = check_images(self.images).float()
        labels = check_labels(self.labels, count=len(images), num_classes=len(self.classes) or None)
        indices = torch.tensor(check_indices(self.indices, count=len(images)))
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

    def labelled_for(self, names: Sequence[str], *, outputs: int) -> ImageSet:
        """Return the set with a classifier's labels, found by the names of the classes, or by numbers as names.

        ``names`` are the classifier's classes, empty if unknown, ``outputs`` the number of its logits. ValueError if it
        lacks some classes; where it has as many of other names, their positions are taken for labels, with a warning.
        """
        if not self.classes or self.classes == tuple(names):
            return self
        places: dict[str, list[int]] = {}
        for number, name in enumerate(names if len(names) == outputs else ()):
            places.setdefault(_plain(name), []).append(number)
        found = [places.get(_plain(name), []) for name in self.classes]
        numbers = [int(name) if name.isdecimal() else outputs for name in self.classes]
        if all(len(places) == 1 for places in found):
            numbers = [number for (number,) in found]
        if all(number < outputs for number in numbers):
            return replace(self, labels=torch.tensor(numbers)[self.labels], classes=tuple(names) if places else ())
        unknown = ", ".join(repr(name) for name, own in zip(self.classes, found, strict=True) if len(own) != 1)
        if len(self.classes) != outputs or any(own and number not in own for number, own in enumerate(found)):
            raise ValueError(
                f"`data`: of the {len(self.classes)} classes of {self.name}, the victim ({outputs} classes) has none, "
                f"or several, of the name {unknown[:200]}: name them (the folders) as the victim does, or by its "
                "numbers from 0 on, or give a CSV of labels (`labels_csv`)"
            )
        if places:
            taken = f"the {outputs} classes of {self.name} are taken for its own in this order"
            warnings.warn(f"`data`: the victim has no class {unknown[:200]}: {taken}", UserWarning, stacklevel=2)
        return self


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", " ", name).strip().casefold()


def shift_warning(labels: Tensor, decisions: Tensor, *, outputs: int) -> str | None:
    """Return a warning if a victim with ``outputs`` classes is right by chance, but not with labels [N] one off."""
    from scipy.stats import binom

    def likelihood(shift: int) -> float:  # that guessing is right so often
        return float(binom.sf(int((decisions == labels + shift).sum()) - 1, len(labels), 1 / outputs))

    for shift, what in ((-1, "lower"), (1, "higher")):
        if likelihood(0) > 0.05 and likelihood(shift) < 1e-3:
            now, then = (int((decisions == labels + by).sum()) for by in (0, shift))
            shifted = f"would be on {then} if all labels were one {what}: look at `data.label_base`"
            return f"the victim is right on {now} of {len(labels)} clean images, and {shifted}"
    return None


def window(count: int, *, offset: int = 0, limit: int | None = None) -> slice:
    """Return the slice ``[offset, offset + limit)``, cut at ``count``; ValueError if it is empty."""
    check_int(offset, name="offset", low=0)
    if offset >= count:
        raise ValueError(f"`offset` must be below the number of images, {count}, got {offset}")
    return slice(offset, count if limit is None else min(count, offset + check_int(limit, name="limit", low=1)))


def resize(images: Tensor, size: int | None) -> Tensor:
    """Resize images [N, C, H, W] to [N, C, size, size] (bilinear, antialiased, clamped to [0, 1]); None: no change."""
    if size is None or tuple(images.shape[-2:]) == (check_int(size, name="size", low=1),) * 2:
        return images
    resized = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    return resized.clamp(0, 1)


def from_bytes(pictures: Tensor) -> Tensor:
    """Convert uint8 [N, H, W, 3] to float32 images [N, 3, H, W] in [0, 1]."""
    return pictures.permute(0, 3, 1, 2).contiguous().float() / 255
