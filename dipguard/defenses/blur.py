"""Gaussian blur: the simplest low-pass filter, a floor that every other purifier should stand above."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from dipguard.checks import check_float
from dipguard.defenses.base import Purifier, library
from dipguard.defenses.transforms import from_hwc, to_hwc


class Blur(Purifier):
    """Gaussian blur with SciPy, channel by channel, mirrored at the border.

    It is linear and differentiable, so an attack that knows it simply differentiates through it: a baseline, no more.

    Args:
        victim: as in `Purifier`.
        sigma: standard deviation of the kernel, pixels, above 0.
        seed: as in `Purifier`; nothing is drawn.

    Raises:
        ValueError: ``sigma`` is out of range.
        ImportError: SciPy is not installed.
    """

    name: ClassVar[str] = "blur"

    def __init__(self, victim: nn.Module, *, sigma: float = 0.6, seed: int = 0) -> None:
        super().__init__(victim, seed=seed)
        self.sigma = check_float(sigma, name="sigma", low=0)
        if self.sigma == 0:
            raise ValueError("`sigma` must be above 0, got 0")
        self._version = str(library("scipy", defense=self.name).__version__)

    @property
    def settings(self) -> dict[str, Any]:
        """As in `Purifier`, with sigma and SciPy's version."""
        return {**super().settings, "sigma": self.sigma, "versions": {"scipy": self._version}}

    def purify_one(self, image: Tensor, index: int) -> Tensor:
        """Blur one image."""
        ndimage = library("scipy.ndimage", defense=self.name)
        # No blur across channels.
        return from_hwc(ndimage.gaussian_filter(to_hwc(image), (self.sigma, self.sigma, 0), mode="mirror"), image)
