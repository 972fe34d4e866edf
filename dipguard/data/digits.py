"""The built-in data set: scikit-learn's handwritten digits, as 32x32 colour images.

The 1,797 images (8x8, 17 grey levels) are the test part of the UCI "Optical Recognition of Handwritten Digits" set.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from dipguard.data.base import ImageSet, resize, window
from dipguard.registry import import_extra

CLASSES = tuple("0123456789")
_EVERY = 3  # every third image is for evaluation, the rest trains the victim: the split depends on no seed


def load_digits(
    *, path: str | None = None, offset: int = 0, limit: int | None = None, size: int | None = None
) -> ImageSet:
    """Handwritten digits: 599 images, 32x32 unless ``size`` is given, none of which the digits victim is trained on."""
    if path is not None:
        raise ValueError(f"`path` must be empty for the data set 'digits', which is built in, got {path!r}")
    images, labels = digits_split(evaluation=True, size=32 if size is None else size)
    part = window(len(labels), offset=offset, limit=limit)
    return ImageSet(images[part], labels[part], torch.arange(len(labels))[part], CLASSES, "digits")


def digits_split(*, evaluation: bool, size: int = 32) -> tuple[Tensor, Tensor]:
    """Return images [N, 3, size, size] and labels [N] of the evaluation part (599) or the training part (1,198)."""
    pictures, labels = _pictures()
    images = torch.from_numpy(pictures).float().reshape(-1, 1, 8, 8) / 16
    chosen = (torch.arange(len(images)) % _EVERY == 0) == evaluation
    images = resize(images[chosen], size)
    return images.expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(labels).long()[chosen]


@cache
def _pictures() -> tuple[Any, Any]:
    datasets = import_extra("sklearn.datasets", owner="the data set 'digits'", extra="app")
    return datasets.load_digits(return_X_y=True)
