"""The confidence interval of an accuracy, and SSIM and PSNR to the clean image (section 4.1 and Table 2)."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio

from dipguard.classifier import Decider
from dipguard.decision import quality

BATCH = 64
"""Images decided or compared at once. Fixed, so that no figure depends on how a fit was cut into stacks."""


def wilson(correct: float, count: int, *, looks: int = 1) -> tuple[float, float]:
    """The 95 % Wilson score interval of ``correct`` out of ``count`` images, in [0, 1].

    A part of an image may be correct, as the mean over draws: then the interval is if anything too wide, since shares
    vary at most as much as right and wrong. With several ``looks``, that many intervals hold together
    with a probability of 95 % (Bonferroni).
    """
    z = NormalDist().inv_cdf(1 - 0.025 / looks)
    share, z2 = correct / count, z**2
    middle, reach = share + z2 / (2 * count), z * sqrt((share * (1 - share) + z2 / (4 * count)) / count)
    low, high = ((middle + end) / (1 + z2 / count) for end in (-reach, reach))
    return low if correct > 0 else 0.0, high if correct < count else 1.0


def similarity(images: Tensor, clean: Tensor) -> Tensor:
    """SSIM (:func:`dipguard.decision.quality`) of each image to its clean one, both [N, 3, H, W]: [N] on the CPU."""
    return _compare(quality, images, clean)


def psnr(images: Tensor, clean: Tensor) -> Tensor:
    """PSNR in dB of each image to its clean original, shapes as in `similarity`: [N] float64; infinite if equal."""
    scale: dict[str, Any] = {"data_range": 1.0, "reduction": "none", "dim": (1, 2, 3)}
    return _compare(lambda one, other: peak_signal_noise_ratio(one.double(), other.double(), **scale), images, clean)


def decide(victim: nn.Module, images: Tensor) -> Tensor:
    """The victim's decisions on images [N, 3, H, W] in [0, 1]: [N] int64 on the CPU."""
    return Decider(victim, batch=BATCH)(images).argmax(dim=1).cpu()


def _compare(figure: Callable[[Tensor, Tensor], Tensor], images: Tensor, clean: Tensor) -> Tensor:
    parts = zip(images.split(BATCH), clean.split(BATCH), strict=True)
    return torch.cat([figure(one, other).cpu() for one, other in parts])
