"""What replaces a defence's backward pass (BPDA, Athalye et al. 2018): a differentiable map, and the way to use it."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from dipguard.fit.options import FitOptions
from dipguard.fit.unrolled import FLOOR, unrolled_fit
from dipguard.networks.presets import hourglass

DEFAULT_FIT = FitOptions(
    network=hourglass((4, 8, 16), skips=0, input_depth=1), padding="zeros", jitter=0.0, optimise_z=True
)
"""The fit that approximates a defence that makes none: DIPDefend's, on CIFAR-10."""
SIGMA = 1.0  # standard deviation of `blur`, in pixels
SHORT_T = 20  # optimiser steps of `short_dip`


def straight_through(images: Tensor, purified: Tensor) -> Tensor:
    """Return the values of ``purified`` [B, 3, H', W']; its gradient is passed to ``images`` [B, 3, H, W] as it is.

    Where the defence changed the resolution, the gradient is brought back by the adjoint of a bilinear resize.
    """
    given = resized(images, like=purified)
    return purified.detach() + (given - given.detach())  # the difference is exactly 0


def resized(images: Tensor, *, like: Tensor) -> Tensor:
    """Bring ``images`` to the height and width of ``like``, differentiably; unchanged where they have them already."""
    if like.shape[-2:] == images.shape[-2:]:
        return images
    return F.interpolate(images, size=like.shape[-2:], mode="bilinear", align_corners=False)


def identity(images: Tensor, indices: Tensor, fit: FitOptions) -> Tensor:
    """The images themselves: the gradient by the purified image is taken for that by the given one."""
    return images


def blur(images: Tensor, indices: Tensor, fit: FitOptions) -> Tensor:
    """A Gaussian blur, mirrored at the border: a purifier keeps the coarse part of an image."""
    from torchvision.transforms.functional import gaussian_blur

    reach = min(ceil(3 * SIGMA), min(images.shape[-2:]) - 1)  # a reflection needs more pixels than it adds
    return gaussian_blur(images, [2 * reach + 1] * 2, [SIGMA] * 2)


def short_dip(images: Tensor, indices: Tensor, fit: FitOptions) -> Tensor:
    """The reconstruction after the first steps of the defence's own DIP fit, with its network and draws."""
    return unrolled_fit(images, T=SHORT_T, fit=fit, indices=indices.tolist(), floor=FLOOR)


BACKWARD: dict[str, Callable[[Tensor, Tensor, FitOptions], Tensor]] = {
    "identity": identity,
    "blur": blur,
    "short_dip": short_dip,
}
"""Name -> differentiable map of images [B, 3, H, W] in [0, 1], whose gradient takes the place of the defence's.

It also gets the draws' indices int [B] and the defence's first DIP fit."""


def fits_of(defense: Any) -> tuple[FitOptions, ...]:
    """The DIP fits that a defence makes of each image; `DEFAULT_FIT` if it makes none."""
    return tuple(getattr(defense, "dip_fits", ())) or (DEFAULT_FIT,)
