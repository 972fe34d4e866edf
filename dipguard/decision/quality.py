"""Perceptual quality v(t) of a reconstruction (section 3.2)."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

WINDOW = 11  # side of the Gaussian window of SSIM, pixels (Wang et al. 2004)
SMALLEST_SIDE = WINDOW // 2 + 1  # that can be reflected by half a window


def quality(reconstructions: Tensor, given: Tensor) -> Tensor:
    """v(t) ~ SSIM(x(t), x0), image by image.

    SSIM as in Wang et al. 2004: Gaussian window of 11 pixels, sigma 1.5, data range 1, mean over channels and all
    pixels, the image reflected at its border. Both images are [B, 3, H, W] in [0, 1]; returns [B], in [-1, 1].
    ValueError if the shapes differ, or a side is too short to be reflected.
    """
    if reconstructions.shape != given.shape:
        shapes = f"{tuple(reconstructions.shape)} and {tuple(given.shape)}"
        raise ValueError(f"`reconstructions` and `given` must have one shape, got {shapes}")
    if min(given.shape[-2:]) < SMALLEST_SIDE:
        raise ValueError(
            f"`given` must be at least {SMALLEST_SIDE}x{SMALLEST_SIDE} pixels for SSIM, got {tuple(given.shape[-2:])}"
        )
    value = structural_similarity_index_measure(
        reconstructions, given, data_range=1.0, kernel_size=WINDOW, sigma=1.5, reduction="none"
    )
    assert isinstance(value, Tensor)
    return torch.atleast_1d(value)
