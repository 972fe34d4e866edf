"""Shared by all victims: input normalisation, and a check of the output."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dipguard.checks import check_images
from dipguard.classifier import check_is_module, frozen, logits_of, probability_warning

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Normalised(nn.Module):
    """A network with its input normalisation: ``network((images - mean) / std)`` for images in [0, 1].

    Args:
        network: Classifier of normalised images.
        mean: Per-channel mean, three numbers.
        std: Per-channel standard deviation, three positive numbers.
        classes: Class names in the order of the logits; empty if unknown.
        size: Height and width in pixels of the images that the network was made for; None if unknown.
        interpolation: How to resize other images for the network: a name of ``PIL.Image.Resampling`` in lower case.

    Raises:
        ValueError: ``mean`` or ``std`` does not have three numbers, or ``std`` is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: nn.Module,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        classes: Sequence[str] = (),
        size: tuple[int, int] | None = None,
        interpolation: str = "bilinear",
    ) -> None:
        super().__init__()
        self.classes, self.size, self.interpolation = tuple(classes), size, interpolation
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != 3:
                raise ValueError(f"`{name}` must have three numbers, one per channel, got {list(values)}")
        if min(std) <= 0:
            raise ValueError(f"`std` must be positive, got {list(std)}")
        self.network = network
        self.register_buffer("mean", torch.tensor(list(mean), dtype=torch.float32).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(list(std), dtype=torch.float32).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits [B, C] of images [B, 3, H, W] in [0, 1]."""
        logits: Tensor = self.network((images - self.mean) / self.std)
        return logits


def check_victim(victim: nn.Module, images: Tensor) -> Tensor:
    """Run ``victim`` on images [B, 3, H, W] in [0, 1] and return its logits [B, C], on the images' device.

    It runs in eval mode without gradients; its modes and flags are restored afterwards.

    Raises:
        TypeError: ``victim`` is not a module, or its output is not a floating-point tensor.
        ValueError: Bad ``images``, or an output that is not [B, C] with C >= 2, or not finite.

    Warns:
        UserWarning: The outputs look like probabilities (all in [0, 1], each row sums to 1).
    """
    check_is_module(victim)
    images = check_images(images)
    with frozen(victim), torch.no_grad():
        scores = logits_of(victim, images)
    text = probability_warning(scores)
    if text is not None:
        warnings.warn(text, UserWarning, stacklevel=2)
    return scores


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the error's type where the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
