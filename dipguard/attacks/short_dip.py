"""A short, differentiable deep image prior in the place of the defence's own."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from dipguard.attacks.stand_ins import StandIn
from dipguard.checks import check_float, check_int
from dipguard.fit import FitOptions
from dipguard.fit.unrolled import FLOOR, unrolled_fit
from dipguard.networks.presets import hourglass

DEFAULT = FitOptions(
    network=hourglass((4, 8, 16), skips=0, input_depth=1), padding="zeros", jitter=0.0, optimise_z=True
)
"""The fit that stands in for a defence that makes none: MirrorGuard's smaller one."""


def fits_of(defense: Any) -> tuple[FitOptions, ...]:
    """The DIP fits that a defence makes of each image, at least one: `DEFAULT` where it says nothing of any."""
    told = getattr(defense, "dip_fits", ()) or (getattr(defense, "fit_options", None),)
    return tuple(fit for fit in told if isinstance(fit, FitOptions)) or (DEFAULT,)


class ShortDIP(StandIn):
    """The first steps of the defence's own fit (of its first one, where it makes several), differentiated.

    It has the defence's network, and its draws too: the index that settles them settles these.

    Args:
        defense: as in `StandIn`.
        T: optimiser steps, at least 2: x(0) does not know the image.
        floor: as in :func:`~dipguard.fit.unrolled.unrolled_fit`.

    Raises:
        TypeError, ValueError: an option is out of range.
    """

    name: ClassVar[str] = "short_dip"

    def __init__(self, defense: Any, *, T: int = 20, floor: float = FLOOR) -> None:
        super().__init__(defense)
        self.T = check_int(T, name="T", low=2)
        self.floor = check_float(floor, name="floor", low=0.0)
        self.fit = fits_of(defense)[0]

    @property
    def settings(self) -> dict[str, Any]:
        """T and floor."""
        return {"T": self.T, "floor": self.floor}

    @property
    def steps_per_image(self) -> int:
        """T."""
        return self.T

    def __call__(self, images: Tensor, indices: Tensor) -> Tensor:
        """See `StandIn`."""
        return unrolled_fit(images, T=self.T, fit=self.fit, indices=indices.tolist(), floor=self.floor)
