"""Perceptual quality v(t) of a reconstruction (section 3.2), and the noise of an image."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from dipguard.precision import widest

WINDOW = 11  # side of the Gaussian window of SSIM, pixels (Wang et al. 2004)
SMALLEST_SIDE = WINDOW // 2 + 1  # that can be reflected by half a window
MASK = ((1.0, -2.0, 1.0), (-2.0, 4.0, -2.0), (1.0, -2.0, 1.0))
"""The difference of two Laplacians, which is blind to linear ramps (Immerkaer 1996); its squares add up to 36."""
LOWER_QUARTILE = 0.318639  # of |N(0, 1)|


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


def image_noise(images: Tensor) -> Tensor:
    """Estimate the standard deviation of each image's noise, [n], by what Immerkaer's mask leaves of it.

    It is the larger of two estimates, both with the mask of Immerkaer 1996 ("Fast noise variance estimation"). One
    reads the differences red - green and blue - green: texture in photographs lies mostly in the brightness, so noise
    that differs between the channels stands out there. The other is for noise that the channels share: a quarter of
    what the lower quartile of the filtered brightness implies, because texture and noise look alike there.

    ``images`` are [n, 3, H, W] in [0, 1], at least 3x3 pixels. The result is in the same units; clean CIFAR-10 images
    have a median of 0.8/255, attacked ones about 40 % of the attack's eps.
    """
    pixels = images.to(widest(images.device))
    differences = pixels[:, [0, 2]] - pixels[:, [1]]
    colour = math.sqrt(math.pi / 2) * _filtered(differences).mean(dim=(1, 2, 3)) / math.sqrt(2)
    smooth = _filtered(pixels.mean(dim=1, keepdim=True)).flatten(1).quantile(0.25, dim=1)
    return torch.maximum(colour, smooth / LOWER_QUARTILE / 4)


def _filtered(maps: Tensor) -> Tensor:
    """The absolute values of ``MASK`` over maps [n, k, H, W], scaled to the noise's standard deviation."""
    mask = torch.tensor(MASK, dtype=maps.dtype, device=maps.device) / 6
    filtered: Tensor = F.conv2d(maps.flatten(0, 1)[:, None], mask[None, None])
    return filtered.abs().unflatten(0, maps.shape[:2])[:, :, 0]
