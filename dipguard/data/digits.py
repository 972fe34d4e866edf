"""The embedded default: scikit-learn's handwritten digits, as small colour images.

The 1,797 pictures (8x8, 17 grey levels) are the test part of the UCI "Optical Recognition of Handwritten Digits" set;
they come with scikit-learn, so nothing is downloaded. They are resized to 32x32 RGB, the size of the CIFAR networks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dipguard.checks import check_int
from dipguard.data.base import ImageSet, window

CLASSES = tuple("0123456789")
_EVERY = 3  # each third picture is for evaluation, the rest trains the victim: a rule no random generator can change


def load_digits(
    *, path: str | None = None, offset: int = 0, limit: int | None = None, size: int | None = None
) -> ImageSet:
    """Return the evaluation digits: 599 images [N, 3, 32, 32], none of which the digits victim was trained on.

    Args:
        path: must be None, there is no file to point at.
        offset: position of the first image.
        limit: number of images; None for all that follow.
        size: side of the square images in pixels, 32 by default.

    Raises:
        TypeError, ValueError: a bad ``offset``, ``limit`` or ``size``, or a ``path``.
    """
    if path is not None:
        raise ValueError(f"`path` must be empty for the data set 'digits', which is built in, got {path!r}")
    images, labels = digits_split(evaluation=True, size=32 if size is None else size)
    part = window(len(labels), offset=offset, limit=limit)
    return ImageSet(images[part], labels[part], torch.arange(len(labels))[part], CLASSES, "digits")


def digits_split(*, evaluation: bool, size: int = 32) -> tuple[Tensor, Tensor]:
    """Return (images [N, 3, size, size], labels [N]) of the evaluation part or of the victim's training part.

    The two (599 and 1,198 images) never overlap and do not depend on any seed.
    """
    from sklearn.datasets import load_digits as load_pictures

    check_int(size, name="size", low=1)
    pictures, labels = load_pictures(return_X_y=True)
    images = torch.from_numpy(pictures).float().reshape(-1, 1, 8, 8) / 16
    chosen = (torch.arange(len(images)) % _EVERY == 0) == evaluation
    # Antialiasing matters only where `size` is below 8; enlarged pictures are plainly bilinear.
    images = F.interpolate(images[chosen], size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    return images.clamp(0, 1).expand(-1, 3, -1, -1).contiguous(), torch.from_numpy(labels).long()[chosen]
