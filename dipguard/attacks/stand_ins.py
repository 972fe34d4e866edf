"""What stands in for a defence's backward pass (BPDA, Athalye et al. 2018): a map that can be differentiated."""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import ceil
from typing import Any, ClassVar

from torch import Tensor

from dipguard.checks import check_float
from dipguard.registry import check_options, resolve

STAND_INS: dict[str, str] = {
    "identity": "dipguard.attacks.stand_ins:Identity",
    "blur": "dipguard.attacks.stand_ins:GaussianBlur",
    "short_dip": "dipguard.attacks.short_dip:ShortDIP",
}
"""Name -> class. Built with the defence that it stands in for."""


class StandIn(ABC):
    """A differentiable map of images to images. Its gradient is used, its values are not.

    Args:
        defense: whose backward pass it replaces.
    """

    name: ClassVar[str]

    def __init__(self, defense: Any) -> None:
        self.defense = defense

    @property
    def settings(self) -> dict[str, Any]:
        """Its options, ready for JSON."""
        return {}

    @property
    def steps_per_image(self) -> int:
        """Optimiser steps of a deep image prior that one image costs."""
        return 0

    @abstractmethod
    def __call__(self, images: Tensor, indices: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] and the draws' indices int [B] -> [B, 3, H', W'], differentiable by ``images``."""


class Identity(StandIn):
    """The images themselves: the gradient by what the defence returned is taken for that by what it was given."""

    name: ClassVar[str] = "identity"

    def __call__(self, images: Tensor, indices: Tensor) -> Tensor:
        """See `StandIn`."""
        return images


class GaussianBlur(StandIn):
    """A Gaussian blur: a purifier hands on the coarse part of an image, so that fine steps are wasted on it.

    Args:
        defense: as in `StandIn`.
        sigma: standard deviation, pixels, above 0.

    Raises:
        ValueError: ``sigma`` is out of range.
    """

    name: ClassVar[str] = "blur"

    def __init__(self, defense: Any, *, sigma: float = 1.0) -> None:
        super().__init__(defense)
        self.sigma = check_float(sigma, name="sigma", low=0)
        if self.sigma == 0:
            raise ValueError("`sigma` must be above 0, got 0")

    @property
    def settings(self) -> dict[str, Any]:
        """Sigma."""
        return {"sigma": self.sigma}

    def __call__(self, images: Tensor, indices: Tensor) -> Tensor:
        """See `StandIn`; mirrored at the border."""
        from torchvision.transforms.functional import gaussian_blur

        reach = min(ceil(3 * self.sigma), min(images.shape[-2:]) - 1)  # a reflection needs more pixels than it adds
        blurred: Tensor = gaussian_blur(images, [2 * reach + 1] * 2, [self.sigma] * 2)
        return blurred


def build_stand_in(name: str, defense: Any, **options: Any) -> StandIn:
    """Return the stand-in called ``name`` (a key of `STAND_INS`) for ``defense``.

    Raises:
        TypeError: an option that it does not have.
        ValueError: an unknown name, or a value out of range.
    """
    make = resolve(STAND_INS, name, argument="stand_in")
    check_options(make, options, owner=f"the stand-in {name!r}")
    made: StandIn = make(defense, **options)
    return made
