"""What every defence is: images in, images out."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Defense(Protocol):
    """A purifier: takes images that may be adversarial, returns images that the victim shall read correctly."""

    def purify(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> the same shape and range."""
        ...
