"""What is said about a set of decisions and images: shares with their intervals, and PSNR."""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor

from dipguard.checks import check_int

Z_95 = 1.959963984540054  # the normal distribution's 97.5 % quantile


def wilson(correct: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share by Wilson's score (Wilson 1927), in [0, 1]: sound for few images too.

    Args:
        correct: Number of right decisions.
        count: Number of images, at least 1.

    Raises:
        TypeError, ValueError: A number is out of range.
    """
    check_int(count, name="count", low=1)
    check_int(correct, name="correct", low=0, high=count)
    share, square = correct / count, Z_95**2
    centre = share + square / (2 * count)
    spread = Z_95 * sqrt(share * (1 - share) / count + square / (4 * count**2))
    scale = 1 + square / count
    # At the ends the bound is the end itself, which rounding would miss.
    low = 0.0 if correct == 0 else (centre - spread) / scale
    return low, 1.0 if correct == count else (centre + spread) / scale


def psnr(images: Tensor, clean: Tensor) -> Tensor:
    """PSNR of each image to its clean original, dB, [N]; infinite where they are equal.

    Args:
        images: [N, 3, H, W] in [0, 1].
        clean: Of the same shape.

    Raises:
        ValueError: Different shapes.
    """
    if images.shape != clean.shape:
        raise ValueError(
            f"`images` and `clean` must have one shape, got {tuple(images.shape)} and {tuple(clean.shape)}"
        )
    error = (images.double() - clean.double()).square().flatten(1).mean(dim=1)
    return -10 * torch.log10(error)
