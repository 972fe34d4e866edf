"""What every victim shares: normalisation inside, and a checked output."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dipguard.checks import check_images
from dipguard.classifier import check_is_module, check_logits, device_of, frozen, probability_warning

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

__all__ = ["CIFAR10_CLASSES", "IMAGENET_MEAN", "IMAGENET_STD", "Normalised", "check_victim"]


class Normalised(nn.Module):
    """A classifier of [0, 1] images around a network that expects normalised ones.

    Computes ``network((images - mean) / std)`` for images [B, 3, H, W]; mean and std are buffers, so they move with the
    module.

    Attributes:
        classes: The classes' names in the order of the logits; empty where nobody named them.
        size: Height and width, in pixels, of the images that the network was made for; None if that is not known.
        interpolation: How pictures of another size are to be resized for it: a name of
            ``PIL.Image.Resampling``, in small letters.

    Raises:
        ValueError: ``mean`` or ``std`` does not have three numbers, or a ``std`` is not positive.
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
        self.classes = tuple(classes)
        self.size = size
        self.interpolation = interpolation
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != 3:
                raise ValueError(f"`{name}` must have three numbers, one a channel, got {list(values)}")
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
    """Run ``victim`` on one batch and return its logits [B, C], on the victim's device.

    The victim runs in eval mode without gradients; its modes and flags are as before afterwards.

    Args:
        victim: classifier of images [B, 3, H, W] in [0, 1].
        images: the batch.

    Raises:
        TypeError: ``victim`` is not a module, or its output is not a floating-point tensor.
        ValueError: bad ``images``, or an output that is not [B, C] with C >= 2, or not finite.

    Warns:
        UserWarning: the outputs look like probabilities (all in [0, 1], each row summing to 1). Attacks expect
            logits.
    """
    check_is_module(victim)
    check_images(images)
    with frozen(victim), torch.no_grad():
        scores = check_logits(victim(images.to(device_of(victim, images.device))), count=len(images))
    if not bool(torch.isfinite(scores).all()):
        raise ValueError("`victim` must return finite logits, got NaN or infinite values")
    text = probability_warning(scores)
    if text is not None:
        warnings.warn(text, UserWarning, stacklevel=2)
    return scores
