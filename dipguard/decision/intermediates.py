"""What a defence looks at while it works, as an adaptive attack sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

STITCHED = "stitched"
"""Name of the intermediate that every defence has: its final reconstruction."""


@dataclass(frozen=True, eq=False)
class Intermediate:
    """V images of a defence for each of B given images, and the scores that it makes of them.

    Attributes:
        views: [V, B, 3, H, W] in [0, 1], detached.
        scores: Differentiable map of the views and the given images [B, 3, H, W] to the scores [B, C] that the defence
            decides by; None if it goes by the victim's logits on the views.
        given_readings: How often the victim reads a given image, or a copy of it, for the scores.
    """

    views: Tensor
    scores: Callable[[Tensor, Tensor], Tensor] | None = None
    given_readings: int = 0

    @property
    def readings(self) -> int:
        """How often the victim reads an image: each view once, and what the scores need of the given one."""
        return len(self.views) + self.given_readings
