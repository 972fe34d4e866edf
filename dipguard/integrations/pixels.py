"""Images as somebody's pipeline holds them, normalised or not, and the pixels in [0, 1] that a defence takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dipguard.checks import check_float, check_images

ROUNDING = 1e-2
"""So far beyond [0, 1] an un-normalised pixel may lie through rounding (bfloat16 keeps 8 bits); it is clamped."""


class Pixels:
    """Undoes a pipeline's normalisation (x - mean) / std, and does it again.

    Args:
        mean: Of each channel, 3 numbers in pixel units [0, 1]; None where images are not normalised.
        std: The same, each above 0.

    Raises:
        TypeError, ValueError: Not three numbers each, out of range, or one of them alone.
    """

    def __init__(self, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> None:
        if (mean is None) != (std is None):
            raise ValueError(f"`mean` and `std` must be given together, got {mean!r} and {std!r}")
        self._mean = None if mean is None else _channels(mean, name="mean")
        self._std = None if std is None else _channels(std, name="std")
        if self._std is not None and min(self._std) == 0:
            raise ValueError(f"`std` must be above 0, got {std!r}")

    def restore(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W] as the pipeline has them, of any float type -> pixels in [0, 1], float32 or float64.

        Raises:
            TypeError, ValueError: They are no images, or not in [0, 1] once normalisation is undone.
        """
        if not isinstance(images, Tensor) or not images.is_floating_point() or images.ndim != 4 or images.shape[1] != 3:
            return check_images(images)  # which names what is wrong
        wide = images.detach() if images.dtype == torch.float64 else images.detach().float()
        if self._mean is None or self._std is None:
            low, high = (float(value) for value in torch.aminmax(wide)) if wide.numel() else (0.0, 0.0)
            if low < 0 or high > 1:
                raise ValueError(
                    f"`images` must lie in [0, 1], got values from {low:.4g} to {high:.4g}; if your pipeline "
                    "normalises them, give its `mean` and `std`"
                )
            return check_images(wide.clone())
        pixels = wide * _as(self._std, wide) + _as(self._mean, wide)
        low, high = (float(value) for value in torch.aminmax(pixels)) if pixels.numel() else (0.0, 0.0)
        if low < -ROUNDING or high > 1 + ROUNDING:
            raise ValueError(
                f"`mean` and `std` must be those of the pipeline: with them, pixels go from {low:.4g} to {high:.4g}, "
                "not from 0 to 1"
            )
        return check_images(pixels.clamp(0, 1))

    def normalise(self, pixels: Tensor) -> Tensor:
        """Pixels [N, 3, H, W] in [0, 1] -> the same as the pipeline has them."""
        if self._mean is None or self._std is None:
            return pixels
        return (pixels - _as(self._mean, pixels)) / _as(self._std, pixels)


def _as(channels: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(channels, dtype=like.dtype, device=like.device).view(3, 1, 1)


def _channels(values: Sequence[float], *, name: str) -> tuple[float, ...]:
    try:
        numbers = [float(number) for number in values]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != 3:
        raise ValueError(f"`{name}` must hold three numbers, one a channel, got {values!r}")
    return tuple(check_float(number, name=name, low=0.0) for number in numbers)
