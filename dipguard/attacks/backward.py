"""What replaces a defence's backward pass (BPDA, Athalye et al. 2018): a differentiable map, and the way to use it."""

from __future__ import annotations

from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dipguard.checks import check_choice, check_float, check_int, check_positive
from dipguard.fit.options import FitOptions
from dipguard.fit.unrolled import unrolled_fit
from dipguard.networks.presets import hourglass
from dipguard.registry import check_options

DEFAULT_FIT = FitOptions(
    network=hourglass((4, 8, 16), skips=0, input_depth=1), padding="zeros", jitter=0.0, optimise_z=True
)
"""The fit that approximates a defence that makes none: the smaller one of MirrorGuard."""


class _StraightThrough(torch.autograd.Function):
    """Forward the purified image, backward the identity."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, purified: Tensor) -> Tensor:
        return purified.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def straight_through(images: Tensor, purified: Tensor) -> Tensor:
    """Return the values of ``purified`` [B, 3, H', W']; its gradient is passed to ``images`` [B, 3, H, W] as it is.

    Where the defence changed the resolution, the gradient is brought back by the adjoint of a bilinear resize.
    """
    return _StraightThrough.apply(resized(images, like=purified), purified.detach())


def resized(images: Tensor, *, like: Tensor) -> Tensor:
    """Bring ``images`` to the height and width of ``like``, differentiably; unchanged where they have them already."""
    if like.shape[-2:] == images.shape[-2:]:
        return images
    return F.interpolate(images, size=like.shape[-2:], mode="bilinear", align_corners=False)


class Identity:
    """The images themselves: the gradient by the purified image is taken for that by the given one.

    The other approximations derive from it. Each is a differentiable map of images to images, of which only the
    gradient is used, and keeps its options in attributes of the same names.

    Args:
        defense: Whose backward pass is replaced.
    """

    steps_per_image: int = 0
    """Optimiser steps of a deep image prior that one image costs."""

    def __init__(self, defense: Any) -> None:
        self.defense = defense

    def __call__(self, images: Tensor, indices: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] and the draws' indices int [B] -> [B, 3, H', W'], differentiable by ``images``."""
        return images


class GaussianBlur(Identity):
    """A Gaussian blur, mirrored at the border: a purifier keeps the coarse part of an image.

    Args:
        sigma: Standard deviation, pixels, above 0.
    """

    def __init__(self, defense: Any, *, sigma: float = 1.0) -> None:
        super().__init__(defense)
        self.sigma = check_positive(sigma, name="sigma")

    def __call__(self, images: Tensor, indices: Tensor) -> Tensor:
        """Blur the images."""
        from torchvision.transforms.functional import gaussian_blur

        reach = min(ceil(3 * self.sigma), min(images.shape[-2:]) - 1)  # a reflection needs more pixels than it adds
        blurred: Tensor = gaussian_blur(images, [2 * reach + 1] * 2, [self.sigma] * 2)
        return blurred


class ShortDIP(Identity):
    """The first steps of the defence's own DIP fit (the first one, if it makes several), differentiated.

    It has the network and the draws of the defence. For a defence without a DIP it is `DEFAULT_FIT`.

    Args:
        T: Optimiser steps, at least 2: x(0) does not depend on the image.
        floor: See :func:`~dipguard.fit.unrolled.unrolled_fit`.
    """

    def __init__(self, defense: Any, *, T: int = 20, floor: float = 1e-3) -> None:
        super().__init__(defense)
        self.T = self.steps_per_image = check_int(T, name="T", low=2)
        self.floor = check_float(floor, name="floor", low=0.0)
        self.fit = fits_of(defense)[0]

    def __call__(self, images: Tensor, indices: Tensor) -> Tensor:
        """Return the last reconstruction of the short fit."""
        return unrolled_fit(images, T=self.T, fit=self.fit, indices=indices.tolist(), floor=self.floor)


BACKWARD: dict[str, type[Identity]] = {"identity": Identity, "blur": GaussianBlur, "short_dip": ShortDIP}
"""Name -> class."""


def build_backward(name: str, defense: Any, **options: Any) -> Identity:
    """Return the backward approximation called ``name`` (a key of `BACKWARD`) for ``defense``, its options checked."""
    make = BACKWARD[check_choice(name, BACKWARD, name="backward")]
    check_options(make, options, owner=f"the backward approximation {name!r}")
    return make(defense, **options)


def fits_of(defense: Any) -> tuple[FitOptions, ...]:
    """The DIP fits that a defence makes of each image; `DEFAULT_FIT` if it makes none."""
    return tuple(getattr(defense, "dip_fits", ())) or (DEFAULT_FIT,)
