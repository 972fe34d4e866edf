"""The figures of merit: accuracy, and SSIM to the clean image (section 4.1 and Table 2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dipguard.decision import quality
from dipguard.fit import Decider

BATCH = 64
"""Images decided or compared at once. Fixed, so that no figure depends on how the fit was cut into stacks."""


def accuracy(decisions: Tensor, labels: Tensor) -> float:
    """Share of right decisions, in [0, 1].

    Args:
        decisions: [N] int64.
        labels: [N] int64.

    Raises:
        ValueError: Different shapes, or no images.
    """
    if decisions.shape != labels.shape or decisions.ndim != 1 or len(labels) == 0:
        raise ValueError(
            "`decisions` and `labels` must be of one shape [N] with N >= 1, "
            f"got {tuple(decisions.shape)} and {tuple(labels.shape)}"
        )
    return float((decisions == labels).double().mean())


def similarity(images: Tensor, clean: Tensor) -> Tensor:
    """SSIM of each image to its clean original (see :func:`dipguard.decision.quality`), [N] on the CPU.

    Args:
        images: [N, 3, H, W] in [0, 1].
        clean: Of the same shape.

    Raises:
        ValueError: Different shapes, or a side too short for SSIM.
    """
    if images.shape != clean.shape:
        raise ValueError(
            f"`images` and `clean` must have one shape, got {tuple(images.shape)} and {tuple(clean.shape)}"
        )
    parts = zip(images.split(BATCH), clean.split(BATCH), strict=True)
    return torch.cat([quality(one, other).cpu() for one, other in parts])


def decide(victim: nn.Module, images: Tensor) -> Tensor:
    """The victim's decisions on images [N, 3, H, W] in [0, 1]: [N] int64 on the CPU."""
    return Decider(victim, batch=BATCH)(images).argmax(dim=1).cpu()
