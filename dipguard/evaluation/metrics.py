"""Accuracy with its confidence interval, and SSIM and PSNR to the clean image (section 4.1 and Table 2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from scipy.stats import binomtest
from torch import Tensor, nn
from torchmetrics.functional.image import peak_signal_noise_ratio

from dipguard.decision import quality
from dipguard.fit import Decider

BATCH = 64
"""Images decided or compared at once. Fixed, so that no figure depends on how a fit was cut into stacks."""


def accuracy(decisions: Tensor, labels: Tensor) -> float:
    """Share of correct ``decisions``, int64 [N], in [0, 1]; ValueError for other shapes than that of ``labels``."""
    if decisions.shape != labels.shape or decisions.ndim != 1 or len(labels) == 0:
        raise ValueError(
            "`decisions` and `labels` must be of one shape [N] with N >= 1, "
            f"got {tuple(decisions.shape)} and {tuple(labels.shape)}"
        )
    return float((decisions == labels).double().mean())


def wilson(correct: int, count: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of ``correct`` out of ``count``, in [0, 1]."""
    interval = binomtest(correct, count).proportion_ci(confidence_level=0.95, method="wilson")
    return float(interval.low), float(interval.high)


def similarity(images: Tensor, clean: Tensor) -> Tensor:
    """SSIM of each image to its clean original, both [N, 3, H, W] in [0, 1]: [N] on the CPU.

    ValueError for different shapes, or a side too short for SSIM (:func:`dipguard.decision.quality`).
    """
    return _compare(quality, images, clean)


def psnr(images: Tensor, clean: Tensor) -> Tensor:
    """PSNR in dB of each image to its clean original, shapes as in `similarity`: [N] float64; infinite if equal."""
    scale: dict[str, Any] = {"data_range": 1.0, "reduction": "none", "dim": (1, 2, 3)}
    return _compare(lambda one, other: peak_signal_noise_ratio(one.double(), other.double(), **scale), images, clean)


def decide(victim: nn.Module, images: Tensor) -> Tensor:
    """The victim's decisions on images [N, 3, H, W] in [0, 1]: [N] int64 on the CPU."""
    return Decider(victim, batch=BATCH)(images).argmax(dim=1).cpu()


def _compare(figure: Callable[[Tensor, Tensor], Tensor], images: Tensor, clean: Tensor) -> Tensor:
    if images.shape != clean.shape:
        shapes = f"{tuple(images.shape)} and {tuple(clean.shape)}"
        raise ValueError(f"`images` and `clean` must have one shape, got {shapes}")
    parts = zip(images.split(BATCH), clean.split(BATCH), strict=True)
    return torch.cat([figure(one, other).cpu() for one, other in parts])
