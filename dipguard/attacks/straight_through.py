"""A defence that has no gradient, with the identity's in its place (BPDA, Athalye et al. 2018)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def straight_through(images: Tensor, purified: Tensor) -> Tensor:
    """Return the values of ``purified``; its gradient is passed to ``images`` as it is.

    Where the defence changed the resolution, the gradient is brought back by the adjoint of a bilinear resize.

    Args:
        images: [B, 3, H, W], what the defence was given; its gradient is wanted.
        purified: [B, 3, H', W'], what it made of them; no gradient flows there.
    """
    return _StraightThrough.apply(resized(images, like=purified), purified.detach())


def resized(images: Tensor, *, like: Tensor) -> Tensor:
    """Bring ``images`` to the size of ``like``, differentiably; they themselves where the size is the same already."""
    if like.shape[-2:] == images.shape[-2:]:
        return images
    return F.interpolate(images, size=like.shape[-2:], mode="bilinear", align_corners=False)


class _StraightThrough(torch.autograd.Function):
    """Forward the purified image, backward the identity."""

    @staticmethod
    def forward(ctx: Any, stand_in: Tensor, purified: Tensor) -> Tensor:
        return purified.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None
