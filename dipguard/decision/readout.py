"""What a defence looked at on its way to its answer, as an attacker who knows it would look at it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

STITCHED = "stitched"
"""The readout that every defence has: its answer itself."""


@dataclass(frozen=True, eq=False)
class Readout:
    """V pictures of each of B images, and how the victim looks at them.

    Attributes:
        views: [V, B, 3, H, W] in [0, 1], detached.
        look: Differentiable map of pictures [n, 3, H, W] to pictures of the same shape, applied before the victim reads
            them (such as a mirror); None where it reads them as they are.
    """

    views: Tensor
    look: Callable[[Tensor], Tensor] | None = None

    @classmethod
    def join(cls, parts: Sequence[Readout]) -> Readout:
        """Readouts of several stacks of images as one, in order.

        Raises:
            ValueError: No parts, or parts of different numbers of views.
        """
        counts = sorted({len(part.views) for part in parts})
        if len(counts) != 1:
            raise ValueError(f"`parts` must be at least one readout of one number of views, got {counts}")
        return cls(torch.cat([part.views for part in parts], dim=1), parts[0].look)

    def seen(self, views: Tensor) -> Tensor:
        """Pictures [n, 3, H, W] as the victim gets to see them."""
        return views if self.look is None else self.look(views)
