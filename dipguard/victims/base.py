"""Shared by all victims: input normalisation, and a check of the output."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn

from dipguard.checks import check_images, check_int
from dipguard.classifier import (
    asked,
    check_is_module,
    check_logits,
    frozen,
    input_size,
    is_out_of_memory,
    probability_warning,
    reference_of,
)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
Channels: TypeAlias = Sequence[float] | None
"""Mean or standard deviation of three channels; None for one that is known or not needed."""


class Normalised(nn.Module):
    """A network with its input normalisation: ``network((images - mean) / std)`` for images in [0, 1].

    Args:
        network: Classifier of normalised images.
        mean, std: Three numbers, one per channel, ``std`` above 0; ValueError otherwise.
        classes: Class names in the order of the logits; empty if unknown.
        size: Height and width in pixels of the images that the network was made for; None if unknown.
        interpolation: How to resize other images for the network: a name of ``PIL.Image.Resampling`` in lower case.
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
        self.network = network
        self.register_buffer("mean", check_channels(mean, name="mean").float()[None])
        self.register_buffer("std", check_channels(std, name="std").float()[None])

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits [B, C] of images [B, 3, H, W] in [0, 1]."""
        # In Lightning a precision or a device may be the network's alone.
        mean, std = self.mean.to(images.device), self.std.to(images.device)
        return self.network(((images - mean) / std).to(reference_of(self.network, images).dtype))


def check_channels(values: Sequence[float], *, name: str) -> Tensor:
    """Return three numbers, one per channel, as float64 [3, 1, 1]; ValueError otherwise. A ``std`` must be above 0."""
    try:
        numbers = torch.tensor([float(value) for value in values], dtype=torch.float64, device="cpu")
    except (TypeError, ValueError):
        numbers = torch.empty(0, device="cpu")
    if len(numbers) != 3 or not bool(numbers.isfinite().all()):
        raise ValueError(f"`{name}` must hold three numbers, one per channel, got {values!r}")
    if name == "std" and bool((numbers <= 0).any()):
        raise ValueError(f"`{name}` must be above 0, got {values!r}")
    return numbers.view(3, 1, 1)


def square(size: int | None) -> tuple[int, int] | None:
    """Return height and width for the option ``size`` of a victim, the side in pixels; TypeError or ValueError else."""
    return None if size is None else (check_int(size, name="size", low=1), size)


def check_victim(victim: nn.Module, images: Tensor, *, name: str = "victim") -> Tensor:
    """Return a victim's logits [B, C] on images [B, 3, H, W] in [0, 1], float32 at least, on the images' device.

    It runs in eval mode without gradients, in its own precision; modes and flags are restored afterwards. A UserWarning
    says if the outputs look like probabilities. Messages call the victim ``name``. TypeError or ValueError for what is
    no module, bad images, images that it cannot read, or outputs that are not finite floats [B, C] with C >= 2.
    """
    check_is_module(victim, name=name)
    images = check_images(images)
    with frozen(victim), torch.no_grad():
        try:
            output = asked(victim, images)
        except Exception as error:  # each library has its own type for images of a wrong size
            sizes = [images.shape[-2:], input_size(victim)]
            here, own = (f"{size[0]}x{size[1]}" if size else "" for size in sizes)
            if is_out_of_memory(error) or own == here:
                raise
            advice = f"; it was made for {own} (give `data.size`, or resize them)" if own else ""
            raise ValueError(f"`{name}` cannot read images of {here} pixels{advice}: {first_line(error)}") from error
        scores = check_logits(output, images, name=name)
    if text := probability_warning(scores, name=name):
        warnings.warn(text, UserWarning, stacklevel=2)
    return scores


def unknown_arch(arch: str, known: Sequence[str], *, library: str) -> ValueError:
    """Return the error for an architecture that a library does not have, with the nearest ones."""
    near = ", ".join(difflib.get_close_matches(arch, known, n=5)) or f"none of its {len(known)}"
    return ValueError(f"`victim.arch` must be one of {library}'s models, got {arch!r}; near it: {near}")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message without terminal codes, or its type where the message is empty."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines()
    return lines[0] if lines else type(error).__name__
